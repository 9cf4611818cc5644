"""What of an index is kept in memory between two questions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput
from gguf_embed.index.facts import Folder, KnownFile
from gguf_embed.index.nearness import Nearness
from gguf_embed.index.tables import Tables
from gguf_embed.index.vector_file import VectorFile, joined
from gguf_embed.index.word_scores import WordScores
from gguf_embed.index.word_tables import WordTables
from gguf_embed.io.globs import compile_globs, matches
from gguf_embed.system.files import printable
from gguf_embed.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The files of one moment, and where their vectors are."""

    version: int
    folders: dict[int, Folder]
    files: dict[int, KnownFile]
    ordered: tuple[KnownFile, ...]  # by the rows of their vectors
    first_rows: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]  # of rows in use
    n_passages: int
    nearness: Nearness
    words: WordScores

    @property
    def vectors(self) -> Vectors:
        """All rows, also those that are not in use, mapped."""
        return self.nearness.vectors

    @classmethod
    def of(cls, tables: Tables, vectors: VectorFile, version: int) -> Snapshot:
        """What the tables hold now. Raises BadInput."""
        files = tables.files()
        ordered = sorted((each for each in files if each.n_rows), key=lambda each: each.first_row)
        ranges = joined([(each.first_row, each.first_row + each.n_rows) for each in ordered])
        n_rows = max((each.first_row + each.n_rows for each in ordered), default=0)
        return cls(
            version=version,
            folders={each.id: each for each in tables.folders()},
            files={each.id: each for each in files},
            ordered=tuple(ordered),
            first_rows=tuple(each.first_row for each in ordered),
            ranges=tuple(ranges),
            n_passages=sum(each.n_rows for each in ordered),
            nearness=Nearness(vectors, n_rows),
            words=WordScores(WordTables(tables), ordered, n_rows),
        )

    def place_of(self, row: int) -> tuple[int, int]:
        """(file, ordinal) of a vector."""
        file = self.ordered[bisect_right(self.first_rows, row) - 1]
        return file.id, row - file.first_row

    def path_of(self, file: KnownFile) -> Path:
        """Where a file is."""
        return self.folders[file.folder].path / file.name

    def chosen(self, paths: Sequence[str]) -> list[int] | None:
        """The ids of the files that patterns choose; None: all. Raises BadInput for no file."""
        if not paths:
            return None
        globs = compile_globs("--path", paths)
        # Texts, since an object for each path takes ten times as long.
        roots = {id: folder.path.as_posix().rstrip("/") for id, folder in self.folders.items()}
        chosen = [
            file.id
            for file in self.files.values()
            if matches(f"{roots[file.folder]}/{file.name}".rstrip("/"), globs)  # "": the root
        ]
        if not chosen:
            raise BadInput(f"--path {' '.join(paths)}: matches no file of the index; correct it")
        return chosen

    def rows_of(self, paths: Sequence[str]) -> npt.NDArray[np.intp]:
        """The rows of the files that patterns choose, ascending. Raises BadInput for no file."""
        chosen = self.chosen(paths)
        files = None if chosen is None else set(chosen)
        kept = [
            np.arange(file.first_row, file.first_row + file.n_rows)
            for file in self.ordered
            if files is None or file.id in files
        ]
        return np.concatenate(kept) if kept else np.empty(0, np.intp)

    def file_named(self, name: str) -> KnownFile:
        """The file of a path, or of the end of one. Raises BadInput."""
        exact = Path(name).absolute()
        tail = "/" + name.removeprefix("./").lstrip("/")
        found: list[tuple[Path, KnownFile]] = []
        for file in self.files.values():
            path = self.path_of(file)
            if path == exact:
                return file
            if path.as_posix().endswith(tail):
                found.append((path, file))
        if len(found) == 1:
            return found[0][1]
        if found:
            shown = ", ".join(printable(path) for path, _ in found[:5])
            raise BadInput(f"{name}: may be {shown}; give more of its path")
        raise BadInput(f"{name}: no such file in the index; `gguf-embed search --files` names some")
