"""The SQLite file of the cache of vectors: made, opened, and known from others."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Final

from gguf_embed.errors import BadInput, OutputFailed
from gguf_embed.system.files import printable

_MARK: Final = 0x47454356  # "GECV": SQLite's application id of such a file
_VERSION: Final = 1
_SCHEMA: Final = f"""
PRAGMA auto_vacuum = INCREMENTAL;
BEGIN IMMEDIATE;
CREATE TABLE spaces (
    number INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, dim INTEGER NOT NULL,
    label TEXT NOT NULL);
CREATE TABLE vectors (
    content BLOB PRIMARY KEY, space INTEGER NOT NULL, n_tokens INTEGER NOT NULL,
    used_at INTEGER NOT NULL, vector BLOB NOT NULL);
CREATE INDEX by_use ON vectors (used_at, space);
CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
PRAGMA application_id = {_MARK};
PRAGMA user_version = {_VERSION};
COMMIT;
"""


def connected(path: Path) -> sqlite3.Connection:
    """The file at `path`, made where there is none.

    Raises BadInput for a file that is something else, OutputFailed where none can be made.
    """
    shown = printable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputFailed(f"{shown}: its folder cannot be made: {reason}") from error
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(
            path, timeout=30, isolation_level=None, check_same_thread=False
        )
        _prepare(connection, shown)
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise OutputFailed(
                f"{shown}: the cache of vectors cannot be used: {error}; check its folder, or "
                "choose another with `gguf-embed cache move FILE`"
            ) from error
        if isinstance(error, sqlite3.DatabaseError):
            raise BadInput(
                f"{shown}: is no cache of vectors, or a damaged one ({error}); remove it"
            ) from error
        raise
    return connection


def _prepare(connection: sqlite3.Connection, shown: str) -> None:
    """Make the tables of a new file; refuse another's. Raises BadInput, sqlite3.Error."""
    mark = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        try:
            connection.executescript(_SCHEMA)
        except sqlite3.OperationalError:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            # Another process was first.
            if connection.execute("PRAGMA application_id").fetchone()[0] != _MARK:
                raise
    elif mark != _MARK:
        raise BadInput(f"{shown}: is a database of something else; name another file")
    elif version != _VERSION:
        raise BadInput(
            f"{shown}: is a cache of version {version}, this gguf-embed knows {_VERSION}; remove it"
        )
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("PRAGMA synchronous = NORMAL")
