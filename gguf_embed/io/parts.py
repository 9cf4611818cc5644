"""Records of the chunks of a record: a file or a field becomes several rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gguf_embed.io.read import Part, Record
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
    row = of_row or record.source.lower().endswith(_ROWS)
    name = record.id if row or record.source == "--text" else record.source
    chunks = split(
        record.text,
        count_tokens=count_tokens,
        max_tokens=max_tokens,
        overlap=overlap,
        kind="text" if row or record.source == "--text" else kind_of_file(record.source),
    )
    for number, chunk in enumerate(chunks, 1):
        if chunk.text.strip():
            first = record.position if row else record.position + chunk.first_line - 1
            last = record.last_position if row else record.position + chunk.last_line - 1
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
