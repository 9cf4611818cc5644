"""A corpus that can be searched and kept up to date; it asks the engine for vectors."""
