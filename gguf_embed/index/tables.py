"""The tables of an index, in SQLite: files, passages, and the words in them.

One transaction takes a batch of files from how they were to how they are, so a reader sees each
file as it was or as it is, and a run that is killed loses its last batch only.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

from gguf_embed.errors import BadInput, OutputFailed
from gguf_embed.index.facts import (
    FORMAT,
    Folder,
    KnownFile,
    Passage,
    Selection,
    StoredPassage,
    Unread,
)
from gguf_embed.index.rows import FILE_COLUMNS, PASSAGE_COLUMNS, known_file, stored_passage
from gguf_embed.index.words import searchable
from gguf_embed.io.folder import FileStamp
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable

BUSY_S: Final = 30.0  # a writer's commit takes far less

_SCHEMA: Final = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE folders (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, about TEXT NOT NULL);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, folder INTEGER NOT NULL, name TEXT NOT NULL, digest BLOB NOT NULL,
    n_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    first_row INTEGER NOT NULL, n_rows INTEGER NOT NULL, UNIQUE (folder, name)
);
CREATE TABLE passages (
    id INTEGER PRIMARY KEY, file INTEGER NOT NULL, ordinal INTEGER NOT NULL,
    digest BLOB NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    first_line INTEGER NOT NULL, last_line INTEGER NOT NULL, headings TEXT NOT NULL,
    text TEXT NOT NULL, UNIQUE (file, ordinal)
);
CREATE INDEX passages_digest ON passages (digest);
CREATE TABLE unread (folder INTEGER NOT NULL, name TEXT NOT NULL, reason TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (
    name, headings, text, content='', tokenize="porter unicode61 remove_diacritics 2"
);
"""


