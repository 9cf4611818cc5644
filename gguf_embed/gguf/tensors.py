"""One entry of the tensor table."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.cursor import MAX_DIMS, MAX_ELEMENTS, MAX_NAME_BYTES, Cursor
from gguf_embed.gguf.quants import BLOCK, TYPE_NAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor; `shape[0]` is the row length, `offset` counts from the start of tensor data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data; its rows must be whole blocks of the type."""
    block, block_bytes = BLOCK[type_name]
    assert shape[0] % block == 0, f"rows of {shape[0]} are not whole {type_name} blocks"
    return prod(shape) // block * block_bytes


def read_tensor_info(cursor: Cursor) -> TensorInfo:
    """One entry of the tensor table, checked by itself. Raises BadModelFile."""
    name = cursor.name("tensor name", MAX_NAME_BYTES)
    n_dims = cursor.u32()
    if n_dims > MAX_DIMS:
        raise cursor.damaged(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMS}")
    shape = tuple(cursor.u64() for _ in range(n_dims)) or (1,)
    type_number, offset = cursor.u32(), cursor.u64()
    type_name = TYPE_NAMES.get(type_number)
    if type_name is None:
        raise BadModelFile(
            f"{cursor.source}: tensor {name!r} has type {type_number}, which is unknown; "
            "update gguf-embed and llama-cpp-python, or get a current file"
        )
    if shape[0] % BLOCK[type_name][0]:
        raise cursor.damaged(
            f"tensor {name!r} has rows of {shape[0]}, not whole {type_name} blocks of "
            f"{BLOCK[type_name][0]}"
        )
    if prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise cursor.damaged(f"tensor {name!r} has shape {shape}, beyond 2^63 elements")
    return TensorInfo(
        name=name,
        shape=shape,
        type=type_name,
        offset=offset,
        n_bytes=tensor_bytes(type_name, shape),
    )
