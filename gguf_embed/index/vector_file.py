"""The vectors of an index: float32 rows in a file that only grows, mapped into memory to read.

Beside it lies a coarse copy (index/coarse.py), which is made where it is missing.

The tables say how many rows count. Rows behind those were left by a run that was killed, and the
next one writes over them: what is appended is on disk before the tables tell of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput, OutputFailed
from gguf_embed.index.coarse import CoarseRows, coarse_bytes, coarse_copy, has_coarse
from gguf_embed.system.files import check_free, printable
from gguf_embed.vectors import Vectors

BLOCK: Final = 1 << 14  # rows that are copied at a time


class VectorFile:
    """The rows of one file, and of its coarse copy."""

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.dim = dim
        self._coarse = path.with_name("coarse.q8_0")
        self._far = path.with_name("coarse.f32")  # how far each row of it is from its vector

    def append(self, vectors: Vectors, n_rows: int) -> None:
        """Put rows behind the first `n_rows`, onto the disk. Raises OutputFailed, DoesNotFit."""
        assert vectors.shape[1] == self.dim
        check_free(2 * vectors.nbytes, self.path.parent, "the vectors of these passages")
        _put(self.path, n_rows * self.dim * 4, np.ascontiguousarray(vectors, dtype="<f4"))
        if not has_coarse(self.dim):
            return
        for first in range(self._n_coarse(), n_rows, BLOCK):  # an older version made none
            rows = self.rows(n_rows)[first : first + BLOCK]
            self._put_coarse(rows, first)
        self._put_coarse(vectors, n_rows)

    def _put_coarse(self, vectors: Vectors, first: int) -> None:
        rows, far = coarse_copy(vectors)
        _put(self._coarse, first * coarse_bytes(self.dim), rows)
        _put(self._far, first * 4, far.astype("<f4"))

    def rows(self, n_rows: int) -> Vectors:
        """The first rows, shape (n_rows, dim), mapped. Raises BadInput where they are not there."""
        if not n_rows:
            return np.empty((0, self.dim), np.float32)
        try:
            return np.memmap(self.path, "<f4", "r", shape=(n_rows, self.dim))
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{printable(self.path)}: does not hold the {n_rows} vectors that it should "
                f"({error}); make the index anew with --rebuild"
            ) from error

    def coarse(self, n_rows: int) -> CoarseRows | None:
        """The coarse copy of the first rows, mapped; None where it is not whole."""
        if not n_rows or not has_coarse(self.dim) or self._n_coarse() < n_rows:
            return None
        try:
            rows = np.memmap(self._coarse, np.uint8, "r", shape=(n_rows, coarse_bytes(self.dim)))
            far = np.fromfile(self._far, "<f4", n_rows).astype(np.float32)
        except (OSError, ValueError):  # it went away just now
            return None
        return CoarseRows.of(rows, far)

    def _n_coarse(self) -> int:
        try:
            n_rows = self._coarse.stat().st_size // coarse_bytes(self.dim)
            return min(n_rows, self._far.stat().st_size // 4)
        except OSError:
            return 0


def _put(path: Path, offset: int, values: npt.NDArray[Any]) -> None:
    try:
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(offset)
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputFailed(
            f"{printable(path)}: not written: {error.strerror or error}; the index is as it was "
            "before; make room, and run it again"
        ) from error


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in ascending order, neighbours made one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return merged
