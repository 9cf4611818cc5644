"""Files in, files out: texts with their place in the input, vectors written whole or not at all.

Reading is lazy and strict: what cannot be read as text stops the run and is named with file,
line and byte, never skipped or repaired. The rules, by ending:

    .txt     one text per line; a blank line is a text too, so that row i is line i + 1
    .md      passages: a section (heading and what is under it) cut between paragraphs
    .jsonl   one object per line, its text in a field; lines without any JSON are passed over
    .csv     a header row, then one row per text, its text in a column
    -        standard input: as .txt, or as .jsonl where a field is named

Files are UTF-8, with or without a byte order mark; lines end in LF or CRLF, and the line end
is no part of a text.

Writing goes to a temporary file beside the target, which replaces the target only when it is
complete and on disk.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final, Literal, cast

import numpy as np

from gguf_embed.errors import BadInput, BadOption, OutputFailed
from gguf_embed.io.chunks import split_markdown
from gguf_embed.vectors import Vectors

Kind = Literal[".txt", ".md", ".jsonl", ".csv"]

KINDS: Final[tuple[Kind, ...]] = (".txt", ".md", ".jsonl", ".csv")
STDIN = "-"
STDOUT = "-"
DEFAULT_FIELD = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input to read: a file, or standard input where `path` is None."""

    name: str  # printable, as results and messages show it
    path: Path | None
    kind: Kind
    n_bytes: int | None  # None: not known before the end (a pipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How files become texts."""

    field: str | None = None  # of .jsonl and .csv; None: "text"
    id_field: str | None = None  # None: the id is "source:position"
    whole_file: bool = False  # one text per .txt, .md or standard input
    prose: bool = False  # .txt and standard input are cut into passages, as .md


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One text and where it came from."""

    id: str
    text: str
    source: str
    position: int  # line on which the text begins, from 1; for given texts their number
    read_bytes: int = 0  # of all sources together, up to the end of this text


# ---------------------------------------------------------------------------------------------
# Reading


def find(inputs: Sequence[str], *, field: str | None = None) -> tuple[Source, ...]:
    """The sources that `inputs` (files, directories, "-") stand for, in reading order.

    Directories are searched to any depth, in sorted order, for the endings above; names that
    begin with a dot are passed over. Raises BadInput for what is missing, unreadable or no
    text, before anything is read.
    """
    sources: list[Source] = []
    for name in inputs:
        if name == STDIN:
            if any(source.path is None for source in sources):
                raise BadOption("- (standard input) is named twice; it can be read once")
            kind: Kind = ".txt" if field is None else ".jsonl"
            sources.append(Source(name=STDIN, path=None, kind=kind, n_bytes=None))
            continue
        path = Path(name)
        with _readable(_shown(path)):
            mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            sources += _directory(path)
        elif (kind_of := _kind(path)) is None:
            raise BadInput(
                f"{_shown(path)}: the ending {path.suffix or '(none)'} is not one of "
                f"{', '.join(KINDS)}; rename it, or send it through standard input: "
                f"gguf-embed ... - < {_shown(path)}"
            )
        else:
            sources.append(_file(path, kind_of))
    return tuple(sources)


def total_bytes(sources: Sequence[Source]) -> int | None:
    """Bytes to read in all, None where a source does not tell."""
    sizes = [source.n_bytes for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def given(texts: Sequence[str], *, source: str = "--text") -> Iterator[Record]:
    """Records of texts that are no files; `position` counts from 1."""
    for position, text in enumerate(texts, 1):
        where = f"{source} {position}"
        yield Record(
            id=f"{source}:{position}",
            text=_unicode(text, where),
            source=source,
            position=position,
        )


def read(sources: Iterable[Source], reading: Reading, *, stdin: IO[bytes]) -> Iterator[Record]:
    """The texts of all sources, lazily and in order; raises BadInput with file, line and byte."""
    done_bytes = 0
    for source in sources:
        with _readable(source.name), _opened(source, stdin) as stream:
            lines = _Lines(stream, source.name)
            for position, name, text in _texts(source, lines, reading):
                yield Record(
                    id=f"{source.name}:{position}" if name is None else name,
                    text=text,
                    source=source.name,
                    position=position,
                    read_bytes=done_bytes + lines.n_bytes,
                )
            done_bytes += lines.n_bytes


def _shown(path: Path) -> str:
    """A path that can be printed and put in JSON, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _kind(path: Path) -> Kind | None:
    return next((kind for kind in KINDS if path.suffix.lower() == kind), None)


def _file(path: Path, kind: Kind) -> Source:
    with _readable(_shown(path)), path.open("rb") as stream:
        status = os.fstat(stream.fileno())
    n_bytes = status.st_size if stat.S_ISREG(status.st_mode) else None
    return Source(name=_shown(path), path=path, kind=kind, n_bytes=n_bytes)


