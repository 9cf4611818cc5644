"""Which passages answer best: cosines and words, alone or fused. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.index.nearness import Near
from gguf_embed.vectors import Vectors

# The share of the words in a fused score. Measured on docstrings: benchmarks/LOG.md.
WORDS_SHARE: Final = 0.3


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


def by_meaning(near: Near, n: int) -> list[Scored]:
    """By cosine alone."""
    return [
        Scored(
            row=int(near.rows[at]),
            score=float(near.cosines[at]),
            similarity=float(near.cosines[at]),
            words=None,
        )
        for at in best_rows(near.cosines, n).tolist()
    ]


def by_words(words: npt.NDArray[np.float32], n: int) -> list[Scored]:
    """By BM25 alone; rows of 0 hold none of the words."""
    most = words.max(initial=0)
    return [
        Scored(
            row=row,
            score=float(words[row] / most),
            similarity=None,
            words=float(words[row] / most),
        )
        for row in best_rows(words, n).tolist()
        if words[row] > 0
    ]


def bonus_of(words: npt.NDArray[np.float32], *, share: float = WORDS_SHARE) -> Vectors:
    """What the words of each row are worth beside its cosine: `fused` orders by the sum."""
    most = words.max(initial=0) or np.float32(1)
    return words * np.float32(share / (1 - share) / most)


def fused(
    near: Near, words: npt.NDArray[np.float32], n: int, *, share: float = WORDS_SHARE
) -> list[Scored]:
    """By both: (1 - share) of the cosine and `share` of BM25, which counts from 0 to its best.

    `words` are those of all rows.
    """
    most = words.max(initial=0) or np.float32(1)
    words = words[near.rows]
    scores = (near.cosines * (1 - share) + words * (share / most)).astype(np.float32)
    return [
        Scored(
            row=int(near.rows[at]),
            score=float(scores[at]),
            similarity=float(near.cosines[at]),
            words=float(words[at] / most) if words[at] > 0 else None,
        )
        for at in best_rows(scores, n).tolist()
    ]
