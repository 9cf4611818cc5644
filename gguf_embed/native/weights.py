"""Weights as numbers: some rows of a tensor, read from the file without loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from math import prod
from pathlib import Path

import numpy as np

from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.header import Header
from gguf_embed.native.library import ggml
from gguf_embed.vectors import Vectors


def read_rows(path: Path, header: Header, name: str, rows: Sequence[int] | None = None) -> Vectors:
    """Rows of a tensor as float32, shape (rows, n_cols); all of them where none are named.

    A tensor of one dimension is one row. Raises BadModelFile where the file does not hold them.
    """
    tensor = header.tensor(name)
    if tensor is None:
        raise BadModelFile(f"{header.source}: the file has no tensor {name}")
    n_cols, n_rows = tensor.shape[0], prod(tensor.shape[1:])
    row_bytes = tensor.n_bytes // n_rows
    start = header.header_bytes + tensor.offset
    read: list[Vectors] = []
    try:
        with path.open("rb") as file:
            for row in range(n_rows) if rows is None else rows:
                if not 0 <= row < n_rows:
                    raise BadModelFile(f"{header.source}: {name} has {n_rows} rows, no row {row}")
                file.seek(start + row * row_bytes)
                raw = file.read(row_bytes)
                if len(raw) != row_bytes:
                    raise BadModelFile(f"{header.source}: ends within {name}; fetch it again")
                read.append(_to_float32(raw, tensor.type, n_cols))
    except OSError as error:
        raise BadModelFile(f"{header.source}: {error.strerror or error}") from error
    return np.stack(read)


def _to_float32(raw: bytes, type_name: str, n_cols: int) -> Vectors:
    match type_name:
        case "F32":
            return np.frombuffer(raw, "<f4").astype(np.float32)
        case "F16":
            return np.frombuffer(raw, "<f2").astype(np.float32)
        case "BF16":
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        case _:
            spelled = type_name.lower().replace("_k", "_K")
            convert = ggml(f"dequantize_row_{spelled}", None, c_void_p, c_void_p, c_int64)
            blocks = np.frombuffer(raw, np.uint8)
            values = np.empty(n_cols, np.float32)
            convert(blocks.ctypes.data, values.ctypes.data, n_cols)
            return values
