"""Where a job's shards lie: a folder that one run at a time fills, each file whole or not at all.

    part-00000.parquet, part-00001.parquet, ...
    manifest.jsonl      what is done; a line is added when its shard is on disk
    failed.jsonl        rows without a vector, once all is done

After a kill a shard whose line is missing is made again. Nothing that is written tells when or how
often a run was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from gguf_embed.errors import BadOption, OutputFailed
from gguf_embed.jobs import manifest
from gguf_embed.jobs.manifest import FailedPlace, Header, ShardEntry
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable, sync_directory, write_whole
from gguf_embed.system.lock import Lock

FAILED: str = "failed.jsonl"
_LOCK = ".lock"


class JobOutput(Closes):
    """A folder of shards, locked. `header` may be an older run's, whose work goes on."""

    def __init__(
        self,
        folder: Path,
        header: Header,
        lock: Lock,
        old: tuple[ShardEntry, ...],
    ) -> None:
        """Use `open_output`."""
        self.folder = folder
        self.header = header
        self._lock = lock
        self._old = {entry.index: entry for entry in old}  # that may be used again
        self._entries: list[ShardEntry] = []
        self._n_on_disk = len(old)  # entries in it
        self._file: BinaryIO | None = None

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        """The shards that are done, in order."""
        return tuple(self._entries)

    def known(self, index: int, content: str) -> ShardEntry | None:
        """A shard that an earlier run has made of just this."""
        entry = self._old.get(index)
        if entry is None or entry.content != content:
            return None
        try:
            n_bytes = (self.folder / entry.file).stat().st_size
        except OSError:
            return None
        return entry if n_bytes == entry.n_bytes else None

    def keep(self, entry: ShardEntry) -> None:
        """Count a shard of an earlier run as done."""
        if entry.index < self._n_on_disk and self._old.get(entry.index) is entry:
            self._entries.append(entry)
        else:  # something before it was made again, and its line went
            self._append(entry)

    def add(self, entry: ShardEntry, data: bytes) -> None:
        """Put the file of a shard in its place, then its line. Raises OutputFailed."""
        write_whole(self.folder / entry.file, data)
        self._append(entry)

    def finish(self) -> None:
        """All shards are there: say so. Raises OutputFailed."""
        failed = [each for entry in self._entries for each in entry.failed]
        path = self.folder / FAILED
        if failed:
            write_failed(path, failed)
        else:
            path.unlink(missing_ok=True)
        self._append_line(manifest.last_line(self._entries))
        here = {entry.file for entry in self._entries}
        # Of an input that was longer, and of runs that were killed.
        for part in (*self.folder.glob("part-*"), *self.folder.glob(".*.tmp")):
            if part.name not in here:
                with suppress(OSError):
                    part.unlink()

    def close(self) -> None:
        """Let others at it; what is done stays."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._lock.close()

    def _append(self, entry: ShardEntry) -> None:
        assert entry.index == len(self._entries), "shards are done in their order"
        self._append_line(manifest.entry_line(entry))
        self._entries.append(entry)

    def _append_line(self, line: bytes) -> None:
        if self._file is None:
            self._rewind()
        path = self.folder / manifest.NAME
        try:
            assert self._file is not None
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _not_written(path, error) from error

    def _rewind(self) -> None:
        """Begin to write after the entries that are used again."""
        lines = [manifest.header_line(self.header), *map(manifest.entry_line, self._entries)]
        data = b"".join(lines)
        self._n_on_disk = len(self._entries)
        path = self.folder / manifest.NAME
        try:
            if not path.exists() or path.read_bytes()[: len(data)] != data:
                write_whole(path, data)
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(len(data))
            self._file.seek(len(data))
        except OSError as error:
            raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> OutputFailed:
    return OutputFailed(
        f"{printable(path)}: not written: {error.strerror or error}; make room, then go on with "
        "--resume"
    )


def open_output(folder: Path, header: Header, *, resume: bool) -> JobOutput:
    """Take a folder for a job, or go on with what an earlier run of the same job has left there.

    Raises BadOption where it holds another job, or one while `resume` is False; OutputFailed where
    it cannot be made, or another run is at work.
    """
    shown = printable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_directory(folder.parent)
    except OSError as error:
        raise OutputFailed(f"{shown}: cannot be made: {error.strerror or error}") from error
    lock = Lock(folder / _LOCK, what=shown)
    try:
        path = folder / manifest.NAME
        data = path.read_bytes() if path.exists() else b""
        old = manifest.parse(data, printable(path))
        if old.header is None and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise BadOption(f"-o {shown}: is not empty, and holds no job; name another folder")
        if old.header is not None and not resume:
            n = len(old.entries)
            state = "is complete" if old.finished else f"has {n} of its shards"
            raise BadOption(
                f"-o {shown}: holds a job, which {state}; go on with --resume, or name another "
                "folder"
            )
        if old.header is not None:
            unlike = manifest.differences(old.header.made_with, header.made_with)
            if unlike:
                raise BadOption(
                    f"-o {shown}: holds vectors that were made otherwise ({'; '.join(unlike)}); "
                    "name another folder, or give the command as it was"
                )
            header = old.header
        else:
            write_whole(path, manifest.header_line(header))
        return JobOutput(folder, header, lock, old.entries)
    except BaseException:
        lock.close()
        raise


def write_failed(path: Path, failed: Iterable[FailedPlace]) -> None:
    """The side file: a line of JSON for each row without a vector. Raises OutputFailed."""
    lines = (json.dumps(asdict(each), ensure_ascii=True) for each in failed)
    write_whole(path, "".join(f"{line}\n" for line in lines))
