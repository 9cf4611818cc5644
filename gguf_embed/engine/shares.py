"""When callers would be done that shared a machine equally, token by token.

Who is done first so is computed first, and whole: Friedman and Henderson, "Fairness and efficiency
in web server protocols" (SIGMETRICS 2003). No caller is done later than with equal shares, and
most are done far sooner: of n equal callers that share, all are done at the end.

Pure: the clock counts the tokens that each caller with an equal share would have had.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count


class Shares:
    """The callers that would not be done yet."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._due: dict[Hashable, float] = {}  # when a caller would be done with its last job
        self._heap: list[tuple[float, int, Hashable]] = []  # each once, maybe at a past due
        self._count = count()

    def comes(self, caller: Hashable, n_tokens: int) -> float:
        """When a job of so many tokens would be done; those of one caller follow one another."""
        due = max(self._clock, self._due.get(caller, 0.0)) + n_tokens
        if caller not in self._due:
            heapq.heappush(self._heap, (due, next(self._count), caller))
        self._due[caller] = due
        return due

    def serves(self, n_tokens: int) -> None:
        """So many tokens are computed, of whomever."""
        left = float(n_tokens)
        while self._heap:
            due, n, caller = self._heap[0]
            if self._due[caller] > due:
                heapq.heapreplace(self._heap, (self._due[caller], n, caller))
                continue
            needed = (due - self._clock) * len(self._heap)
            if needed > left:
                self._clock += left / len(self._heap)
                return
            self._clock = due
            left -= needed
            heapq.heappop(self._heap)
            del self._due[caller]

    def leaves(self, caller: Hashable) -> None:
        """It has given up its jobs."""
        if self._due.pop(caller, None) is not None:
            self._heap = [each for each in self._heap if each[2] is not caller]
            heapq.heapify(self._heap)

    def clear(self) -> None:
        """Nobody waits: what rounding left goes."""
        self._due.clear()
        self._heap.clear()
