"""Texts in, with their place in the input.

Reading is lazy and strict: what cannot be read as text stops the run and is named with file,
line and byte, never skipped or repaired. The rules, by ending:

    .txt     one text per line; a blank line is a text too, so that row i is line i + 1
    .md      passages: a section (heading and what is under it) cut between paragraphs
    .jsonl   one object per line, its text in a field; lines without any JSON are passed over
    .csv     a header row, then one row per text, its text in a column
    -        standard input: as .txt, or as .jsonl where a field is named

Files are UTF-8, with or without a byte order mark; lines end in LF or CRLF, and the line end
is no part of a text.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import IO, cast

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.io.chunks import split_markdown
from gguf_embed.io.sources import OnBad, TextSource, TextSources, readable

DEFAULT_FIELD = "text"
GIVEN = "--text"  # the source of texts on the command line
_NO_FIELDS: Mapping[str, object] = MappingProxyType({})  # one for all records without any


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How files become texts."""

    field: str | None = None  # of .jsonl and .csv; None: "text"
    id_field: str | None = None  # None: the id is "source:position"
    whole_file: bool = False  # one text per .txt, .md or standard input
    prose: bool = False  # .txt and standard input are cut into passages, as .md
    keep: tuple[str, ...] = ()  # other fields that stay with each record
    keep_all: bool = False  # all other fields do


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where a chunk stands in its document."""

    start: int  # characters
    end: int
    headings: tuple[str, ...]  # above it, the outermost first
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One text and where it came from."""

    id: str
    text: str
    source: str
    position: int  # line on which the text begins, from 1; for given texts their number
    last_position: int  # line on which it ends
    fields: Mapping[str, object] = field(default_factory=lambda: _NO_FIELDS)  # that are kept
    read_bytes: int = 0  # of all sources together, up to the end of this text
    part: Part | None = None  # of a chunk


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
) -> Iterator[Record]:
    """The texts of all sources, lazily and in order; raises BadInput with file, line and byte.

    `on_bad` takes what is wrong with a file that lies in a directory, of which the rest is left.
    """
    done_bytes = 0
    for source in sources:
        start_bytes = done_bytes
        try:
            with readable(source.name), _opened(source, stdin) as stream:
                lines = _Lines(stream, source.name, done_bytes)
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
        source.kind in (".jsonl", ".csv") for source in sources
    ):
        raise BadOption("--keep: only .jsonl and .csv have fields, and none is among the inputs")


def check_unicode(text: str, where: str) -> str:
    """The text, if every character of it can be written as UTF-8. Raises BadInput."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{where}: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}, which is no text (a \\ud83d without its second "
            "half, or bytes that were no UTF-8); repair it where it was made"
        ) from error
    return text


@contextmanager
def _opened(source: TextSource, stdin: IO[bytes] | None) -> Generator[IO[bytes]]:
    if source.path is None:
        if stdin is None:
            raise BadInput(
                "- (standard input) is closed; name a file, or send texts through a pipe"
            )
        yield stdin
    else:
        with source.path.open("rb") as stream:
            yield stream


class _Lines:
    """Decoded lines of a stream without their ends; knows which line and byte have gone by."""

    def __init__(self, stream: IO[bytes], name: str, done_bytes: int) -> None:
        self.name = name
        self.number = 0  # of the line last given
        self.read_bytes = done_bytes  # of this and all earlier sources
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        offset = 0
        for number, raw in enumerate(self._stream, 1):
            start, offset = offset, offset + len(raw)
            self.number = number
            self.read_bytes += len(raw)
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                start += len(codecs.BOM_UTF8)
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                utf16 = number == 1 and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                raise BadInput(
                    f"{self.name}, line {number}: not UTF-8: byte 0x{line[error.start]:02x} at "
                    f"offset {start + error.start} of the file ({error.reason}); convert it: "
                    f"iconv -f {'UTF-16' if utf16 else 'ISO-8859-1'} -t UTF-8"
                ) from error

    def record(
        self,
        text: str,
        position: int,
        last_position: int,
        *,
        id: str | None = None,
        fields: Mapping[str, object] = _NO_FIELDS,
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
        for position, text in enumerate(lines, 1):
            yield lines.record(text, position, position)


def _jsonl(lines: _Lines, reading: Reading) -> Iterator[Record]:
    for position, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{lines.name}, line {position}"
        try:
            row: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not JSON: {error}; one object per line is wanted") from error
        if not isinstance(row, dict):
            raise BadInput(
                f"{where}: holds {_json_type(row)}, not an object with fields; "
                'write {"text": ...} on each line'
            )
        fields = cast(dict[str, object], row)
        yield _row(fields, lines, reading, position, where)


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
            # A wrong field is told even where no row follows.
            for name in (reading.field or DEFAULT_FIELD, reading.id_field, *reading.keep):
                if name is not None and name not in header:
                    raise _no_field(name, header, reading, where)
        elif len(row) != len(header):
            raise BadInput(
                f"{where}: {len(row)} columns where the header has {len(header)}; "
                "quote a text that holds commas, quotes or line ends"
            )
        else:
            fields: dict[str, object] = dict(zip(header, row, strict=True))
            yield _row(fields, lines, reading, position, where)


def _row(
    fields: Mapping[str, object], lines: _Lines, reading: Reading, position: int, where: str
) -> Record:
    """The record of an object or a table row."""
    text_field = reading.field or DEFAULT_FIELD
    if text_field not in fields:
        raise _no_field(text_field, list(fields), reading, where)
    text = fields[text_field]
    if not isinstance(text, str):
        raise BadInput(f"{where}: field {text_field!r} holds {_json_type(text)}, not a text")
    kept = (
        tuple(name for name in fields if name != text_field) if reading.keep_all else reading.keep
    )
    for name in kept:
        if name not in fields:
            raise _no_field(name, list(fields), reading, where)
    return lines.record(
        check_unicode(text, where),
        position,
        lines.number,
        id=_id(fields, reading, where),
        fields={name: fields[name] for name in kept} if kept else _NO_FIELDS,
    )


def _id(fields: Mapping[str, object], reading: Reading, where: str) -> str | None:
    if reading.id_field is None:
        return None
    if reading.id_field not in fields:
        raise _no_field(reading.id_field, list(fields), reading, where)
    name = fields[reading.id_field]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise BadInput(
            f"{where}: field {reading.id_field!r} holds {_json_type(name)}, "
            "not a text or a whole number to use as id"
        )
    return check_unicode(str(name), where)


def _no_field(name: str, fields: Sequence[str], reading: Reading, where: str) -> BadInput:
    shown = ", ".join(repr(field) for field in fields[:20]) or "none"
    more = f" and {len(fields) - 20} more" if len(fields) > 20 else ""
    field = reading.field or DEFAULT_FIELD
    option = "--field" if name == field else "--id-field" if name == reading.id_field else "--keep"
    return BadInput(
        f"{where}: no field {name!r}; the fields are {shown}{more}; name one with {option}"
    )


def _json_type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
        case _:
            return "an object"
