"""The folder of an index: generations of it, of which a small file names the one that counts.

    handbook.index/
      index.json       {"format": "gguf-embed-index/1", "generation": 2}
      2/facts.json     the model, its vector space, how files are cut
      2/tables.sqlite  files, passages, words
      2/vectors.f32    a row for each passage

A generation is updated in place, batch by batch. Another model, or tidying up, makes the next one
beside it, and the switch is the writing of one small file.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from gguf_embed.errors import BadInput, OutputFailed
from gguf_embed.index.facts import FORMAT, IndexFacts
from gguf_embed.index.places import POINTER
from gguf_embed.index.tables import Tables
from gguf_embed.index.vector_file import VectorFile
from gguf_embed.system.files import printable, whole_folder
from gguf_embed.system.kept import check_kept, keep
from gguf_embed.system.lock import Lock

_FORMAT: Final = f"gguf-embed-index/{FORMAT}"
_FACTS, _TABLES, _VECTORS, _LOCK = "facts.json", "tables.sqlite", "vectors.f32", "writer.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """Which generation counts."""

    format: str
    generation: int


def read_pointer(place: Path) -> Pointer | None:
    """The pointer of an index; None where there is no index. Raises BadInput."""
    try:
        pointer = check_kept(place / POINTER, Pointer)
    except ValueError as error:
        raise BadInput(
            f"{printable(place / POINTER)}: damaged ({error}); remove the folder and make the "
            "index anew"
        ) from error
    if pointer is not None and pointer.format != _FORMAT:
        raise BadInput(
            f"{printable(place)}: is {pointer.format}, this version of gguf-embed reads {_FORMAT}"
        )
    return pointer


def switch(place: Path, generation: int) -> None:
    """From now on this generation counts; the others go. Raises OutputFailed."""
    if not keep(place / POINTER, Pointer(format=_FORMAT, generation=generation)):
        raise OutputFailed(f"{printable(place / POINTER)}: not written; the index is as it was")
    for folder in list(_generations(place)):
        if folder.name != str(generation):
            shutil.rmtree(folder, ignore_errors=True)  # somebody may still read it


def _generations(place: Path) -> Iterator[Path]:
    for folder in place.iterdir():
        if folder.is_dir() and folder.name.strip(".").partition(".")[0].isdigit():
            yield folder


def generation_folder(place: Path, generation: int) -> Path:
    """Where it is."""
    return place / str(generation)


def begin(place: Path, generation: int, facts: IndexFacts) -> tuple[Tables, VectorFile]:
    """A generation to fill: one of these facts that was begun before goes on."""
    folder = generation_folder(place, generation)
    try:
        if (folder / _TABLES).is_file() and read_facts(folder) == facts:
            return open_parts(folder, facts, writable=True)
    except BadInput:
        pass
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputFailed(
            f"{printable(folder)}: cannot be made: {error.strerror or error}"
        ) from error
    if not keep(folder / _FACTS, facts):
        raise OutputFailed(f"{printable(folder / _FACTS)}: not written")
    return Tables.create(folder / _TABLES), VectorFile(folder / _VECTORS, facts.space.dim)


def read_facts(folder: Path) -> IndexFacts:
    """What a generation is made of. Raises BadInput."""
    try:
        facts = check_kept(folder / _FACTS, IndexFacts)
    except ValueError as error:
        raise BadInput(f"{printable(folder / _FACTS)}: damaged ({error})") from error
    if facts is None:
        raise BadInput(f"{printable(folder)}: no {_FACTS} there; make the index anew")
    return facts


def open_parts(folder: Path, facts: IndexFacts, *, writable: bool) -> tuple[Tables, VectorFile]:
    """The tables and vectors of a generation. Raises BadInput."""
    return Tables(folder / _TABLES, writable=writable), vectors_of(folder, facts)


def vectors_of(folder: Path, facts: IndexFacts) -> VectorFile:
    """The vectors of a generation."""
    return VectorFile(folder / _VECTORS, facts.space.dim)


def tidied(place: Path, generation: int, facts: IndexFacts, tables: Tables) -> int:
    """Make the next generation without vectors that nobody needs; returns its number."""
    target = generation_folder(place, generation + 1)
    shutil.rmtree(target, ignore_errors=True)
    old = VectorFile(generation_folder(place, generation) / _VECTORS, facts.space.dim)
    vectors = old.rows(tables.n_rows())
    with whole_folder(target) as folder:
        tables.copy_to(folder / _TABLES)
        new = VectorFile(folder / _VECTORS, facts.space.dim)
        with Tables(folder / _TABLES, writable=True) as copy, copy.writing():
            n_rows, batch, n_waiting = 0, list[np.ndarray](), 0
            for file in copy.files():
                copy.set_rows(file.id, n_rows + n_waiting)
                batch.append(vectors[file.first_row : file.first_row + file.n_rows])
                n_waiting += file.n_rows
                if n_waiting >= 1 << 14:
                    new.append(np.concatenate(batch), n_rows)
                    n_rows, batch, n_waiting = n_rows + n_waiting, [], 0
            if n_waiting:
                new.append(np.concatenate(batch), n_rows)
            copy.set_fact("n_rows", str(n_rows + n_waiting))
        if not keep(folder / _FACTS, facts):
            raise OutputFailed(f"{printable(folder / _FACTS)}: not written")
    return generation + 1


@contextmanager
def only_writer(place: Path) -> Generator[None]:
    """Hold the right to write an index. Raises OutputFailed where another run has it."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputFailed(f"{printable(place)}: cannot be made: {reason}") from error
    with Lock(place / _LOCK, what=printable(place)):
        yield
