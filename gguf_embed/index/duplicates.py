"""Groups of vectors that are nearly the same. Pure.

Every pair is compared, in blocks: nothing is missed but pairs whose cosine is within a rounding of
float32 (1e-6) of the limit.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.vectors import Vectors

BLOCK: Final = 2048  # rows: a product of 16 MiB


def near_groups(vectors: Vectors, above: float, *, block: int = BLOCK) -> list[list[int]]:
    """The rows of each group, in order: each is linked to the others by pairs of such a cosine.

    Vectors have length 1, or 0, which are like nothing. Groups are in the order of their first row.
    """
    n = len(vectors)
    parents = np.arange(n)
    for first in range(0, n, block):
        rows = np.asarray(vectors[first : first + block])
        for second in range(first, n, block):
            others = np.asarray(vectors[second : second + block])
            a, b = np.nonzero(rows @ others.T >= above)
            _join(parents, a + first, b + second)
    roots = _roots(parents, np.arange(n))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row, root in enumerate(roots.tolist()):
        groups[root].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def _join(parents: npt.NDArray[np.intp], a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> None:
    """Have each pair in one tree, whose root is its least row."""
    for _ in range(len(parents) + 1):  # each time one row at least is no root any more
        a, b = _roots(parents, a), _roots(parents, b)
        apart = a != b
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        np.minimum.at(parents, np.maximum(a, b), np.minimum(a, b))
    raise AssertionError("a pair stays apart")


def _roots(parents: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    for _ in range(len(parents) + 1):  # a parent is a lesser row: no way up is longer
        above = parents[rows]
        if (above == rows).all():
            return rows
        rows = above
    raise AssertionError("a parent is not the lesser row")
