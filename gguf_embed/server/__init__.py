"""HTTP: a dialect translates requests and answers, and decides nothing."""
