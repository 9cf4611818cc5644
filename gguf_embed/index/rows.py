"""Rows of the tables as values. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from gguf_embed.index.facts import KnownFile, Passage, StoredPassage
from gguf_embed.io.folder import FileStamp

FILE_COLUMNS = "id, folder, name, digest, n_bytes, mtime_ns, ctime_ns, first_row, n_rows"
PASSAGE_COLUMNS = "id, file, ordinal, digest, text, headings, start, stop, first_line, last_line"


def known_file(row: Any) -> KnownFile:
    """Of FILE_COLUMNS."""
    id, folder, name, digest, n_bytes, mtime_ns, ctime_ns, first_row, n_rows = cast(
        "tuple[int, int, str, bytes, int, int, int, int, int]", row
    )
    stamp = FileStamp(n_bytes=n_bytes, mtime_ns=mtime_ns, ctime_ns=ctime_ns)
    return KnownFile(
        id=id,
        folder=folder,
        name=name,
        digest=digest,
        stamp=stamp,
        first_row=first_row,
        n_rows=n_rows,
    )


def stored_passage(row: Any) -> StoredPassage:
    """Of PASSAGE_COLUMNS."""
    id, file, ordinal, digest, text, headings, start, stop, first_line, last_line = cast(
        "tuple[int, int, int, bytes, str, str, int, int, int, int]", row
    )
    return StoredPassage(
        row=id,
        file=file,
        ordinal=ordinal,
        passage=Passage(
            digest=digest,
            text=text,
            headings=tuple(json.loads(headings)),
            start=start,
            end=stop,
            first_line=first_line,
            last_line=last_line,
        ),
    )


def digests_between(prefix: str) -> Iterator[bytes]:
    """The least and the greatest digest that begins with hexadecimal digits."""
    for filler in "0f":
        yield bytes.fromhex(prefix.ljust(32, filler))
