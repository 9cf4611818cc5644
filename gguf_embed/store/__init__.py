"""A name becomes a verified file on this machine."""
