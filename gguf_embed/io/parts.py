"""Records of the chunks of a record: a file or a field becomes several rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gguf_embed.io.record import GIVEN, Part, Record
from gguf_embed.io.split import CountTokens, kind_of_file, split

_ROWS = (".jsonl", ".csv")  # files in which a record is a row


def parts_of(
    record: Record,
    *,
    count_tokens: CountTokens,
    max_tokens: int,
    overlap: int,
    of_row: bool = False,
) -> Iterator[Record]:
    """The chunks of a text, without blank ones; `of_row`: it is a row of standard input.

    The lines of a file's chunk are those of the file, of a row's those of the row. Ids end in the
    number of the chunk, from 1.
    """
    whole = not (of_row or record.source == GIVEN or record.source.lower().endswith(_ROWS))
    name = record.source if whole else record.id
    chunks = split(
        record.text,
        count_tokens=count_tokens,
        max_tokens=max_tokens,
        overlap=overlap,
        kind=kind_of_file(record.source) if whole else "text",
    )
    for number, chunk in enumerate(chunks, 1):
        if chunk.text.strip():
            lines = (chunk.first_line, chunk.last_line)
            first, last = lines if whole else (record.position, record.last_position)
            yield replace(
                record,
                id=f"{name}#{number}",
                text=chunk.text,
                position=first,
                last_position=last,
                part=Part(
                    start=chunk.start,
                    end=chunk.end,
                    headings=chunk.headings,
                    n_tokens=chunk.n_tokens,
                ),
            )
