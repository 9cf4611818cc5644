"""Vectors that `gguf-embed embed` wrote: NAME.npy or NAME.jsonl, with what made them beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput
from gguf_embed.io.lines import json_object, text_lines
from gguf_embed.system.files import printable
from gguf_embed.vectors import Vectors

ENDINGS: Final = (".npy", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A file of vectors: its shape, what made it (NAME.meta.json; empty where that is missing)."""

    path: Path
    shape: tuple[int, int]
    about: Mapping[str, object]

    def rows(self, places: npt.NDArray[np.intp]) -> Vectors:
        """The rows at `places`, float32; raises BadInput for one that is no direction."""
        take = _rows_of_lines if _is_lines(self.path) else _rows_of_array
        rows = take(self.path, places, self.shape[1])
        with np.errstate(over="ignore"):  # what is too large is not finite
            norms = np.linalg.norm(rows, axis=1)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            raise BadInput(
                f"{self.path}: row {places[bad[0]]} is zero or not finite; embed its text again"
            )
        return rows


def is_stored(name: str) -> bool:
    """Whether a name is that of a file of vectors, not of a model."""
    return name.lower().endswith(ENDINGS)


def stored(path: Path) -> Stored:
    """What is in such a file; raises BadInput."""
    shape = _shape_of_lines(path) if _is_lines(path) else _shape_of_array(path)
    meta = path.parent / f"{path.name}.meta.json"
    about: dict[str, object] = {}
    if meta.exists():
        try:
            about = dict(json_object(meta.read_text("utf-8"), str(meta)))
        except (OSError, ValueError, BadInput) as error:
            raise BadInput(f"{meta}: cannot be read: {error}; remove it or repair it") from error
        n_texts = about.get("n_texts", shape[0])
        if n_texts != shape[0]:
            raise BadInput(
                f"{meta} describes {n_texts} vectors, {path.name} holds {shape[0]}; they do not "
                "belong together"
            )
    return Stored(path=path, shape=shape, about=about)


def _is_lines(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


# -- an array ------------------------------------------------------------------------------------


def _shape_of_array(path: Path) -> tuple[int, int]:
    array = _open(path)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or not array.shape[1]:
        raise BadInput(
            f"{path}: an array of {array.dtype} of shape {array.shape}; vectors are floating-point "
            "numbers of shape (texts, dimensions)"
        )
    return array.shape[0], array.shape[1]


def _rows_of_array(path: Path, places: npt.NDArray[np.intp], dim: int) -> Vectors:
    return np.asarray(_open(path)[places], np.float32)


def _open(path: Path) -> npt.NDArray[Any]:
    try:
        # Not np.load, which would open an archive of arrays as well.
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: no .npy file that can be read: {error}") from error


# -- lines ---------------------------------------------------------------------------------------


def _shape_of_lines(path: Path) -> tuple[int, int]:
    n_rows = dim = 0
    for number, line in text_lines(path):
        if not n_rows:
            dim = len(_vector(path, number, line))
        n_rows += 1
    return n_rows, dim


def _rows_of_lines(path: Path, places: npt.NDArray[np.intp], dim: int) -> Vectors:
    rows = np.empty((len(places), dim), np.float32)
    wanted = {int(place): at for at, place in enumerate(places)}
    for row, (number, line) in enumerate(text_lines(path)):
        if (at := wanted.get(row)) is not None:
            vector = _vector(path, number, line)
            if len(vector) != dim:
                raise BadInput(
                    f"{printable(path)}, line {number}: a vector of {len(vector)} values, the "
                    f"first has {dim}"
                )
            rows[at] = vector
    return rows


def _vector(path: Path, number: int, line: str) -> Vectors:
    where = f"{printable(path)}, line {number}"
    fields = json_object(line, where)
    try:
        values = cast("Any", fields["vector"])
        vector = np.array(values, np.float64)
        if any(isinstance(value, (bool, str)) for value in values):  # numpy would take them
            vector = np.empty(0)
    except (KeyError, ValueError, TypeError, OverflowError):
        vector = np.empty(0)
    if vector.ndim != 1 or not len(vector):
        raise BadInput(
            f"{where}: no field 'vector' with a list of numbers; name what gguf-embed embed wrote, "
            "or texts with --texts"
        )
    with np.errstate(over="ignore"):
        return vector.astype(np.float32)
