"""Vectors packed into one of the types in which they are stored, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput
from gguf_embed.io.vector_types import DTYPES, VectorType
from gguf_embed.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Vectors of one type."""

    values: npt.NDArray[Any]  # (n, width)
    scales: npt.NDArray[np.float32] | None = None  # (n,), of int8


def width(dim: int, vector_type: VectorType) -> int:
    """Values of a stored vector. Raises BadInput where it has no whole bytes."""
    if vector_type != "binary":
        return dim
    if dim % 8:
        raise BadInput(f"binary vectors of {dim} dimensions: are no whole bytes; choose int8")
    return dim // 8


def pack(vectors: Vectors, vector_type: VectorType) -> Packed:
    """Vectors as that type; a row of NaN becomes one of zeros where there is no NaN."""
    if vector_type in ("float32", "float16"):
        return Packed(values=vectors.astype(DTYPES[vector_type]))
    finite = np.nan_to_num(vectors)
    if vector_type == "binary":
        return Packed(values=np.packbits(finite > 0, axis=1))
    greatest = np.abs(finite).max(axis=1, initial=0)
    scales = (greatest / 127).astype(np.float32)
    codes = np.rint(finite / np.where(scales > 0, scales, 1)[:, None])
    return Packed(values=codes.astype(np.int8), scales=scales)


def unpack(packed: Packed, vector_type: VectorType) -> Vectors:
    """The vectors again, as float32; of binary ones +1 and -1."""
    values = packed.values
    if vector_type == "binary":
        return np.unpackbits(values, axis=1).astype(np.float32) * 2 - 1
    vectors: Vectors = values.astype(np.float32)
    return vectors if packed.scales is None else vectors * packed.scales[:, None]
