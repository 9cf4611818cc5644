"""A coarse copy of the vectors, a quarter of their size: it tells which rows need not be looked at.

Each value is one of 255 steps, each 32 of them have a scale (ggml's Q8_0). Beside them stands, for
each row, how far its copy is from it. That and the like of the question say within what bounds the
cosine lies, so that the best rows are found for certain, and only those few are multiplied exactly.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import NativeFailed
from gguf_embed.native.products import BLOCK, BLOCK_BYTES, Products
from gguf_embed.vectors import Vectors

ROUNDING: Final = 1e-5  # what sums of float32 and of the kernel may be off, generously
_BLOCKS: Final = np.dtype([("scale", "<f2"), ("steps", "i1", (BLOCK,))])
# A step is 1/127 of the greatest value of its block; a value is off by half of one, and by what
# float16 rounds of the scale, 127 steps times 2^-11; 2^-25 where the scale is no normal number.
_STEPS_OFF: Final = 0.5 + 127 / 2048
_TINY: Final = 127 / 2**25


def has_coarse(dim: int) -> bool:
    """Whether vectors of that length have a coarse copy."""
    return dim % BLOCK == 0


def coarse_bytes(dim: int) -> int:
    """Of a row of it."""
    return dim // BLOCK * BLOCK_BYTES


def coarse_copy(vectors: Vectors) -> tuple[npt.NDArray[np.uint8], Vectors]:
    """(rows in Q8_0, shape (n, bytes of a row); how far each is from its vector)."""
    n, dim = vectors.shape
    values = np.ascontiguousarray(vectors, np.float32).reshape(n, dim // BLOCK, BLOCK)
    blocks = np.empty((n, dim // BLOCK), _BLOCKS)
    most = np.abs(values).max(axis=2) / 127
    blocks["scale"] = most
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(most[..., None] > 0, values / most[..., None], 0)
    blocks["steps"] = np.rint(steps)
    apart = values - blocks["steps"] * blocks["scale"].astype(np.float32)[..., None]
    far = np.sqrt(np.square(apart, dtype=np.float64).sum(axis=(1, 2)))
    rows = blocks.view(np.uint8).reshape(n, coarse_bytes(dim))
    return rows, np.nextafter(far.astype(np.float32), np.inf)


def question_off(question: Vectors) -> float:
    """How far the kernel's copy of a question is from it, at most."""
    most = np.abs(question.astype(np.float64)).reshape(-1, BLOCK).max(axis=1) / 127
    return float(np.sqrt(BLOCK * np.square(most * _STEPS_OFF + _TINY).sum()))


class CoarseRows:
    """The coarse copy of all rows of one moment."""

    def __init__(self, products: Products, far: Vectors) -> None:
        """Use `of`."""
        self._products = products
        self._far = far

    @classmethod
    def of(cls, rows: npt.NDArray[np.uint8], far: Vectors) -> CoarseRows | None:
        """None where the installed llama.cpp has no such product."""
        try:
            return cls(Products(rows), far)
        except NativeFailed:
            return None

    def bounds(self, question: Vectors) -> tuple[Vectors, Vectors]:
        """(cosines, how far the true ones may be from them): of every row."""
        question_far = question_off(question)
        length = float(np.linalg.norm(question))
        # |x q - x' q'| <= |x - x'| |q| + |x'| |q - q'|, and |x'| <= 1 + |x - x'|
        off = self._far * (length + question_far) + (question_far + ROUNDING)
        return self._products.of(question), off
