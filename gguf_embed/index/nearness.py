"""The passages that are nearest to a question: exact, and quick where there are many.

Bounds from the coarse copy leave few rows that can be among the best; those are multiplied exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.index.coarse import CoarseRows
from gguf_embed.index.vector_file import VectorFile
from gguf_embed.vectors import Vectors

# Of fewer rows numpy's product with all takes 4 ms, and needs no library.
LEAST_ROWS: Final = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """Rows that may be among the best, ascending, with their exact cosines."""

    rows: npt.NDArray[np.intp]
    cosines: Vectors


class Nearness:
    """Of one moment of an index; one thread at a time."""

    def __init__(self, file: VectorFile, n_rows: int, *, least_rows: int = LEAST_ROWS) -> None:
        """Of the first `n_rows` of the file; of fewer than `least_rows` all are multiplied."""
        self.vectors = file.rows(n_rows)
        self._file = file
        self._least_rows = least_rows
        self._coarse: CoarseRows | None = None
        self._looked = False

    def near(
        self,
        question: Vectors,
        ranges: Sequence[tuple[int, int]],
        n: int,
        bonus: Vectors | None = None,
    ) -> Near:
        """The rows of the ranges, which ascend, that hold the `n` of greatest cosine.

        With a `bonus` for each row of all, those of the greatest sum of cosine and bonus.
        """
        n_inside = sum(stop - start for start, stop in ranges)
        coarse = None
        if n_inside >= self._least_rows and 4 * n < n_inside:
            coarse = self._opened()
        if coarse is not None:
            cosines, off = coarse.bounds(question)
            sums = cosines if bonus is None else cosines + bonus
            rows = may_be_best(sums, off, n, ranges)
            if 4 * len(rows) < n_inside:
                # Not by BLAS, which adds up the last rows in another order: equal vectors are to
                # have equal cosines.
                return Near(rows=rows, cosines=np.einsum("nd,d->n", self.vectors[rows], question))
        return self._all(question, ranges, n_inside)

    def _all(self, question: Vectors, ranges: Sequence[tuple[int, int]], n_inside: int) -> Near:
        rows = rows_of(ranges, len(self.vectors))
        if 2 * n_inside >= len(self.vectors):
            return Near(rows=rows, cosines=np.asarray(self.vectors @ question)[rows])
        parts = [self.vectors[start:stop] @ question for start, stop in ranges]
        return Near(rows=rows, cosines=np.concatenate([np.empty(0, np.float32), *parts]))

    def _opened(self) -> CoarseRows | None:
        if not self._looked:
            self._coarse = self._file.coarse(len(self.vectors))
            self._looked = True
        return self._coarse


def may_be_best(
    scores: Vectors, off: Vectors, n: int, ranges: Sequence[tuple[int, int]]
) -> npt.NDArray[np.intp]:
    """The rows of the ranges that can be among the `n` best, if a score may be off so far."""
    rows = rows_of(ranges, len(scores))
    if n >= len(rows):
        return rows
    if len(rows) < len(scores):
        scores, off = scores[rows], off[rows]
    surely = scores - off
    least = np.partition(surely, len(surely) - n)[len(surely) - n]
    return rows[scores + off >= least]


def rows_of(ranges: Sequence[tuple[int, int]], n_rows: int) -> npt.NDArray[np.intp]:
    """All rows of the ranges, ascending."""
    if len(ranges) == 1:
        return np.arange(*ranges[0])
    inside = np.zeros(n_rows, np.bool_)
    for start, stop in ranges:
        inside[start:stop] = True
    return np.flatnonzero(inside)
