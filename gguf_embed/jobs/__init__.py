"""Long work that survives a kill, and vectors that are not computed twice."""
