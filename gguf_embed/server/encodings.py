"""Vectors as they travel. Whole arrays are converted, no value alone."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_embed.vectors import Vectors

Rows: TypeAlias = list[Any]  # arrays of numbers, or str, one for each vector

# Values of a vector of length 1 are spread about 0 by 1/sqrt(dim). Four times that hold nearly all.
INT8_SPREAD: Final = 4.0


def floats(vectors: Vectors) -> Rows:
    """As numbers, in the shortest decimals that give the same float32."""
    return list(vectors)


def base64(vectors: Vectors) -> Rows:
    """As the bytes of little-endian float32."""
    return [b64encode(row).decode() for row in vectors.astype("<f4", copy=False)]


def joined_base64(values: npt.NDArray[np.float32] | npt.NDArray[np.int32]) -> str:
    """All values of an array, little-endian, end to end."""
    return b64encode(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def int8(vectors: Vectors) -> Rows:
    """Each value as -128 to 127, on a scale that depends on the dimension alone."""
    return list(_int8(vectors))


def uint8(vectors: Vectors) -> Rows:
    """The same, 128 higher."""
    return list((_int8(vectors).astype(np.int16) + 128).astype(np.uint8))


def ubinary(vectors: Vectors) -> Rows:
    """The signs, eight in a byte: 1 for a value above 0."""
    return list(np.packbits(vectors > 0, axis=1))


def binary(vectors: Vectors) -> Rows:
    """The same, 128 lower."""
    packed = np.packbits(vectors > 0, axis=1).astype(np.int16)
    return list((packed - 128).astype(np.int8))


ENCODINGS: Final[Mapping[str, Callable[[Vectors], Rows]]] = {
    "float": floats,
    "base64": base64,
    "int8": int8,
    "uint8": uint8,
    "binary": binary,
    "ubinary": ubinary,
}


def _int8(vectors: Vectors) -> npt.NDArray[np.int8]:
    scale = 127 * np.sqrt(vectors.shape[1]) / INT8_SPREAD
    return np.clip(np.rint(vectors * scale), -128, 127).astype(np.int8)
