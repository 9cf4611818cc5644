"""Records on their way through the engine, which takes many before it gives the first back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gguf_embed.io.record import Record


class Progress(Protocol):
    """Who is told how far the work is."""

    def advance(self, n_texts: int, n_tokens: int, n_bytes: int) -> None:
        """So many texts, tokens and bytes of input are done since the last call."""
        ...


class Flow:
    """Gives texts to the engine, and each result its record back; rows count from 0."""

    def __init__(
        self, records: Iterator[Record], progress: Progress, *, keep_texts: bool = False
    ) -> None:
        self._records = records
        self._progress = progress
        self._keep_texts = keep_texts
        self._under_way: deque[Record] = deque()
        self._n_given = self._n_taken = self._read_bytes = 0

    def texts(self) -> Iterator[str]:
        """The texts in order, for the engine to pull."""
        for record in self._records:
            self._under_way.append(record if self._keep_texts else replace(record, text=""))
            self._n_given += 1
            self._read_bytes = record.read_bytes
            yield record.text

    def take(self, n: int) -> list[Record]:
        """The records of the next `n` results."""
        self._n_taken += n
        return [self._under_way.popleft() for _ in range(n)]

    def find(self, rows: list[int]) -> list[Record]:
        """The records of rows that gave no result."""
        under_way = list(self._under_way)
        return [under_way[row - self._n_taken] for row in rows]

    def advance(self, n_texts: int, n_tokens: int) -> None:
        """For the engine to report progress, from any thread.

        Texts finish out of order, so each counts as an average one of those given so far.
        """
        n_bytes = n_texts * self._read_bytes // self._n_given
        self._progress.advance(n_texts, n_tokens, n_bytes)


def place(record: Record) -> str:
    """Where a record came from, with its id where that says something else."""
    place = f"{record.source}:{record.position}"
    return place if record.id == place else f"{place} (id {record.id})"