class Tables(Closes):
    """The tables of one generation of an index; any thread may ask, one at a time is served."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Open what `Tables.create` has made. Raises BadInput."""
        self.path = path
        self._lock = threading.RLock()
        mode = "rw" if writable else "ro"
        with self._asking():
            self._database = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                self._database.close()
                raise BadInput(
                    f"{printable(path)}: is of format {version}, this version of gguf-embed reads "
                    f"{FORMAT}; make the index anew with --rebuild"
                )
            if writable:
                # Readers go on while a batch is written.
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = FULL")

    @classmethod
    def create(cls, path: Path) -> Tables:
        """New, empty tables. Raises OutputFailed."""
        try:
            database = sqlite3.connect(path)
            try:
                database.executescript(f"{_SCHEMA} PRAGMA user_version = {FORMAT};")
            finally:
                database.close()
        except sqlite3.Error as error:
            raise OutputFailed(f"{printable(path)}: not made: {error}") from error
        return cls(path, writable=True)

    def close(self) -> None:
        """Close; what was written becomes one file, which a read-only disk can hold."""
        with self._lock, suppress(sqlite3.Error):
            self._database.execute("PRAGMA busy_timeout = 0")
            self._database.execute("PRAGMA journal_mode = DELETE")
        with self._lock:
            self._database.close()

    @contextmanager
    def writing(self) -> Generator[None]:
        """One transaction. Raises OutputFailed, and then nothing of it has happened."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise OutputFailed(
                    f"{printable(self.path)}: not written: {error}; the index is as it was"
                ) from error

    @contextmanager
    def reading(self) -> Generator[None]:
        """All that is asked inside sees the index of one moment. Raises BadInput."""
        with self._lock:
            self._rows("BEGIN")
            try:
                self._rows("SELECT count(*) FROM facts")  # the moment is now
                yield
            finally:
                with suppress(sqlite3.Error):
                    self._database.execute("COMMIT")

    def version(self) -> int:
        """Another number after another process has written."""
        return cast(int, self._rows("PRAGMA data_version")[0][0])

    # -- facts ---------------------------------------------------------------------------------

    def fact(self, name: str) -> str | None:
        """A value of the index."""
        rows = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return cast(str, rows[0][0]) if rows else None

    def set_fact(self, name: str, value: str) -> None:
        """Keep a value."""
        self._do("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    def n_rows(self) -> int:
        """How many vectors count, those of passages that are gone included."""
        return int(self.fact("n_rows") or 0)

    def selection(self) -> Selection:
        """Which files are taken."""
        kept = json.loads(self.fact("selection") or "{}")
        return Selection(
            include=tuple(kept.get("include", ())),
            exclude=tuple(kept.get("exclude", ())),
            gitignore=kept.get("gitignore", True),
        )

    def set_selection(self, selection: Selection) -> None:
        """Keep which files are taken."""
        kept = {
            "include": selection.include,
            "exclude": selection.exclude,
            "gitignore": selection.gitignore,
        }
        self.set_fact("selection", json.dumps(kept))

    # -- folders and files -------------------------------------------------------------------------

    def folders(self) -> list[Folder]:
        """All folders, in the order in which they came."""
        rows = self._rows("SELECT id, path, about FROM folders ORDER BY id")
        return [Folder(id=id, path=Path(path), about=about) for id, path, about in rows]

    def set_folder(self, path: Path, about: str | None) -> None:
        """Add a folder, or say anew what is in it; None leaves that."""
        self._do("INSERT OR IGNORE INTO folders (path, about) VALUES (?, '')", str(path))
        if about is not None:
            self._do("UPDATE folders SET about = ? WHERE path = ?", about, str(path))

    def remove_folder(self, folder: int) -> None:
        """Forget a folder with all its files."""
        for file in self.files():
            if file.folder == folder:
                self.remove_file(file.id)
        self._do("DELETE FROM unread WHERE folder = ?", folder)
        self._do("DELETE FROM folders WHERE id = ?", folder)

    def files(self) -> list[KnownFile]:
        """All files, sorted by folder and name."""
        rows = self._rows(f"SELECT {FILE_COLUMNS} FROM files ORDER BY folder, name")
        return [known_file(row) for row in rows]

    def add_file(self, file: KnownFile, passages: Sequence[Passage]) -> None:
        """A file, whose own id does not count, with its passages."""
        stamp = file.stamp
        id = self._do(
            "INSERT INTO files (folder, name, digest, n_bytes, mtime_ns, ctime_ns, first_row, "
            "n_rows) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(file.folder, file.name, file.digest),
            *(stamp.n_bytes, stamp.mtime_ns, stamp.ctime_ns, file.first_row, file.n_rows),
        )
        for ordinal, each in enumerate(passages):
            row = self._do(
                "INSERT INTO passages (file, ordinal, digest, start, stop, first_line, last_line, "
                "headings, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(id, ordinal, each.digest, each.start, each.end),
                *(each.first_line, each.last_line, json.dumps(each.headings), each.text),
            )
            self._do(
                "INSERT INTO words (rowid, name, headings, text) VALUES (?, ?, ?, ?)",
                *(row, *_words(file.name, each)),
            )

    def remove_file(self, file: int) -> None:
        """Forget a file and its passages; its vectors stay where they are, unused."""
        (name,) = self._rows("SELECT name FROM files WHERE id = ?", file)[0]
        for stored in self.passages_of(file):
            self._forget_words(stored, name)
        self._do("DELETE FROM passages WHERE file = ?", file)
        self._do("DELETE FROM files WHERE id = ?", file)

    def move_file(self, file: int, folder: int, name: str, stamp: FileStamp) -> None:
        """Give a file another place; also after its stamp alone has changed."""
        (old,) = self._rows("SELECT name FROM files WHERE id = ?", file)[0]
        self._do(
            "UPDATE files SET folder = ?, name = ?, n_bytes = ?, mtime_ns = ?, ctime_ns = ? "
            "WHERE id = ?",
            *(folder, name, stamp.n_bytes, stamp.mtime_ns, stamp.ctime_ns, file),
        )
        if old != name:
            for stored in self.passages_of(file):
                self._forget_words(stored, old)
                self._do(
                    "INSERT INTO words (rowid, name, headings, text) VALUES (?, ?, ?, ?)",
                    *(stored.row, *_words(name, stored.passage)),
                )

    def _forget_words(self, stored: StoredPassage, name: str) -> None:
        self._do(
            "INSERT INTO words (words, rowid, name, headings, text) VALUES ('delete', ?, ?, ?, ?)",
            *(stored.row, *_words(name, stored.passage)),
        )

    def set_rows(self, file: int, first_row: int) -> None:
        """Say where a file's vectors have gone."""
        self._do("UPDATE files SET first_row = ? WHERE id = ?", first_row, file)

    def unread(self) -> list[Unread]:
        """Files that could not be read."""
        rows = self._rows("SELECT folder, name, reason FROM unread ORDER BY folder, name")
        return [Unread(folder=folder, name=name, reason=reason) for folder, name, reason in rows]

    def set_unread(self, folder: int, unread: Iterable[Unread]) -> None:
        """Say anew which files of a folder could not be read."""
        self._do("DELETE FROM unread WHERE folder = ?", folder)
        for each in unread:
            self._do("INSERT INTO unread VALUES (?, ?, ?)", folder, each.name, each.reason)

    # -- passages ----------------------------------------------------------------------------------

    def rows_of_texts(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """The row of a vector for each text that has one."""
        found: dict[bytes, int] = {}
        for digest in {*digests}:
            rows = self._rows(
                "SELECT first_row + ordinal FROM passages JOIN files ON files.id = file "
                "WHERE passages.digest = ? LIMIT 1",
                digest,
            )
            if rows:
                found[digest] = rows[0][0]
        return found

    def passages_of(self, file: int, first: int = 0, last: int = 1 << 31) -> list[StoredPassage]:
        """The passages of a file, in order."""
        return self._passages(
            "file = ? AND ordinal BETWEEN ? AND ? ORDER BY ordinal", file, first, last
        )

    def passages_at(
        self, places: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], StoredPassage]:
        """Passages by (file, ordinal)."""
        found: dict[tuple[int, int], StoredPassage] = {}
        for place in places:
            for each in self._passages("file = ? AND ordinal = ?", *place):
                found[place] = each
        return found

    def passages_with(self, first: bytes, last: bytes) -> list[StoredPassage]:
        """Those whose digest is between two."""
        return self._passages("digest BETWEEN ? AND ? ORDER BY id LIMIT 20", first, last)

    def _passages(self, where: str, *values: object) -> list[StoredPassage]:
        rows = self._rows(f"SELECT {PASSAGE_COLUMNS} FROM passages WHERE {where}", *values)
        return [stored_passage(row) for row in rows]

    # -- words -------------------------------------------------------------------------------------

    def has_more(self, phrase: str, n: int) -> bool:
        """Whether more than `n` passages hold a phrase."""
        query = "SELECT rowid FROM words WHERE words MATCH ? LIMIT 1 OFFSET ?"
        return bool(self._rows(query, phrase, n))

    def best_by_words(
        self, expression: str, n: int | None, files: Sequence[int] | None
    ) -> list[tuple[int, int, float]]:
        """(file, ordinal, BM25) of the passages that match best, the best first.

        `files` None: of all.
        """
        limit = -1 if n is None else n
        if files is None:
            query = (
                "SELECT file, ordinal, score FROM (SELECT rowid AS found, rank AS score FROM words "
                "WHERE words MATCH ? ORDER BY rank LIMIT ?) JOIN passages ON passages.id = found "
                "ORDER BY score"
            )
            rows = self._rows(query, expression, limit)
        else:
            chosen = ",".join(str(int(file)) for file in files)
            query = (
                "SELECT file, ordinal, rank FROM words JOIN passages ON passages.id = words.rowid "
                f"WHERE words MATCH ? AND file IN ({chosen}) ORDER BY rank LIMIT ?"
            )
            rows = self._rows(query, expression, limit)
        return [(file, ordinal, -score) for file, ordinal, score in rows]

    def optimize(self) -> None:
        """Make the full-text index one piece, after much was written."""
        self._do("INSERT INTO words (words) VALUES ('optimize')")

    def copy_to(self, path: Path) -> None:
        """A copy without holes. Raises OutputFailed."""
        try:
            with self._lock:
                self._database.execute("VACUUM INTO ?", (str(path),))
        except sqlite3.Error as error:
            raise OutputFailed(f"{printable(path)}: not written: {error}") from error

    # -- SQLite ------------------------------------------------------------------------------------

    @contextmanager
    def _asking(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise BadInput(
                f"{printable(self.path)}: cannot be read: {error}; make the index anew with "
                "--rebuild"
            ) from error

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock, self._asking():
            return self._database.execute(query, values).fetchall()

    def _do(self, statement: str, *values: object) -> int:
        """Inside `writing`; returns the id of what was inserted."""
        return self._database.execute(statement, values).lastrowid or 0


def _words(name: str, passage: Passage) -> tuple[str, str, str]:
    """What the full-text index gets of a passage: it must be told the same to forget it."""
    return searchable(name), searchable("\n".join(passage.headings)), searchable(passage.text)
