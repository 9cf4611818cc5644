"""Vectors as they are stored: in float32, or smaller.

float32  as they are
float16  rounded
int8     each value over the greatest of its vector, times 127; `scale` leads back
binary   one bit for each value, 1 where it is above 0; eight to a byte, the first one highest
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

VectorType: TypeAlias = Literal["float32", "float16", "int8", "binary"]
VECTOR_TYPES: Final[tuple[VectorType, ...]] = get_args(VectorType)
DTYPES: Final[dict[VectorType, str]] = {
    "float32": "<f4",
    "float16": "<f2",
    "int8": "i1",
    "binary": "u1",
}
