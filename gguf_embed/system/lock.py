"""One run at a time: a file that is locked for as long as a process lives."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gguf_embed.errors import OutputFailed
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable, take

if sys.platform == "win32":
    import msvcrt


class Lock(Closes):
    """Held from here to `close`, or to the end of the process, however that ends."""

    def __init__(self, path: Path, *, what: str) -> None:
        """Take it. Raises OutputFailed where another process holds it; `what` is being locked."""
        self._path = path
        while True:
            try:
                self._file: BinaryIO = path.open("a+b")
            except OSError as error:
                raise OutputFailed(
                    f"{printable(path)}: not written: {error.strerror or error}; check the folder"
                ) from error
            if not _take(self._file):
                with suppress(OSError, ValueError):
                    self._file.seek(0)
                    what += f" (process {int(self._file.read(20))})"
                self._file.close()
                raise OutputFailed(
                    f"{what}: another run is at work there; wait for its end, or name another"
                )
            # Whoever held it before may have removed the name meanwhile.
            with suppress(OSError):
                if os.path.samestat(path.stat(), os.fstat(self._file.fileno())):
                    break
            self._file.close()
        with suppress(OSError):  # a full disk: nobody learns who it is
            self._file.truncate(0)
            self._file.write(str(os.getpid()).encode())
            self._file.flush()

    def close(self) -> None:
        """Let go of it; a second call does nothing."""
        if not self._file.closed:
            with suppress(OSError):
                self._path.unlink()
            with suppress(OSError):
                self._file.close()


def _take(file: BinaryIO) -> bool:
    """Whether nobody else holds the file."""
    if sys.platform != "win32":
        return take(file)
    try:
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
