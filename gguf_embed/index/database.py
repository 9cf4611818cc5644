"""A SQLite file of an index: its transactions, and its errors in our words."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

from gguf_embed.errors import BadInput, OutputFailed
from gguf_embed.index.facts import FORMAT
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable

BUSY_S: Final = 30.0  # a writer's commit takes far less


class Database(Closes):
    """Any thread may ask, one at a time is served."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Open a file of `made`. Raises BadInput."""
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
            self.rows("BEGIN")
            try:
                self.rows("SELECT count(*) FROM facts")  # the moment is now
                yield
            finally:
                with suppress(sqlite3.Error):
                    self._database.execute("COMMIT")

    def version(self) -> int:
        """Another number after another process has written."""
        return cast(int, self.rows("PRAGMA data_version")[0][0])

    def copy_to(self, path: Path) -> None:
        """A copy without holes. Raises OutputFailed."""
        try:
            with self._lock:
                self._database.execute("VACUUM INTO ?", (str(path),))
        except sqlite3.Error as error:
            raise OutputFailed(f"{printable(path)}: not written: {error}") from error

    def rows(self, query: str, *values: object) -> list[Any]:
        """What a query gives. Raises BadInput."""
        with self._lock, self._asking():
            return self._database.execute(query, values).fetchall()

    def do(self, statement: str, *values: object) -> int:
        """Inside `writing`; returns the id of what was inserted."""
        return self._database.execute(statement, values).lastrowid or 0

    @contextmanager
    def _asking(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise BadInput(
                f"{printable(self.path)}: cannot be read: {error}; make the index anew with "
                "--rebuild"
            ) from error


def make_database(path: Path, schema: str) -> None:
    """A new file with empty tables. Raises OutputFailed."""
    try:
        database = sqlite3.connect(path)
        try:
            # In one transaction: all or none of it, and waiting for the disk once, not per table.
            database.executescript(f"BEGIN; {schema} PRAGMA user_version = {FORMAT}; COMMIT;")
        finally:
            database.close()
    except sqlite3.Error as error:
        raise OutputFailed(f"{printable(path)}: not made: {error}") from error
