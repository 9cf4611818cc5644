"""The types that vectors may have in a file; without numpy, for those that only name them."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

VectorType: TypeAlias = Literal["float32", "float16", "int8", "binary"]
VECTOR_TYPES: Final[tuple[VectorType, ...]] = get_args(VectorType)
