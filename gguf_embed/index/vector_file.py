"""The vectors of an index: float32 rows in a file that only grows, mapped into memory to read.

The tables say how many rows count. Rows behind those were left by a run that was killed, and the
next one writes over them: what is appended is on disk before the tables tell of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput, OutputFailed
from gguf_embed.system.files import check_free, printable
from gguf_embed.vectors import Vectors


class VectorFile:
    """The rows of one file."""

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.dim = dim

    def append(self, vectors: Vectors, n_rows: int) -> None:
        """Put rows behind the first `n_rows`, onto the disk. Raises OutputFailed, DoesNotFit."""
        assert vectors.shape[1] == self.dim
        check_free(vectors.nbytes, self.path.parent, "the vectors of these passages")
        try:
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.seek(n_rows * self.dim * 4)
                file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputFailed(
                f"{printable(self.path)}: not written: {error.strerror or error}; the index is as "
                "it was before; make room, and run it again"
            ) from error

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


def cosines(
    vectors: Vectors, question: Vectors, ranges: Sequence[tuple[int, int]]
) -> npt.NDArray[np.float32]:
    """The products of all rows with a vector, shape (n,); -2 outside the ranges, which ascend."""
    n_rows = len(vectors)
    covered = sum(stop - start for start, stop in ranges)
    if 2 * covered >= n_rows:
        scores = np.asarray(vectors @ question)
        outside = np.full(n_rows, -2, np.float32)
        for start, stop in ranges:
            outside[start:stop] = scores[start:stop]
        return outside
    scores = np.full(n_rows, -2, np.float32)
    for start, stop in ranges:
        scores[start:stop] = vectors[start:stop] @ question
    return scores


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
