"""Is it as good, and how fast?"""

# What `bench` measures on, where nobody says otherwise.
LIMIT = 1000  # texts and queries
ROUNDS = 5
