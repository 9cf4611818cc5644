"""Passages in groups that are about the same, and words that tell a group from the others. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.vectors import Vectors

ROUNDS: Final = 50  # most, of moving centres; few are needed
N_WORDS: Final = 3
_WORD: Final = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """The largest first."""

    numbers: npt.NDArray[np.intp]  # (n,): of each row
    centres: Vectors  # (k, dim), of length 1

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.centres)


def clusters_of(vectors: Vectors, k: int, *, seed: int = 0) -> Clusters:
    """At most `k` groups of rows by cosine (spherical k-means); the same for the same input.

    Vectors have length 1, or 0.
    """
    k = min(k, len(vectors))
    if not k:
        return Clusters(numbers=np.zeros(0, np.intp), centres=vectors)
    centres = _begin(vectors, k, np.random.default_rng(seed))
    numbers = np.full(len(vectors), -1)
    for _ in range(ROUNDS):
        before, numbers = numbers, (vectors @ centres.T).argmax(axis=1)
        if (before == numbers).all():
            break
        for number in range(k):
            members = vectors[numbers == number]
            total = members.sum(axis=0) if len(members) else centres[number]
            length = np.linalg.norm(total)
            if length > 0:
                centres[number] = total / length
    sizes = np.bincount(numbers, minlength=k)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    place = np.zeros(k, np.intp)
    place[order] = np.arange(len(order))
    return Clusters(numbers=place[numbers], centres=centres[order])


def _begin(vectors: Vectors, k: int, chance: np.random.Generator) -> Vectors:
    """Rows far from one another, by chance (k-means++)."""
    centres = np.empty((k, vectors.shape[1]), np.float32)
    far = np.ones(len(vectors))
    for number in range(k):
        total = far.sum()
        row = chance.choice(len(vectors), p=far / total) if total > 0 else number
        centres[number] = vectors[row]
        far = np.minimum(far, np.maximum(1 - vectors @ centres[number], 0).astype(np.float64))
    return centres


def names_of(texts: Sequence[str], numbers: npt.NDArray[np.intp], k: int) -> list[str]:
    """A few words for each group: often in its texts, and seldom in others."""
    n_all: Counter[str] = Counter()
    n_of: list[Counter[str]] = [Counter() for _ in range(k)]
    for text, number in zip(texts, cast("list[int]", numbers.tolist()), strict=True):
        words = {word.casefold() for word in _WORD.findall(text)}
        n_all.update(words)
        n_of[number].update(words)
    sizes = np.bincount(numbers, minlength=k)
    names: list[str] = []
    for number, counts in enumerate(n_of):
        share = sizes[number] / max(len(texts), 1)

        def worth(word: str, counts: Counter[str] = counts, share: float = share) -> float:
            # How many more texts of the group have it than chance would give it.
            return (counts[word] - share * n_all[word]) / (n_all[word] + 5) ** 0.5

        best = sorted(counts, key=lambda word: (-worth(word), word))
        names.append(" ".join(best[:N_WORDS]))
    return names
