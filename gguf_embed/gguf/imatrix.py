"""Importance matrices: how much each input of a weight matrix matters, from llama-imatrix.

The file is a GGUF of type "imatrix" with two float32 tensors for each weight: `NAME.in_sum2`, sums
of squared inputs, shape (row length, experts), and `NAME.counts`, how many there were, shape
(1, experts). Their quotients are what llama-quantize hands to the quantizer (quantize.cpp,
load_imatrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.header import read_header

_Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """Importances by weight name, shape (experts x row length,), and what they were made from."""

    values: Mapping[str, _Array]
    datasets: tuple[str, ...]
    n_chunks: int


def read_imatrix(path: Path) -> Imatrix:
    """The importance matrix in a file of llama-imatrix; raises BadModelFile."""
    if path.exists() and not path.is_file():
        raise BadModelFile(f"{path}: a pipe or a device; pass a file that lies on a disk")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise BadModelFile(
            f"{path}: no GGUF; if it is an importance matrix in llama.cpp's old .dat format, "
            f"convert it: llama-imatrix --in-file {path.name} -o {path.stem}.gguf"
        )
    header = read_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise BadModelFile(f"{path}: no importance matrix; pass what llama-imatrix wrote")
    parts: dict[str, dict[str, _Array]] = {"in_sum2": {}, "counts": {}}
    for tensor in header.tensors:
        name, _, part = tensor.name.rpartition(".")
        if part not in parts:
            continue
        if tensor.type != "F32":
            raise BadModelFile(f"{path}: {tensor.name} is {tensor.type}, not F32; make it again")
        offset = header.header_bytes + tensor.offset
        parts[part][name] = np.fromfile(path, "<f4", tensor.n_bytes // 4, offset=offset)
    sums, counts = parts["in_sum2"], parts["counts"]
    if not sums or sums.keys() != counts.keys():
        alone = sorted(sums.keys() ^ counts.keys())
        of = f"; {alone[0]} lacks one of the two" if alone else ""
        raise BadModelFile(
            f"{path}: {len(sums)} sums and {len(counts)} counts{of}; make the file again"
        )
    datasets = header.metadata.get("imatrix.datasets")
    n_chunks = header.metadata.get("imatrix.chunk_count")
    return Imatrix(
        values={name: _quotients(path, name, sums[name], counts[name]) for name in sums},
        datasets=tuple(map(str, datasets)) if isinstance(datasets, tuple) else (),
        n_chunks=n_chunks if isinstance(n_chunks, int) else 0,
    )


def _quotients(path: Path, name: str, sums: _Array, counts: _Array) -> _Array:
    """Mean squared inputs; 1 for all inputs of an expert that no token reached."""
    if not len(counts) or len(sums) % len(counts):
        raise BadModelFile(
            f"{path}: {name} has {len(sums)} sums and {len(counts)} counts; make the file again"
        )
    n = np.rint(counts)[:, None]
    means = np.where(n > 0, sums.reshape(len(counts), -1) / np.maximum(n, 1), np.float32(1))
    if not np.isfinite(means).all():
        raise BadModelFile(f"{path}: {name} holds NaN or infinity; make the file again")
    return means.ravel()
