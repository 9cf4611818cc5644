"""A cache of vectors: what was embedded once is not embedded again.

    with VectorCache.open() as cache:
        space = space_of(embedder, prompt="", dimensions=None, normalize=True)
        known = cache.find(space, texts, max_tokens=embedder.n_ctx)  # row -> `Known`
        cache.keep(space, [Entry(text=..., vector=..., n_tokens=...)])

A vector is found by the hash of its text and the fingerprint of its space. Texts that were cut are
not kept: what their vectors mean depends on where they were cut. The cache is one SQLite file.
Several processes and threads may use it at a time. It has a limit: what was not used for the
longest time goes first.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from gguf_embed.errors import BadInput, OutputFailed
from gguf_embed.jobs.cache_file import connected
from gguf_embed.jobs.cached import CacheUse, Entry, Known, Space, SpaceUse
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable
from gguf_embed.system.kept import keep, read_kept
from gguf_embed.system.paths import home

_log = logging.getLogger(__name__)

LIMIT_BYTES: Final = 2 << 30  # of a cache of which nobody says how large it may be
_LOOKED_UP_TOGETHER: Final = 500  # SQLite takes at most 999 values in the oldest builds
_FRESH_S: Final = 86_400  # a use is noted once a day: a note is a write
_ROW_BYTES: Final = 80  # of a row beside its vector, both indexes included


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    path: str


def cache_path() -> Path:
    """Where the user's cache is: in the package's own folder, unless it was moved."""
    moved = read_kept(_pointer(), _Place)
    return home() / "vectors.sqlite" if moved is None else Path(moved.path)


class VectorCache(Closes):
    """See the file's text. Safe to use from several threads and processes.

    Where it cannot be read or written in the middle of the work, the log says so once, and it
    behaves as an empty one.
    """

    def __init__(
        self, path: Path, connection: sqlite3.Connection, clock: Callable[[], float]
    ) -> None:
        """Use `VectorCache.open`; the connection becomes this object's to close."""
        self.path = path
        self._connection = connection
        self._clock = clock
        self._lock = threading.RLock()
        self._failed = False

    @classmethod
    def open(
        cls, path: Path | None = None, *, clock: Callable[[], float] = time.time
    ) -> VectorCache:
        """The cache at `path`, else the user's; it is made where there is none.

        Raises BadInput for a file that is something else, OutputFailed where none can be made.
        """
        path = path or cache_path()
        return cls(path, connected(path), clock)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        with self._lock:
            self._connection.close()
            self._failed = True

    def find(self, space: Space, texts: Sequence[str], *, max_tokens: int) -> dict[int, Known]:
        """The vectors that are known, by position; only of texts of at most `max_tokens`."""
        with self._lock:
            if self._failed:
                return {}
            try:
                return self._find(space, texts, max_tokens)
            except sqlite3.Error as error:
                self._give_up(error)
                return {}

    def keep(self, space: Space, entries: Iterable[Entry]) -> None:
        """Keep vectors, all or none of them; the ones that were not used for longest may go."""
        with self._lock:
            if self._failed:
                return
            try:
                self._keep(space, entries)
            except sqlite3.Error as error:
                self._give_up(error)

    def use(self) -> CacheUse:
        """What is in it. Raises BadInput where it cannot be read."""
        with self._strict():
            rows = self._connection.execute(
                "SELECT s.fingerprint, s.dim, s.label, count(*), max(v.used_at) FROM vectors v "
                "JOIN spaces s ON s.number = v.space GROUP BY s.number ORDER BY 4 DESC, 1"
            ).fetchall()
            return CacheUse(
                path=self.path,
                n_bytes=self._used_bytes(),
                limit_bytes=self._limit(),
                spaces=tuple(
                    SpaceUse(
                        space=Space(fingerprint=fingerprint, dim=dim, label=label),
                        n_vectors=n,
                        n_bytes=n * (4 * dim + _ROW_BYTES),
                        used_at=used_at,
                    )
                    for fingerprint, dim, label, n, used_at in rows
                ),
            )

    def set_limit(self, limit_bytes: int) -> None:
        """From now on it takes at most so much; what is more goes at once."""
        with self._strict():
            with self._transaction():
                self._connection.execute(
                    "INSERT OR REPLACE INTO facts VALUES ('limit_bytes', ?)", (limit_bytes,)
                )
                self._shrink(limit_bytes)
            self._give_back()

    def prune(
        self,
        *,
        to_bytes: int | None = None,
        unused_s: float | None = None,
        space: str | None = None,
    ) -> int:
        """Forget what was not used for `unused_s`, one space, and the oldest beyond `to_bytes`.

        Returns how many vectors went. Raises BadInput where the cache cannot be changed.
        """
        with self._strict():
            before = self._n_vectors()
            with self._transaction():
                if unused_s is not None:
                    self._connection.execute(
                        "DELETE FROM vectors WHERE used_at < ?", (int(self._clock() - unused_s),)
                    )
                if space is not None:
                    self._connection.execute(
                        "DELETE FROM vectors WHERE space IN "
                        "(SELECT number FROM spaces WHERE fingerprint = ?)",
                        (space,),
                    )
                if to_bytes is not None:
                    self._shrink(to_bytes)
                self._connection.execute(
                    "DELETE FROM spaces WHERE number NOT IN (SELECT space FROM vectors)"
                )
            self._give_back()
            return before - self._n_vectors()

    def move(self, target: Path) -> Path:
        """Copy it to another file, which is used from now on; remove this one, and close it.

        In a folder that is there it keeps its name; returns where it is. Raises OutputFailed,
        BadInput; then the old one stays in use.
        """
        target = target.absolute()
        if target.is_dir():
            target /= self.path.name
        shown = printable(target)
        if target.exists():
            raise OutputFailed(f"{shown}: is there already; name a file that is not")
        try:
            with self._strict():
                copy = sqlite3.connect(target)
                try:
                    self._connection.backup(copy)
                finally:
                    copy.close()
            if not keep(_pointer(), _Place(path=str(target))):
                raise OutputFailed(f"{printable(_pointer())}: cannot be written; the cache stays")
        except BaseException:
            _remove(target)
            raise
        self.close()
        _remove(self.path)
        return target

    def _give_up(self, error: sqlite3.Error) -> None:
        """A cache that fails is no reason to end the work."""
        self._failed = True
        _log.warning(
            "%s: the cache of vectors is not used any more: %s", printable(self.path), error
        )

    def _find(self, space: Space, texts: Sequence[str], max_tokens: int) -> dict[int, Known]:
        places: dict[bytes, list[int]] = {}
        for row, text in enumerate(texts):
            places.setdefault(_key(space, text), []).append(row)
        known: dict[int, Known] = {}
        now = int(self._clock())
        stale: list[bytes] = []
        for keys in _batches(places, _LOOKED_UP_TOGETHER):
            marks = ",".join("?" * len(keys))
            columns = "content, n_tokens, used_at, vector"
            query = f"SELECT {columns} FROM vectors WHERE content IN ({marks})"
            rows = self._connection.execute(query, keys)
            for content, n_tokens, used_at, data in rows:
                vector = np.frombuffer(data, "<f4")
                if n_tokens > max_tokens or vector.shape != (space.dim,):
                    continue
                known |= dict.fromkeys(places[content], Known(vector=vector, n_tokens=n_tokens))
                if now - used_at > _FRESH_S:
                    stale.append(content)
        if stale:
            with self._transaction():
                self._connection.executemany(
                    "UPDATE vectors SET used_at = ? WHERE content = ?",
                    [(now, content) for content in stale],
                )
        return known

    def _keep(self, space: Space, entries: Iterable[Entry]) -> None:
        now = int(self._clock())
        with self._transaction():
            self._connection.execute(
                "INSERT OR IGNORE INTO spaces (fingerprint, dim, label) VALUES (?, ?, ?)",
                (space.fingerprint, space.dim, space.label),
            )
            number = self._number(
                "SELECT number FROM spaces WHERE fingerprint = ?", space.fingerprint
            )
            # What is known stays: the next run gets the same bits as the last.
            self._connection.executemany(
                "INSERT OR IGNORE INTO vectors VALUES (?, ?, ?, ?, ?)",
                (
                    (
                        _key(space, entry.text),
                        number,
                        entry.n_tokens,
                        now,
                        np.ascontiguousarray(entry.vector, "<f4").tobytes(),
                    )
                    for entry in entries
                ),
            )
            limit = self._limit()
            if self._used_bytes() > limit:
                self._shrink(limit * 9 // 10)

    @contextmanager
    def _strict(self) -> Generator[None]:
        """For what a person asked for."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise BadInput(
                    f"{printable(self.path)}: the cache of vectors cannot be read or changed: "
                    f"{error}; make room on its disk, or remove it"
                ) from error

    @contextmanager
    def _transaction(self) -> Generator[None]:
        """All or nothing; other processes wait, and readers see the old state."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have done so itself
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _shrink(self, to_bytes: int) -> None:
        """Forget the oldest, until what is left takes at most so much."""
        while (n := self._n_vectors()) and (over := self._used_bytes() - to_bytes) > 0:
            share = min(1.0, over / self._used_bytes())
            self._connection.execute(
                "DELETE FROM vectors WHERE content IN "
                "(SELECT content FROM vectors ORDER BY used_at, rowid LIMIT ?)",
                (max(1, int(n * share)),),
            )

    def _give_back(self) -> None:
        """Make the file as small as what is in it."""
        # `execute` takes the first step only.
        self._connection.executescript("PRAGMA incremental_vacuum")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _used_bytes(self) -> int:
        pages = self._number("PRAGMA page_count") - self._number("PRAGMA freelist_count")
        return pages * self._number("PRAGMA page_size")

    def _limit(self) -> int:
        row = self._connection.execute(
            "SELECT value FROM facts WHERE name = 'limit_bytes'"
        ).fetchone()
        return LIMIT_BYTES if row is None else int(row[0])

    def _n_vectors(self) -> int:
        return self._number("SELECT count(*) FROM vectors")

    def _number(self, query: str, *values: object) -> int:
        return int(self._connection.execute(query, values).fetchone()[0])


def _key(space: Space, text: str) -> bytes:
    """The hash of a text in a space."""
    digest = hashlib.sha256(f"{space.fingerprint}\0".encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()[:16]


def _batches(keys: Iterable[bytes], n: int) -> Iterator[list[bytes]]:
    rest = iter(keys)
    while batch := list(islice(rest, n)):
        yield batch


def _pointer() -> Path:
    return home() / "vectors-moved.json"


def _remove(path: Path) -> None:
    """The file, and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        with suppress(OSError):
            path.with_name(path.name + suffix).unlink()
