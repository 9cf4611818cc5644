"""Random-weight models in the shapes of the catalog's, written in seconds on a large machine.

shapes.py draws every number of a model and lets llama.cpp quantize the file. That takes minutes
for 8 billion weights. Here each matrix of a layer is drawn and quantized once, and every layer
has the same ones: sizes, types and speed are those of the real file, to the byte.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import shapes

from gguf_embed.catalog.card import ModelCard
from gguf_embed.gguf import layout
from gguf_embed.gguf.quants import TYPE_NAMES
from gguf_embed.gguf.tensors import TensorInfo
from gguf_embed.native.quantizer import quantize_rows

MAX_DRAWN = 1 << 26  # numbers of one matrix; the rest of its rows repeat those
FILE_TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
Rows = npt.NDArray[np.uint8]  # (rows, bytes of a row)


def write(card: ModelCard, out: Path, quant: str, *, seed: int = 0) -> float:
    """Write the model in that quantization; returns the seconds that it took."""
    started = time.monotonic()
    shape = card.shape
    assert shape is not None, f"{card.id}: the catalog does not know its shape"
    tensors = layout.tensors(shape, quant)
    writer = shapes.described(card, FILE_TYPES[quant], vocab=None, seed=seed)
    numbers = {name: number for number, name in TYPE_NAMES.items()}
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType(numbers[tensor.type])
        dims = tensor.shape[::-1]
        writer.add_tensor_info(tensor.name, dims, np.dtype(np.float32), tensor.n_bytes, kind)
    partial = out.with_suffix(".part")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    drawn = _Drawn(seed)
    for tensor in tensors:
        writer.write_tensor_data(drawn.bytes_of(tensor))
    writer.close()
    partial.replace(out)
    return time.monotonic() - started


class _Drawn:
    """Matrices that were drawn, by part of a layer, shape and type."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.SFC64(seed))
        self._kept: dict[Any, npt.NDArray[Any]] = {}

    def bytes_of(self, tensor: TensorInfo) -> npt.NDArray[Any]:
        """The tensor's data, flat."""
        part = tensor.name.rpartition("blk.")[2].partition(".")[2]
        key = (part, tensor.shape, tensor.type)
        if key not in self._kept:
            self._kept[key] = self._draw(tensor)
        return self._kept[key]

    def _draw(self, tensor: TensorInfo) -> npt.NDArray[Any]:
        n_row, n_rows = tensor.shape[0], math.prod(tensor.shape[1:])
        n_drawn = max(1, min(n_rows, MAX_DRAWN // n_row))
        mean, std = shapes.distribution(tensor)
        rows = self._rng.standard_normal((n_drawn, n_row), dtype=np.float32)
        rows *= std
        rows += mean
        packed = _packed(rows, tensor.type)
        times = -(-n_rows // n_drawn)
        whole = np.tile(packed, (times, 1))[:n_rows] if times > 1 else packed
        return np.ascontiguousarray(whole).reshape(-1)


def _packed(rows: npt.NDArray[np.float32], kind: str) -> Rows:
    """The rows in that type, by as many threads as there are cores."""

    def pack(part: npt.NDArray[np.float32]) -> Rows:
        if kind in shapes.DTYPES:
            return np.ascontiguousarray(part.astype(shapes.DTYPES[kind])).view(np.uint8)
        _, data = quantize_rows(part, kind)
        return np.frombuffer(data, np.uint8).reshape(len(part), -1)

    n_threads = min(os.cpu_count() or 1, len(rows))
    with ThreadPoolExecutor(n_threads) as threads:
        return np.concatenate(list(threads.map(pack, np.array_split(rows, n_threads))))
