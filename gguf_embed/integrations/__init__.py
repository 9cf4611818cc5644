"""Bridges to other projects' interfaces; each imports its project only when used."""
