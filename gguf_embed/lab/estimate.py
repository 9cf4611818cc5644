"""How long a bench will take, told before it begins."""

from __future__ import annotations

from collections.abc import Sequence

TURN_S = 2.0  # a child starts and opens its model, in about that


def forecast_s(
    texts_per_s: Sequence[float], *, n_in_round: int, n_rounds: int, n_vectors: int
) -> float:
    """Seconds that a run over levels of these speeds takes, once they are open."""
    n_texts = n_rounds * n_in_round + n_vectors
    n_turns = n_rounds + bool(n_vectors)
    return sum(n_turns * TURN_S + n_texts / speed for speed in texts_per_s)
