"""The only door to llama.cpp."""
