"""The tables of an index, in SQLite: files, passages, and the words in them.

One transaction takes a batch of files from how they were to how they are, so a reader sees each
file as it was or as it is, and a run that is killed loses its last batch only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, cast

from gguf_embed.index.database import Database, make_database
from gguf_embed.index.facts import Folder, KnownFile, Passage, Selection, StoredPassage, Unread
from gguf_embed.index.rows import FILE_COLUMNS, PASSAGE_COLUMNS, known_file, stored_passage
from gguf_embed.index.word_tables import TOKENIZER
from gguf_embed.index.words import searchable
from gguf_embed.io.folder import FileStamp
from gguf_embed.io.front_matter import Metadata

_SCHEMA: Final = f"""
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
    name, headings, text, content='', tokenize="{TOKENIZER}"
);
"""
# Indexes of the first days have none of these; whoever writes to one adds them. The trigger is for
# versions that know nothing of them.
_METADATA: Final = (
    "CREATE TABLE metadata (key TEXT NOT NULL, value TEXT NOT NULL, file INTEGER NOT NULL)",
    "CREATE INDEX metadata_key ON metadata (key)",
    "CREATE INDEX metadata_file ON metadata (file)",
    "CREATE TRIGGER metadata_gone AFTER DELETE ON files "
    "BEGIN DELETE FROM metadata WHERE file = old.id; END",
)


class Tables(Database):
    """The tables of one generation of an index."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Open what `create` has made, or an earlier version. Raises BadInput."""
        super().__init__(path, writable=writable)
        if writable and not self._has_metadata():
            with self.writing():
                for statement in _METADATA:
                    self.do(statement)

    @classmethod
    def create(cls, path: Path) -> Tables:
        """New, empty tables. Raises OutputFailed."""
        make_database(path, _SCHEMA)
        return cls(path, writable=True)

    # -- facts ---------------------------------------------------------------------------------

    def fact(self, name: str) -> str | None:
        """A value of the index."""
        rows = self.rows("SELECT value FROM facts WHERE name = ?", name)
        return cast(str, rows[0][0]) if rows else None

    def set_fact(self, name: str, value: str) -> None:
        """Keep a value."""
        self.do("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

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
        rows = self.rows("SELECT id, path, about FROM folders ORDER BY id")
        return [Folder(id=id, path=Path(path), about=about) for id, path, about in rows]

    def set_folder(self, path: Path, about: str | None) -> None:
        """Add a folder, or say anew what is in it; None leaves that."""
        self.do("INSERT OR IGNORE INTO folders (path, about) VALUES (?, '')", str(path))
        if about is not None:
            self.do("UPDATE folders SET about = ? WHERE path = ?", about, str(path))

    def remove_folder(self, folder: int) -> None:
        """Forget a folder with all its files."""
        for file in self.files():
            if file.folder == folder:
                self.remove_file(file.id)
        self.do("DELETE FROM unread WHERE folder = ?", folder)
        self.do("DELETE FROM folders WHERE id = ?", folder)

    def files(self) -> list[KnownFile]:
        """All files, sorted by folder and name."""
        rows = self.rows(f"SELECT {FILE_COLUMNS} FROM files ORDER BY folder, name")
        return [known_file(row) for row in rows]

    def add_file(self, file: KnownFile, passages: Sequence[Passage]) -> int:
        """A file, whose own id does not count, with its passages; returns its id here."""
        stamp = file.stamp
        id = self.do(
            "INSERT INTO files (folder, name, digest, n_bytes, mtime_ns, ctime_ns, first_row, "
            "n_rows) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(file.folder, file.name, file.digest),
            *(stamp.n_bytes, stamp.mtime_ns, stamp.ctime_ns, file.first_row, file.n_rows),
        )
        for ordinal, each in enumerate(passages):
            row = self.do(
                "INSERT INTO passages (file, ordinal, digest, start, stop, first_line, last_line, "
                "headings, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(id, ordinal, each.digest, each.start, each.end),
                *(each.first_line, each.last_line, json.dumps(each.headings), each.text),
            )
            self.do(
                "INSERT INTO words (rowid, name, headings, text) VALUES (?, ?, ?, ?)",
                *(row, *_words(file.name, each)),
            )
        return id

    def remove_file(self, file: int) -> None:
        """Forget a file and its passages; its vectors stay where they are, unused."""
        (name,) = self.rows("SELECT name FROM files WHERE id = ?", file)[0]
        for stored in self.passages_of(file):
            self._forget_words(stored, name)
        self.do("DELETE FROM passages WHERE file = ?", file)
        self.do("DELETE FROM files WHERE id = ?", file)

    def move_file(self, file: int, folder: int, name: str, stamp: FileStamp) -> None:
        """Give a file another place; also after its stamp alone has changed."""
        (old,) = self.rows("SELECT name FROM files WHERE id = ?", file)[0]
        self.do(
            "UPDATE files SET folder = ?, name = ?, n_bytes = ?, mtime_ns = ?, ctime_ns = ? "
            "WHERE id = ?",
            *(folder, name, stamp.n_bytes, stamp.mtime_ns, stamp.ctime_ns, file),
        )
        if old != name:
            for stored in self.passages_of(file):
                self._forget_words(stored, old)
                self.do(
                    "INSERT INTO words (rowid, name, headings, text) VALUES (?, ?, ?, ?)",
                    *(stored.row, *_words(name, stored.passage)),
                )

    def _forget_words(self, stored: StoredPassage, name: str) -> None:
        self.do(
            "INSERT INTO words (words, rowid, name, headings, text) VALUES ('delete', ?, ?, ?, ?)",
            *(stored.row, *_words(name, stored.passage)),
        )

    def set_rows(self, file: int, first_row: int) -> None:
        """Say where a file's vectors have gone."""
        self.do("UPDATE files SET first_row = ? WHERE id = ?", first_row, file)

    def unread(self) -> list[Unread]:
        """Files that could not be read."""
        rows = self.rows("SELECT folder, name, reason FROM unread ORDER BY folder, name")
        return [Unread(folder=folder, name=name, reason=reason) for folder, name, reason in rows]

    def set_unread(self, folder: int, unread: Iterable[Unread]) -> None:
        """Say anew which files of a folder could not be read."""
        self.do("DELETE FROM unread WHERE folder = ?", folder)
        for each in unread:
            self.do("INSERT INTO unread VALUES (?, ?, ?)", folder, each.name, each.reason)

    # -- metadata ----------------------------------------------------------------------------------

    def set_metadata(self, file: int, metadata: Metadata) -> None:
        """Say anew what is known of a file beside its text."""
        self.do("DELETE FROM metadata WHERE file = ?", file)
        for key, values in metadata.items():
            for value in values:
                self.do("INSERT INTO metadata VALUES (?, ?, ?)", key, value, file)

    def values_of(self, key: str) -> list[tuple[int, str]]:
        """(file, value) of a key."""
        return self.rows("SELECT file, value FROM metadata WHERE key = ?", key)

    def metadata_keys(self) -> list[str]:
        """All of them, sorted; none where an earlier version has made the index."""
        if not self._has_metadata():
            return []
        rows = self.rows("SELECT DISTINCT key FROM metadata ORDER BY key")
        return [cast(str, key) for (key,) in rows]

    def files_without_metadata(self) -> set[int]:
        """Their ids: what an earlier version has made, and not touched since."""
        rows = self.rows("SELECT id FROM files WHERE id NOT IN (SELECT file FROM metadata)")
        return {id for (id,) in rows}

    def _has_metadata(self) -> bool:
        return bool(self.rows("SELECT 1 FROM sqlite_master WHERE name = 'metadata'"))

    # -- passages ----------------------------------------------------------------------------------

    def rows_of_texts(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """The row of a vector for each text that has one."""
        found: dict[bytes, int] = {}
        for digest in {*digests}:
            rows = self.rows(
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
        rows = self.rows(f"SELECT {PASSAGE_COLUMNS} FROM passages WHERE {where}", *values)
        return [stored_passage(row) for row in rows]

    def optimize(self) -> None:
        """Make the full-text index one piece, after much was written."""
        self.do("INSERT INTO words (words) VALUES ('optimize')")


def _words(name: str, passage: Passage) -> tuple[str, str, str]:
    """What the full-text index gets of a passage: it must be told the same to forget it."""
    return searchable(name), searchable("\n".join(passage.headings)), searchable(passage.text)
