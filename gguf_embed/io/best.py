"""The best of many, in memory for those alone."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Best(Generic[T]):
    """Keeps the `n` of the highest scores; of equal scores those that came first."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._n_seen = 0
        # (score, minus the order, item): no two are equal, so items are never compared.
        self._heap: list[tuple[float, int, T]] = []

    @property
    def n_seen(self) -> int:
        """How many there were."""
        return self._n_seen

    def add(self, score: float, item: T) -> None:
        """Take one more into account."""
        self._n_seen += 1
        heapq.heappush(self._heap, (score, -self._n_seen, item))
        if len(self._heap) > self._n:
            heapq.heappop(self._heap)

    def sorted(self) -> list[tuple[float, T]]:
        """(score, item), the best first."""
        return [(score, item) for score, _, item in sorted(self._heap, reverse=True)]
