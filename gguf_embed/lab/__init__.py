"""Is it as good, and how fast?"""
