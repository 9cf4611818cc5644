"""A text and where it came from, and how a row with fields becomes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from gguf_embed.errors import BadInput

DEFAULT_FIELD = "text"
GIVEN = "--text"  # the source of texts on the command line
NO_FIELDS: Mapping[str, object] = MappingProxyType({})  # one for all records without any


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
    fields: Mapping[str, object] = field(default_factory=lambda: NO_FIELDS)  # that are kept
    read_bytes: int = 0  # of all sources together, up to the end of this text
    part: Part | None = None  # of a chunk


class UnreadableRow(BadInput):
    """One row of a file that holds no text that can be used; those after it may."""

    def __init__(self, source: str, position: int, reason: str) -> None:
        super().__init__(reason)
        self.source = source
        self.position = position  # its line or, in a table, its row, from 1


OnBadRow: TypeAlias = Callable[[UnreadableRow], None]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a record takes of an object or of the row of a table."""

    text: str
    id: str | None  # None: its place
    fields: Mapping[str, object]


def row_of(fields: Mapping[str, object], reading: Reading, where: str) -> Row:
    """Its text, id and kept fields. Raises BadInput, which begins with `where`."""
    text_field = reading.field or DEFAULT_FIELD
    if text_field not in fields:
        raise no_field(text_field, list(fields), reading, where)
    text = fields[text_field]
    if not isinstance(text, str):
        raise BadInput(f"{where}: field {text_field!r} holds {json_type(text)}, not a text")
    kept = (
        tuple(name for name in fields if name != text_field) if reading.keep_all else reading.keep
    )
    for name in kept:
        if name not in fields:
            raise no_field(name, list(fields), reading, where)
    return Row(
        text=check_unicode(text, where),
        id=_id(fields, reading, where),
        fields={name: fields[name] for name in kept} if kept else NO_FIELDS,
    )


def check_columns(names: Sequence[str], reading: Reading, where: str) -> None:
    """Refuse a table without the columns that are read, even where no row follows."""
    for name in (reading.field or DEFAULT_FIELD, reading.id_field, *reading.keep):
        if name is not None and name not in names:
            raise no_field(name, names, reading, where)


def _id(fields: Mapping[str, object], reading: Reading, where: str) -> str | None:
    if reading.id_field is None:
        return None
    if reading.id_field not in fields:
        raise no_field(reading.id_field, list(fields), reading, where)
    name = fields[reading.id_field]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise BadInput(
            f"{where}: field {reading.id_field!r} holds {json_type(name)}, "
            "not a text or a whole number to use as id"
        )
    return check_unicode(str(name), where)


def no_field(name: str, fields: Sequence[str], reading: Reading, where: str) -> BadInput:
    """What to say where a field is missing."""
    shown = ", ".join(repr(field) for field in fields[:20]) or "none"
    more = f" and {len(fields) - 20} more" if len(fields) > 20 else ""
    field = reading.field or DEFAULT_FIELD
    option = "--field" if name == field else "--id-field" if name == reading.id_field else "--keep"
    return BadInput(
        f"{where}: no field {name!r}; the fields are {shown}{more}; name one with {option}"
    )


def json_type(value: object) -> str:
    """What a value of JSON is, in words."""
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