def _directory(root: Path) -> list[Source]:
    found: list[Source] = []
    others = 0

    def refuse(error: OSError) -> None:
        raise error

    with _readable(_shown(root)):
        for folder, folders, names in os.walk(root, onerror=refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                kind = None if name.startswith(".") else _kind(path)
                if kind is None:
                    others += 1
                else:
                    found.append(_file(path, kind))
    if not found:
        raise BadInput(
            f"{_shown(root)}: no {', '.join(KINDS)} file in this directory or below "
            f"({others} other files); name the files, or another directory"
        )
    return found


@contextmanager
def _readable(name: str) -> Generator[None]:
    """Turns the system's refusals into BadInput with the path and the reason."""
    try:
        yield
    except OSError as error:
        at = os.fsdecode(cast(str | bytes, error.filename)) if error.filename else name
        shown = _shown(Path(at))
        if isinstance(error, FileNotFoundError):
            raise BadInput(f"{shown}: no such file or directory{_near(Path(at))}") from error
        raise BadInput(
            f"{shown}: cannot be read: {error.strerror or error}; check the file and its permission"
        ) from error


def _near(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f"; there is no directory {_shown(path.parent)}"
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; near it: {', '.join(_shown(Path(name)) for name in near)}" if near else ""


@contextmanager
def _opened(source: Source, stdin: IO[bytes]) -> Generator[IO[bytes]]:
    if source.path is None:
        yield stdin
    else:
        with source.path.open("rb") as stream:
            yield stream


class _Lines:
    """Decoded lines of a stream without their ends; knows how many bytes have gone by."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name = name
        self.n_bytes = 0
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        for number, raw in enumerate(self._stream, 1):
            start = self.n_bytes
            self.n_bytes += len(raw)
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


# (position, id or None, text)
_Text = tuple[int, str | None, str]


def _texts(source: Source, lines: _Lines, reading: Reading) -> Iterator[_Text]:
    if source.kind == ".jsonl":
        yield from _jsonl(lines, reading)
    elif source.kind == ".csv":
        yield from _csv(lines, reading)
    elif reading.whole_file:
        yield 1, None, "\n".join(lines)
    elif source.kind == ".md" or reading.prose:
        for position, text in split_markdown(lines):
            yield position, None, text
    else:
        for position, text in enumerate(lines, 1):
            yield position, None, text


def _jsonl(lines: _Lines, reading: Reading) -> Iterator[_Text]:
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
        yield position, *_id_and_text(fields, reading, where)


def _csv(lines: _Lines, reading: Reading) -> Iterator[_Text]:
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
            for name in (reading.field or DEFAULT_FIELD, reading.id_field):
                if name is not None and name not in header:
                    raise _no_field(name, header, reading, where)
        elif len(row) != len(header):
            raise BadInput(
                f"{where}: {len(row)} columns where the header has {len(header)}; "
                "quote a text that holds commas, quotes or line ends"
            )
        else:
            fields: dict[str, object] = dict(zip(header, row, strict=True))
            yield position, *_id_and_text(fields, reading, where)


def _id_and_text(
    fields: Mapping[str, object], reading: Reading, where: str
) -> tuple[str | None, str]:
    field = reading.field or DEFAULT_FIELD
    if field not in fields:
        raise _no_field(field, list(fields), reading, where)
    text = fields[field]
    if not isinstance(text, str):
        raise BadInput(f"{where}: field {field!r} holds {_json_type(text)}, not a text")
    if reading.id_field is None:
        return None, _unicode(text, where)
    if reading.id_field not in fields:
        raise _no_field(reading.id_field, list(fields), reading, where)
    name = fields[reading.id_field]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise BadInput(
            f"{where}: field {reading.id_field!r} holds {_json_type(name)}, "
            "not a text or a whole number to use as id"
        )
    return _unicode(str(name), where), _unicode(text, where)


def _no_field(name: str, fields: Sequence[str], reading: Reading, where: str) -> BadInput:
    shown = ", ".join(repr(field) for field in fields[:20]) or "none"
    more = f" and {len(fields) - 20} more" if len(fields) > 20 else ""
    option = "--id-field" if name == reading.id_field else "--field"
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


def _unicode(text: str, where: str) -> str:
    """The text, if every character of it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{where}: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}, which is no text (a \\ud83d without its second "
            "half, or bytes that were no UTF-8); repair it where it was made"
        ) from error
    return text


# ---------------------------------------------------------------------------------------------
# Writing


class Output:
    """Rows on their way to a file or stream."""

    def __init__(self, file: WholeFile | _Stream, *, is_npy: bool) -> None:
        self.n_rows = 0
        self._file = file
        self._is_npy = is_npy
        if is_npy:
            file.write(bytes(_NPY_HEADER_BYTES))  # its place is kept: the row count comes last

    def write(self, records: Sequence[Record], vectors: Vectors, truncated: Sequence[bool]) -> None:
        """Append rows; `vectors` has shape (len(records), dim)."""
        assert len(records) == len(vectors) == len(truncated)
        if self._is_npy:
            self._file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        else:
            for record, vector, cut in zip(records, vectors, truncated, strict=True):
                self._file.write(_json_line(record, vector, cut))
        self.n_rows += len(records)

    def finish(self, *, dim: int, about: Mapping[str, object]) -> None:
        """Make the result visible, with `about` (what made it) beside it where it is a file."""
        header = _npy_header((self.n_rows, dim)) if self._is_npy else b""
        self._file.finish(header, about)


@contextmanager
def open_output(name: str, *, stdout: BinaryIO, inputs: Sequence[Source] = ()) -> Generator[Output]:
    """The output that `name` asks for: NAME.npy, NAME.jsonl, or "-" for JSON lines on stdout.

    A file that could not be written is refused on entry, before any work: BadOption for a name
    that makes no sense or is one of `inputs`, OutputFailed where the system says no. What is not
    finished on leaving is removed.
    """
    if name == STDOUT:
        yield Output(_Stream(stdout), is_npy=False)
        return
    path = Path(name)
    if path.suffix.lower() not in (".npy", ".jsonl"):
        raise BadOption(
            f"-o {_shown(path)}: the ending says the format; use NAME.npy (float32 array), "
            "NAME.jsonl (ids and vectors) or - (JSON lines on standard output)"
        )
    for source in inputs:
        with suppress(OSError):
            if source.path is not None and path.samefile(source.path):
                raise BadOption(f"-o {_shown(path)}: is also an input; choose another name")
    file = WholeFile(path)
    try:
        file.create()
        yield Output(file, is_npy=path.suffix.lower() == ".npy")
    finally:
        file.discard()


class WholeFile:
    """A binary file that takes its name only when complete, with what made it beside it.

    Written to a hidden temporary file in the same directory, flushed to disk, then renamed.
    A symbolic link keeps pointing where it does: the file that it names is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._shown = _shown(path)
        self._path = Path(os.path.realpath(path))
        self._temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")
        self._file: BinaryIO | None = None

    def create(self) -> None:
        """Begin the temporary file."""
        with self._writing():
            if self._path.exists() and not self._path.is_file():
                raise OutputFailed(
                    f"{self._shown}: is a directory or a device, not a file; choose another -o"
                )
            # Not tempfile: its files are for the owner's eyes only; this one obeys the umask.
            self._file = self._temporary.open("xb")

    def write(self, data: bytes) -> None:
        """Append."""
        assert self._file, "created"
        with self._writing():
            self._file.write(data)

    def finish(self, header: bytes, about: Mapping[str, object]) -> None:
        """Put `header` over the first bytes, the file in its place, `about` as NAME.meta.json."""
        assert self._file, "created"
        meta = self._path.with_name(self._path.name + ".meta.json")
        meta_temporary = self._temporary.with_name(self._temporary.name + ".meta")
        with self._writing():
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            try:
                with meta_temporary.open("xb") as file:
                    file.write(json.dumps(about, indent=2, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                # Two files cannot be replaced at one stroke. In this order a crash leaves
                # vectors without a description, never with another run's.
                meta.unlink(missing_ok=True)
                self._temporary.replace(self._path)
                meta_temporary.replace(meta)
            finally:
                meta_temporary.unlink(missing_ok=True)
            _sync_directory(self._path.parent)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses
            if self._file:
                self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise OutputFailed(self._refusal(error)) from error

    def _refusal(self, error: OSError) -> str:
        reason = f"{self._shown}: not written: {error.strerror or error}"
        step = "choose another -o, or check the permission of its directory"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            step = "make room, or choose another -o"
            with suppress(OSError):
                size = self._temporary.stat().st_size
                free = shutil.disk_usage(self._path.parent).free
                reason += f" after {size} bytes, {free} bytes free on that disk"
        elif error.errno == errno.ENOENT:
            step = f"make its directory first: mkdir -p {Path(self._shown).parent}"
        with suppress(OSError):
            if self._path.exists():
                step += "; the older file of that name is unchanged"
        return f"{reason}; {step}"


def _sync_directory(path: Path) -> None:
    """Make a rename last through a power cut, where the system lets directories be synced."""
    if os.name != "posix":
        return
    with suppress(OSError):  # some file systems refuse; the rename itself has been done
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Stream:
    """Standard output in the place of a file. A reader that has gone is BrokenPipeError."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: bytes) -> None:
        """Send at once, so that a reader sees rows as they come."""
        try:
            self._stream.write(data)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFailed(
                f"standard output: not written: {error.strerror or error}; "
                "what came before it is incomplete"
            ) from error

    def finish(self, header: bytes, about: Mapping[str, object]) -> None:
        """Nothing more to do: the rows are out, and there is no place for more."""


def _json_line(record: Record, vector: Vectors, truncated: bool) -> bytes:
    head = json.dumps(
        {
            "id": record.id,
            "source": record.source,
            "position": record.position,
            "truncated": truncated,
        },
        ensure_ascii=False,
    )
    # Nine digits give a float32 back exactly.
    numbers = ", ".join(["%.9g"] * len(vector)) % tuple(cast(list[float], vector.tolist()))
    return f'{head[:-1]}, "vector": [{numbers}]}}\n'.encode()


# numpy pads the header so that a first axis can grow in place; this holds any two axes.
_NPY_HEADER_BYTES = 128


def _npy_header(shape: tuple[int, int]) -> bytes:
    """The first bytes of a .npy file of float32 (NEP 1, version 1.0), of fixed length."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    length = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + f"{text:<{length - 1}}\n".encode()
