"""What a GGUF file says. Pure."""
