"""What we ask of the operating system. Knows nothing about models."""
