"""Texts in, with their place in the input.

Reading is lazy and strict: what cannot be read as text stops the run and is named with file,
line and byte, never skipped or repaired unasked. The rules, by ending:

    .txt      one text per line; a blank line is a text too, so that row i is line i + 1
    .md       passages: a section (heading and what is under it) cut between paragraphs
    .jsonl    one object per line, its text in a field; lines without any JSON are passed over
    .csv      a header row, then one row per text, its text in a column
    .parquet  one row per text, its text in a column; .arrow likewise
    -         standard input: as .txt, or as .jsonl where a field is named

Files are UTF-8, with or without a byte order mark; lines end in LF or CRLF, and the line end
is no part of a text.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, cast

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.io import tables
from gguf_embed.io.chunks import split_markdown
from gguf_embed.io.packed import unpacked
from gguf_embed.io.record import (
    GIVEN,
    NO_FIELDS,
    OnBadRow,
    Reading,
    Record,
    UnreadableRow,
    check_columns,
    check_unicode,
    json_type,
    row_of,
)
from gguf_embed.io.sources import (
    TABLES,
    WITH_FIELDS,
    OnBad,
    TextSource,
    TextSources,
    readable,
)


def given(texts: Sequence[str], *, source: str = GIVEN) -> Iterator[Record]:
    """Records of texts that are no files; `position` counts from 1."""
    for position, text in enumerate(texts, 1):
        yield Record(
            id=f"{source}:{position}",
            text=check_unicode(text, f"{source} {position}"),
            source=source,
            position=position,
            last_position=position,
        )


def read(
    sources: Iterable[TextSource],
    reading: Reading,
    *,
    stdin: IO[bytes] | None = None,
    on_bad: OnBad | None = None,
    on_bad_row: OnBadRow | None = None,
) -> Iterator[Record]:
    """The texts of all sources, lazily and in order; raises BadInput with file, line and byte.

    `on_bad` takes what is wrong with a file that lies in a directory, of which the rest is left.
    `on_bad_row` takes what is wrong with a row of any file, of which the others are still read.
    """
    done_bytes = 0
    for source in sources:
        start_bytes = done_bytes
        try:
            if source.kind in TABLES:
                with readable(source.name):
                    yield from tables.read(source, reading, start_bytes, on_bad_row)
                done_bytes = start_bytes + (source.n_bytes or 0)
            else:
                with readable(source.name), _opened(source, stdin) as stream:
                    lines = _Lines(stream, source, done_bytes, on_bad_row)
                    yield from _records(source, lines, reading)
                    done_bytes = lines.read_bytes
        except BadInput as error:
            if on_bad is None or not source.in_folder:
                raise
            on_bad(error)
            done_bytes = start_bytes + (source.n_bytes or 0)


def check_keep(sources: TextSources, reading: Reading) -> None:
    """Refuse to keep fields of sources that have none. Raises BadOption."""
    if (reading.keep or reading.keep_all) and not any(
        source.kind in WITH_FIELDS for source in sources
    ):
        raise BadOption(
            "--keep: only .jsonl, .csv and tables have fields, and none is among the inputs"
        )


@contextmanager
def _opened(source: TextSource, stdin: IO[bytes] | None) -> Generator[IO[bytes]]:
    if source.is_stdin:
        if stdin is None:
            raise BadInput(
                "- (standard input) is closed; name a file, or send texts through a pipe"
            )
        yield stdin
    else:
        with source.open() as stream:
            yield stream


class _Lines:
    """Decoded lines of a stream without their ends; knows which line and byte have gone by."""

    def __init__(
        self,
        stream: IO[bytes],
        source: TextSource,
        done_bytes: int,
        on_bad_row: OnBadRow | None,
    ) -> None:
        self.name = source.name
        self.number = 0  # of the line last given
        self.read_bytes = done_bytes  # of this and all earlier sources
        self._source = source
        self._packed = stream
        self._on_bad_row = on_bad_row
        # A file is cut into rows by its lines alone: without one of them the others stay whole.
        self._line_is_row = source.kind in (".txt", ".jsonl")

    def __iter__(self) -> Iterator[str]:
        offset = 0
        with unpacked(self._packed, self._source) as stream:
            position = self._position()
            for number, raw in enumerate(stream, 1):
                start, offset = offset, offset + len(raw)
                self.number = number
                self.read_bytes = position(offset)
                line = raw.removesuffix(b"\n").removesuffix(b"\r")
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    start += len(codecs.BOM_UTF8)
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    refusal = _not_utf8(error, self.name, number, line, start)
                    if not self._line_is_row:
                        raise refusal from error
                    self.refuse(number, refusal)
                    continue
                yield text

    def _position(self) -> Callable[[int], int]:
        """Bytes read of all sources, of the bytes of lines in this one."""
        before = self.read_bytes
        if self._source.packing is None or self._source.n_bytes is None:
            return lambda offset: before + offset
        return lambda offset: before + self._packed.tell()

    def refuse(self, position: int, error: BadInput) -> None:
        """A row that is not used. Raises the error where nobody takes it."""
        if self._on_bad_row is None:
            raise error
        self._on_bad_row(UnreadableRow(self.name, position, str(error)))

    def record(
        self,
        text: str,
        position: int,
        last_position: int,
        *,
        id: str | None = None,
        fields: Mapping[str, object] = NO_FIELDS,
    ) -> Record:
        """A text of this source."""
        return Record(
            id=f"{self.name}:{position}" if id is None else id,
            text=text,
            source=self.name,
            position=position,
            last_position=last_position,
            fields=fields,
            read_bytes=self.read_bytes,
        )

    def row(self, fields: Mapping[str, object], reading: Reading, position: int) -> Record | None:
        """A row that ends here; None of one that is refused. Raises BadInput."""
        try:
            row = row_of(fields, reading, f"{self.name}, line {position}")
        except BadInput as error:
            self.refuse(position, error)
            return None
        return self.record(row.text, position, self.number, id=row.id, fields=row.fields)


def _not_utf8(
    error: UnicodeDecodeError, name: str, number: int, line: bytes, start: int
) -> BadInput:
    utf16 = number == 1 and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return BadInput(
        f"{name}, line {number}: not UTF-8: byte 0x{line[error.start]:02x} at "
        f"offset {start + error.start} of the file ({error.reason}); convert it: "
        f"iconv -f {'UTF-16' if utf16 else 'ISO-8859-1'} -t UTF-8"
    )


def _records(source: TextSource, lines: _Lines, reading: Reading) -> Iterator[Record]:
    if source.kind == ".jsonl":
        yield from _jsonl(lines, reading)
    elif source.kind == ".csv":
        yield from _csv(lines, reading)
    elif reading.whole_file:
        text = "\n".join(lines)
        yield lines.record(text, 1, max(1, lines.number))
    elif source.kind == ".md" or reading.prose:
        for passage in split_markdown(lines):
            yield lines.record(passage.text, passage.first_line, passage.last_line)
    else:
        for text in lines:
            yield lines.record(text, lines.number, lines.number)


def _jsonl(lines: _Lines, reading: Reading) -> Iterator[Record]:
    n_rows = 0
    for line in lines:
        if not line.strip():
            continue
        position = lines.number
        try:
            fields = _json_row(line, f"{lines.name}, line {position}")
        except BadInput as error:
            lines.refuse(position, error)
            continue
        n_rows += 1
        if n_rows == 1:  # one that lacks the field is hardly the only one
            check_columns(list(fields), reading, f"{lines.name}, line {position}")
        record = lines.row(fields, reading, position)
        if record is not None:
            yield record


def _json_row(line: str, where: str) -> Mapping[str, object]:
    try:
        row: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {error}; one object per line is wanted") from error
    if not isinstance(row, dict):
        raise BadInput(
            f"{where}: holds {json_type(row)}, not an object with fields; "
            'write {"text": ...} on each line'
        )
    return cast(dict[str, object], row)


def _csv(lines: _Lines, reading: Reading) -> Iterator[Record]:
    # The module's own limit of 128 KiB is less than a long document; this is the largest that
    # every platform's C long takes.
    csv.field_size_limit(2**31 - 1)
    # strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    rows = csv.reader((line + "\n" for line in lines), strict=True)
    header: list[str] | None = None
    start = 0
    while True:
        position = start + 1
        where = f"{lines.name}, line {position}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise BadInput(
                f"{where}: not CSV: {error}; look at the quotes of the row that begins there"
            ) from error
        start = rows.line_num
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise BadInput(f"{where}: two columns are named {twice[0]!r}; rename one")
            check_columns(header, reading, where)
        elif len(row) != len(header):
            wrong = BadInput(
                f"{where}: {len(row)} columns where the header has {len(header)}; "
                "quote a text that holds commas, quotes or line ends"
            )
            lines.refuse(position, wrong)
        else:
            record = lines.row(dict(zip(header, row, strict=True)), reading, position)
            if record is not None:
                yield record
