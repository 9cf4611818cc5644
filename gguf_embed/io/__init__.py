"""Texts in, vectors out. No model."""
