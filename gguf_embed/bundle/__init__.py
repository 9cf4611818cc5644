"""Carrying a model to a machine without internet."""
