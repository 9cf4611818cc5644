"""Which passages answer best: cosines and words, alone or fused. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

# The share of the words in a fused score, and how deep each list is read. Measured on docstrings:
# benchmarks/LOG.md.
WORDS_SHARE: Final = 0.3
DEPTH: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A row with its scores."""

    row: int
    score: float  # what it is ordered by, 0 to 1 but for cosines below 0
    similarity: float | None  # the cosine
    words: float | None  # BM25 as a share of the best; None: none of the words


def best_rows(cosines: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.intp]:
    """The rows of the greatest values, in order; of equal ones the first."""
    n = min(n, len(cosines))
    if n < len(cosines):
        least = np.partition(cosines, len(cosines) - n)[len(cosines) - n]
        rows = np.flatnonzero(cosines >= least)
    else:
        rows = np.arange(len(cosines))
    return rows[np.argsort(-cosines[rows], kind="stable")[:n]]


def by_meaning(cosines: npt.NDArray[np.float32], n: int) -> list[Scored]:
    """By cosine alone; rows of less than -1 are none."""
    return [
        Scored(row=row, score=float(cosines[row]), similarity=float(cosines[row]), words=None)
        for row in best_rows(cosines, n).tolist()
        if cosines[row] >= -1.5
    ]


def by_words(words: Mapping[int, float], n: int) -> list[Scored]:
    """By BM25 alone, given row by row, the best first."""
    most = max(words.values(), default=1.0)
    found = [
        Scored(row=row, score=value / most, similarity=None, words=value / most)
        for row, value in words.items()
    ]
    return found[:n]


def fused(
    cosines: npt.NDArray[np.float32],
    words: Mapping[int, float],
    n: int,
    *,
    share: float = WORDS_SHARE,
    depth: int = DEPTH,
) -> list[Scored]:
    """By both: (1 - share) of the cosine and `share` of BM25, which counts from 0 to its best.

    A row that only one list has deep enough gets its exact cosine, and no words.
    """
    nearest = best_rows(cosines, max(n, depth))
    rows = {row for row in nearest.tolist() if cosines[row] >= -1.5} | words.keys()
    most = max(words.values(), default=1.0)
    found: list[Scored] = []
    for row in rows:
        similarity = float(cosines[row])
        value = words[row] / most if row in words else None
        score = (1 - share) * similarity + share * (value or 0)
        found.append(Scored(row=row, score=score, similarity=similarity, words=value))
    found.sort(key=lambda each: (-each.score, each.row))
    return found[:n]
