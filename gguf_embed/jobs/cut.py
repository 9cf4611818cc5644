"""Records cut into shards: the same input is cut at the same places, whenever it is read.

Pure: no file, no model, no clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gguf_embed.io.record import Record, UnreadableRow

SHARD_ROWS: Final = 2048
BYTES_PER_ROW: Final = 256  # of text: a shard of long texts has fewer rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What makes one shard."""

    index: int
    records: tuple[Record, ...]
    unreadable: tuple[UnreadableRow, ...]  # rows of the input that lie among them
    content: str  # a hash of all of it
    read_bytes: int  # of the input, up to its end


def cut(
    records: Iterable[Record], unreadable: list[UnreadableRow], *, shard_rows: int = SHARD_ROWS
) -> Iterator[Cut]:
    """Shards of at most `shard_rows` records, fewer where their texts are long.

    Whoever reads the records puts what it could not read into `unreadable`, which is emptied here.
    """
    most_bytes = shard_rows * BYTES_PER_ROW
    index = n_bytes = read_bytes = 0
    taken: list[Record] = []
    for record in records:
        taken.append(record)
        n_bytes += len(record.text)
        read_bytes = record.read_bytes
        if len(taken) == shard_rows or n_bytes >= most_bytes:
            yield _cut(index, taken, unreadable, read_bytes)
            index, n_bytes, taken = index + 1, 0, []
            unreadable.clear()
    if taken or unreadable or not index:
        yield _cut(index, taken, unreadable, read_bytes)
        unreadable.clear()


def _cut(
    index: int, records: Sequence[Record], unreadable: Sequence[UnreadableRow], read_bytes: int
) -> Cut:
    digest = hashlib.sha256()
    for record in records:
        part = record.part
        facts: list[object] = [
            *(record.id, record.text, record.source, record.position, record.last_position),
            dict(record.fields),
            None if part is None else [part.start, part.end, part.headings],
        ]
        digest.update(json.dumps(facts, default=str).encode() + b"\n")
    for row in unreadable:
        digest.update(json.dumps([row.source, row.position, str(row)]).encode() + b"\n")
    return Cut(
        index=index,
        records=tuple(records),
        unreadable=tuple(unreadable),
        content=digest.hexdigest(),
        read_bytes=read_bytes,
    )
