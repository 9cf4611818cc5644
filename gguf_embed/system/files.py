"""Files that appear whole or not at all: the only place that opens a temporary file for writing.

    with WholeFile(path) as whole:
        whole.file.write(data)
        whole.commit()  # on disk, then in place; without it nothing has happened

A run that was killed leaves a hidden temporary file. The next run that writes the same file
removes it. A lock on the temporary file tells whether its writer is alive.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gguf_embed.errors import DoesNotFit, OutputFailed
from gguf_embed.system.closing import Closes

if sys.platform != "win32":
    import fcntl

MIB = 2**20


class WholeFile(Closes):
    """A binary file that takes its name only when it is complete; discarded by default.

    It is written in the directory of its target, synced, then renamed. A symbolic link keeps
    pointing where it does: the file that it names is replaced. The file obeys the umask.
    """

    def __init__(self, path: Path, *, shown: str | None = None) -> None:
        """Begin; `shown` is how messages call the file. Raises OutputFailed."""
        self.path = Path(os.path.realpath(path))
        self.shown = shown or printable(path)
        clear_leftovers(self.path)
        with self.writing():
            if self.path.exists() and not self.path.is_file():
                raise OutputFailed(
                    f"{self.shown}: is a directory or a device, not a file; choose another name"
                )
            self._create()

    def _create(self) -> None:
        """A new hidden file in the directory of the target, locked as long as it is open."""
        while True:
            name = f".{self.path.name}.{os.urandom(4).hex()}.tmp"
            self.temporary = self.path.with_name(name)
            # Before the file is there: a signal may end the run between any two steps.
            self._finalize = weakref.finalize(self, _unlink, self.temporary, os.getpid())
            self.file: BinaryIO = self.temporary.open("xb")
            # Between making and locking, another run may have taken it for a leftover.
            if take(self.file) and self.temporary.exists():
                return
            self.file.close()
            self._drop()

    def sync(self) -> None:
        """Send all bytes to disk: a commit after it has little left to fail on."""
        with self.writing():
            self.file.flush()
            os.fsync(self.file.fileno())

    def commit(self) -> None:
        """Sync the bytes to disk and put the file in its place. Raises OutputFailed."""
        self.sync()
        with self.writing():
            if sys.platform == "win32":  # an open file cannot be renamed there
                self.file.close()
            self.temporary.replace(self.path)
            sync_directory(self.path.parent)
        self.close()

    def close(self) -> None:
        """Remove what was not committed; a second call does nothing."""
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses
            self.file.close()
        self._drop()

    def _drop(self) -> None:
        _unlink(self.temporary, os.getpid())
        self._finalize.detach()  # after it: a signal in between leaves that to the finalizer

    @contextmanager
    def writing(self) -> Generator[None]:
        """Turns an OSError inside into OutputFailed with the numbers and the next step."""
        try:
            yield
        except OSError as error:
            raise OutputFailed(self._refusal(error)) from error

    def _refusal(self, error: OSError) -> str:
        reason = f"{self.shown}: not written: {error.strerror or error}"
        step = "choose another name, or check the permission of its directory"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            step = "make room, or choose another disk"
            with suppress(OSError, AttributeError):
                n_bytes = self.temporary.stat().st_size
                free = shutil.disk_usage(self.path.parent).free
                reason += f" after {n_bytes} bytes, {free} bytes free on that disk"
        elif error.errno == errno.ENOENT:
            step = f"make its directory first: mkdir -p {Path(self.shown).parent}"
        with suppress(OSError):
            if self.path.exists():
                step += "; the older file of that name is unchanged"
        return f"{reason}; {step}"


def write_whole(path: Path, data: bytes | str, *, make_folder: bool = False) -> None:
    """Write a small file at one stroke, text as UTF-8. Raises OutputFailed."""
    if make_folder:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputFailed(
                f"{printable(path.parent)}: cannot be made: {error.strerror or error}"
            ) from error
    with WholeFile(path) as whole:
        with whole.writing():
            whole.file.write(data.encode() if isinstance(data, str) else data)
        whole.commit()


@contextmanager
def whole_folder(target: Path) -> Generator[Path]:
    """A folder to fill beside `target`; it takes that name at the end and is gone on failure.

    `target` is absent or an empty folder. Raises OutputFailed where it cannot take the name.
    """
    # The same name every time, so that a run that was killed leaves no more than the next clears.
    folder = target.with_name(f".{target.name}.incomplete")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
        except OSError as error:
            raise OutputFailed(
                f"{printable(target)}: not written: {error.strerror or error}"
            ) from error
        yield folder
        try:
            _rename(folder, target)
        except OSError as error:
            raise OutputFailed(
                f"{printable(target)}: cannot take its name: {error.strerror or error}"
            ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place_folder(folder: Path, target: Path) -> None:
    """Send a folder that another library has filled to disk, then give it the name `target`.

    `target` is absent or an empty folder. Raises OutputFailed; `folder` stays then.
    """
    try:
        for path in (*folder.rglob("*"), folder):
            if path.is_dir():
                sync_directory(path)
            else:
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        _rename(folder, target)
    except OSError as error:
        raise OutputFailed(
            f"{printable(target)}: not written: {error.strerror or error}; check its folder"
        ) from error


def _rename(folder: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        target.rmdir()  # empty: an empty folder cannot be renamed over on every system
    folder.rename(target)
    sync_directory(target.parent)


def clear_leftovers(path: Path) -> int:
    """Remove what runs that were killed left of `path`; returns how many files went."""
    n_removed = 0
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        with suppress(OSError), leftover.open("r+b") as file:
            if take(file):
                leftover.unlink()
                n_removed += 1
    return n_removed


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of `folder` or, before it is made, of its nearest parent."""
    for place in (folder.absolute(), *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def check_free(n_bytes: int, folder: Path, what: str, step: str = "make room") -> None:
    """Refuse to begin what the disk of `folder` cannot hold. Raises DoesNotFit."""
    free = free_bytes(folder)
    if free is not None and n_bytes > free:
        raise DoesNotFit(
            f"{what} takes {n_bytes / MIB:,.0f} MiB, the disk of {printable(folder)} has "
            f"{free / MIB:,.0f} MiB free; {step}",
            needed_bytes=n_bytes,
            free_bytes=free,
        )


def sync_directory(path: Path) -> None:
    """Make a rename last through a power cut, where the system lets directories be synced."""
    if os.name != "posix":
        return
    with suppress(OSError):  # some file systems refuse; the rename itself has been done
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def printable(path: Path) -> str:
    """A path as a message can show it: bytes that are no text are escaped."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # characters that no file name of this system can hold
        return str(path).encode("utf-8", "backslashreplace").decode()


def _unlink(path: Path, owner: int) -> None:
    """Remove a temporary file, unless this process is a fork of the one that writes it."""
    if os.getpid() == owner:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def take(file: BinaryIO) -> bool:
    """Lock a file for this process; False where another holds it. Windows has its own way.

    Where a file system has no locks, nobody holds it.
    """
    if sys.platform == "win32":
        return True  # a file that is open cannot be unlinked there
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
