"""Memory that a process shares with its child: numbers go through it, not through a pipe.

A segment is a file that both have mapped. Its name is gone as soon as both have, so that nothing is
left of it whatever happens to them.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import DoesNotFit
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import free_bytes, printable

_MEMORY: Final = Path("/dev/shm")  # noqa: S108  (a folder of our own in it)
_LEAST_BYTES: Final = 1 << 20


class Segment:
    """One file, mapped. Used by one call at a time."""

    def __init__(self, path: Path) -> None:
        """Map the whole of an existing file."""
        self.path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.n_bytes = len(self._map)
        self._named = True

    def close(self) -> None:
        """Give the memory back; arrays over it must be gone."""
        with suppress(BufferError):
            self._map.close()

    def unname(self) -> None:
        """Nobody else is to map it."""
        if self._named:
            self.path.unlink(missing_ok=True)
            self._named = False

    def tokens(self, n: int) -> npt.NDArray[np.int32]:
        """The first n numbers as token ids, in place."""
        return np.frombuffer(self._map, np.int32, n)

    def vectors(self, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """The first numbers as vectors, in place."""
        return np.frombuffer(self._map, np.float32, shape[0] * shape[1]).reshape(shape)


class Segments(Closes):
    """The segments of one child: made when needed, used again. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Segment] = []
        self._folders: list[TemporaryDirectory[str]] = []
        self._n_made = 0

    @contextmanager
    def taken(self, n_bytes: int) -> Generator[Segment]:
        """A segment of at least so many bytes, nobody else's meanwhile. Raises DoesNotFit."""
        with self._lock:
            fitting = [segment for segment in self._free if segment.n_bytes >= n_bytes]
            segment = min(fitting, key=lambda each: each.n_bytes) if fitting else None
            if segment is not None:
                self._free.remove(segment)
        if segment is None:
            segment = self._made(1 << max(n_bytes, _LEAST_BYTES).bit_length())
        try:
            yield segment
        finally:
            with self._lock:
                self._free.append(segment)

    def close(self) -> None:
        """Remove what still has a name."""
        with self._lock:
            for segment in self._free:
                segment.close()
            self._free.clear()
            for folder in self._folders:
                folder.cleanup()
            self._folders.clear()

    def _made(self, n_bytes: int) -> Segment:
        with self._lock:
            if not self._folders:
                places = (_MEMORY, None) if _MEMORY.is_dir() else (None,)
                self._folders += [
                    TemporaryDirectory(prefix="gguf-embed-", dir=place, ignore_cleanup_errors=True)
                    for place in places
                    if place is None or os.access(place, os.W_OK)
                ]
            self._n_made += 1
            name = f"{self._n_made}.segment"
        for folder in self._folders:
            path = Path(folder.name) / name
            try:
                with path.open("wb") as file:
                    # Reserved now: a page that cannot be had later is a SIGBUS.
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, n_bytes)
                    else:
                        file.truncate(n_bytes)
                return Segment(path)
            except OSError:
                path.unlink(missing_ok=True)
        last = Path(self._folders[-1].name)
        raise DoesNotFit(
            f"the child process that computes gives {n_bytes:,} bytes of vectors, for which there "
            f"is no room in {printable(last)}; make room, or set TMPDIR to another disk",
            needed_bytes=n_bytes,
            free_bytes=free_bytes(last) or 0,
        )
