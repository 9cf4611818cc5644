"""What is done of a job: the values, and the lines of the file that tells them.

    {"format": "gguf-embed-job/1", "made_with": {...}, "run": {...}}      the first line
    {"index": 0, "file": "part-00000.parquet", "content": ..., ...}       one for each shard
    {"n_shards": 1, ...}                                                  the last, once all is done

Pure: bytes in, values out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from gguf_embed.errors import BadInput, counted
from gguf_embed.io.record import Record, UnreadableRow

if TYPE_CHECKING:
    from gguf_embed.engine.options import FailedRow

FORMAT: Final = "gguf-embed-job/1"
NAME: Final = "manifest.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPlace:
    """A row of the input without a vector."""

    source: str
    position: int  # line or row, from 1
    id: str | None  # None: it could not be read
    n_tokens: int | None
    reason: str

    @property
    def shown(self) -> str:
        """For people: file, line and why."""
        tokens = "" if self.n_tokens is None else f" {counted(self.n_tokens, 'token')}:"
        # What reading says begins with the place.
        return self.reason if self.id is None else f"{self.place}:{tokens} {self.reason}"

    @property
    def place(self) -> str:
        """File and line, with the id where that says something else."""
        place = f"{self.source}:{self.position}"
        return place if self.id in (None, place) else f"{place} (id {self.id})"


def unreadable_place(row: UnreadableRow) -> FailedPlace:
    """A row that could not be read."""
    return FailedPlace(
        source=row.source, position=row.position, id=None, n_tokens=None, reason=str(row)
    )


def failed_place(record: Record, failed: FailedRow) -> FailedPlace:
    """A text without a vector."""
    return FailedPlace(
        source=record.source,
        position=record.position,
        id=record.id,
        n_tokens=failed.n_tokens,
        reason=failed.reason,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """A shard that is done. It holds nothing that another run of the same work would say else."""

    index: int
    file: str
    content: str  # the hash of what went in
    n_bytes: int  # of the file
    n_rows: int
    n_tokens: int
    n_truncated: int
    first_truncated: tuple[str, ...]  # places, a few
    failed: tuple[FailedPlace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the job is, on the first line."""

    made_with: Mapping[str, object]  # must be the same whoever goes on with it
    run: Mapping[str, object]  # how the model ran when it began


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the file says."""

    header: Header | None  # None: nothing was written yet
    entries: tuple[ShardEntry, ...]
    finished: bool


def header_line(header: Header) -> bytes:
    """The first line."""
    return _line({"format": FORMAT, **asdict(header)})


def entry_line(entry: ShardEntry) -> bytes:
    """The line of a shard."""
    return _line(asdict(entry))


def last_line(entries: Sequence[ShardEntry]) -> bytes:
    """What all shards come to."""
    return _line(
        {
            "n_shards": len(entries),
            "n_rows": sum(entry.n_rows for entry in entries),
            "n_tokens": sum(entry.n_tokens for entry in entries),
            "n_truncated": sum(entry.n_truncated for entry in entries),
            "n_failed": sum(len(entry.failed) for entry in entries),
        }
    )


def parse(data: bytes, shown: str) -> Manifest:
    """The values; a torn end counts as absent. Raises BadInput for what is no manifest."""
    header: Header | None = None
    entries: list[ShardEntry] = []
    finished = False
    for raw in data.splitlines(keepends=True):
        try:
            line = cast("dict[str, Any]", json.loads(raw)) if raw.endswith(b"\n") else None
            if line is None:
                break
            if header is None:
                header = _header(line, shown)
            elif "n_shards" in line:
                finished = line["n_shards"] == len(entries)
                break
            else:
                entry = _entry(line)
                if entry.index != len(entries):
                    break
                entries.append(entry)
        except (ValueError, TypeError, KeyError, AttributeError):
            if header is None:
                raise BadInput(f"{shown}: is no manifest of a job; name another folder") from None
            break
    return Manifest(header=header, entries=tuple(entries), finished=finished)


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """In words, where two runs would not give one result."""
    return [
        f"{name} {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _header(line: dict[str, Any], shown: str) -> Header:
    if line["format"] != FORMAT:
        raise BadInput(f"{shown}: is of the format {line['format']}, which is not known here")
    return Header(made_with=line["made_with"], run=line["run"])


def _entry(line: dict[str, Any]) -> ShardEntry:
    values: dict[str, Any] = {
        **line,
        "failed": tuple(FailedPlace(**each) for each in line["failed"]),
        "first_truncated": tuple(line["first_truncated"]),
    }
    return ShardEntry(**values)


def _line(value: Mapping[str, object]) -> bytes:
    return json.dumps(value).encode() + b"\n"
