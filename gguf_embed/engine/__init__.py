"""All that a text passes on its way to a vector."""
