"""Pure decisions: which file, where, how. Opens nothing, asks nothing."""
