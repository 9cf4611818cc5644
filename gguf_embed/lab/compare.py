"""Are two sets of vectors of the same texts one vector space? Pure.

    comparison = compare(a, b)     # a, b: (n texts, dim)
    comparison.likeness            # "yes", "close" or "no"

The thresholds were set with all-MiniLM-L6-v2, where the answers are known. Ranges over three sets
of texts (125 English sentences, the same in seven languages, 400 docstrings):

    F16 against          cosine p1      overlap@10
    F32                  1.000          1.00           yes
    Q8_0                 0.999          0.97-0.98      yes
    Q5_K_M               0.982-0.991    0.91-0.94      close
    Q4_0                 0.907-0.946    0.81-0.85      close
    "query: " in front   0.66-0.81      0.71-0.79      no
    CLS for MEAN pooling 0.22-0.30      0.28-0.48      no
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput
from gguf_embed.lab.metrics import CosineStats, cosine_stats, neighbours, overlap, spearman
from gguf_embed.vectors import Vectors, finish

Likeness: TypeAlias = Literal["yes", "close", "no"]

N_NEIGHBOURS: Final = 10
# Below this, ten neighbours are a large part of all texts and agree by themselves.
MIN_TEXTS: Final = 30
# Enough for steady figures; the cosines of all pairs are held at one time.
MAX_TEXTS: Final = 2000

# (1st percentile of the cosines, mean overlap@10): both must be reached.
SAME: Final = (0.995, 0.95)
CLOSE: Final = (0.85, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far two sets of vectors agree.

    `overlap` is the mean share of a text's ten neighbours that both find, `rank_correlation` the
    mean Spearman of a text's cosines with all others; each set is ranked by itself.
    """

    likeness: Likeness  # one space, nearly one, or not
    why: str
    n_texts: int
    dims: tuple[int, int]
    cosine: CosineStats
    overlap: float
    rank_correlation: float


def compare(a: Vectors, b: Vectors) -> Comparison:
    """How far vectors of the same texts agree, row by row; both need at least MIN_TEXTS rows.

    Where the dimensions differ, the longer vectors are cut to the shorter, as a Matryoshka model
    would cut them.
    """
    n, dims = len(a), (a.shape[1], b.shape[1])
    if n != len(b) or n < MIN_TEXTS:
        raise BadInput(
            f"{n} and {len(b)} vectors: the same texts are needed on both sides, at least "
            f"{MIN_TEXTS} of them"
        )
    a, b = (finish(one, dimensions=min(dims), normalize=True) for one in (a, b))
    cosine = cosine_stats(a, b)
    nearest = (neighbours(one, k=N_NEIGHBOURS) for one in (a, b))
    shared = float(overlap(*nearest).mean())
    others = ~np.eye(n, dtype=np.bool_)
    to_others = ((one @ one.T)[others].reshape(n, n - 1) for one in (a, b))
    likeness, why = _likeness(cosine.p1, shared, dims)
    return Comparison(
        likeness=likeness,
        why=why,
        n_texts=n,
        dims=dims,
        cosine=cosine,
        overlap=shared,
        rank_correlation=float(spearman(*to_others).mean()),
    )


def _likeness(p1: float, shared: float, dims: tuple[int, int]) -> tuple[Likeness, str]:
    cut = ""
    if dims[0] != dims[1]:
        longer = "AB"[dims[1] > dims[0]]
        cut = f"once {longer} is cut to its first {min(dims)} values and normalized again, "

    def reached(limits: tuple[float, float]) -> bool:
        return p1 >= limits[0] and shared >= limits[1]

    if reached(SAME):
        return "yes", f"{cut}one vector space: A and B can stand in one index"
    others = f"of ten neighbours {10 * (1 - shared):.1f} are others"
    if reached(CLOSE):
        return "close", f"{cut}nearly one vector space, but {others}; embed again where that counts"
    if cut:
        return "no", f"{dims[0]} and {dims[1]} dimensions, and cut to {min(dims)} they differ too"
    if shared >= CLOSE[1]:
        turned = "each ranks much as the other does, but the same text gets another vector"
        return "no", f"{turned} (cosine {p1:.2f} at the 1st percentile); embed again with one"
    return "no", f"another vector space: {others}; embed again with one of the two"


def evenly(n: int, most: int = MAX_TEXTS) -> npt.NDArray[np.intp]:
    """At most `most` of the positions 0..n-1, evenly spaced; all of them where they are fewer."""
    return np.arange(n) if n <= most else np.arange(most) * n // most
