"""Vectors out: one `Writer` for each kind of output, all whole or not at all.

    NAME.npy    a float32 array, one row per text
    NAME.jsonl  one object per text, with its place and its vector
    -           the same lines on standard output, as they are ready

A file takes its name only when it is complete and on disk; NAME.meta.json beside it says what
made it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast

import numpy as np

from gguf_embed.errors import BadOption, OutputFailed
from gguf_embed.io.record import Record
from gguf_embed.io.sources import TextSource, readable
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import WholeFile, printable
from gguf_embed.vectors import Vectors

STDOUT = "-"


class Writer(Protocol):
    """Where rows go; what was not finished leaves no trace."""

    @property
    def n_rows(self) -> int:
        """Rows written so far."""
        ...

    def write(self, records: Sequence[Record], vectors: Vectors, truncated: Sequence[bool]) -> None:
        """Append rows; `vectors` has shape (len(records), dim)."""
        ...

    def finish(self, *, dim: int, about: Mapping[str, object]) -> None:
        """Make the result visible, with `about` (what made it) beside it where it is a file."""
        ...

    def close(self) -> None:
        """Remove what is not finished; a second call does nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowContent:
    """What a row holds beside its place and its vector."""

    text: bool = False
    fields: bool = False  # those that the reading kept


@contextmanager
def open_writer(
    name: str,
    *,
    stdout: BinaryIO | None,
    inputs: Sequence[TextSource] = (),
    content: RowContent = RowContent(),
) -> Generator[Writer]:
    """The writer that `name` asks for: a file, by its ending, or "-" for lines on `stdout`.

    A file that could not be written is refused on entry, before any work: BadOption for a name
    that makes no sense or is one of `inputs`, OutputFailed where the system says no, or where
    `stdout` is None: closed.
    """
    if name == STDOUT:
        if stdout is None:
            raise OutputFailed("standard output: is closed; name a file with -o NAME.jsonl")
        yield StreamLines(stdout, content)
        return
    path = Path(name)
    check_name(path, content, inputs)
    make = _WRITERS[path.suffix.lower()]
    writer = make(path, content)
    try:
        yield writer
    finally:
        writer.close()


def check_name(path: Path, content: RowContent, inputs: Sequence[TextSource]) -> None:
    """Refuse a file that cannot be the result. Raises BadOption."""
    if path.suffix.lower() not in _WRITERS:
        raise BadOption(
            f"-o {printable(path)}: the ending says the format; use NAME.npy (float32 array), "
            "NAME.jsonl (ids and vectors), DIR/ (.parquet shards), NAME.lance (a table of "
            "LanceDB) or - (JSON lines on standard output)"
        )
    if path.suffix.lower() == ".npy" and content != RowContent():
        raise BadOption(
            f"-o {printable(path)}: an array has no place for texts or fields; write them "
            "with the vectors to NAME.jsonl"
        )
    for source in inputs:
        with suppress(OSError):
            if source.path is not None and path.samefile(source.path):
                raise BadOption(f"-o {printable(path)}: is also an input; choose another name")


class NpyFile:
    """A .npy file: rows as they come, the header last, when their number is known."""

    def __init__(self, path: Path, content: RowContent) -> None:
        self.n_rows = 0
        self._file = _DescribedFile(path)
        self._file.write(bytes(NPY_HEADER_BYTES))  # its place is kept

    def write(self, records: Sequence[Record], vectors: Vectors, truncated: Sequence[bool]) -> None:
        """Append rows; `vectors` has shape (len(records), dim)."""
        assert len(records) == len(vectors) == len(truncated)
        self._file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        self.n_rows += len(records)

    def finish(self, *, dim: int, about: Mapping[str, object]) -> None:
        """Write the header; put the file and its description in place."""
        self._file.write_first(npy_header((self.n_rows, dim)))
        self._file.finish(about)

    def close(self) -> None:
        """Remove what is not finished."""
        self._file.close()


class LinesFile:
    """A .jsonl file: one object per row."""

    def __init__(self, path: Path, content: RowContent) -> None:
        self.n_rows = 0
        self._content = content
        self._file = _DescribedFile(path)

    def write(self, records: Sequence[Record], vectors: Vectors, truncated: Sequence[bool]) -> None:
        """Append rows; `vectors` has shape (len(records), dim)."""
        for record, vector, cut in zip(records, vectors, truncated, strict=True):
            self._file.write(json_line(record, vector, cut, self._content))
        self.n_rows += len(records)

    def finish(self, *, dim: int, about: Mapping[str, object]) -> None:
        """Put the file and its description in place."""
        self._file.finish(about)

    def close(self) -> None:
        """Remove what is not finished."""
        self._file.close()


class StreamLines:
    """The same objects on a stream. A reader that has gone is BrokenPipeError."""

    def __init__(self, stream: BinaryIO, content: RowContent) -> None:
        self.n_rows = 0
        self._content = content
        self._stream = stream

    def write(self, records: Sequence[Record], vectors: Vectors, truncated: Sequence[bool]) -> None:
        """Send rows at once, so that a reader sees them as they come."""
        try:
            for record, vector, cut in zip(records, vectors, truncated, strict=True):
                self._stream.write(json_line(record, vector, cut, self._content))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFailed(
                f"standard output: not written: {error.strerror or error}; "
                "what came before it is incomplete"
            ) from error
        self.n_rows += len(records)

    def finish(self, *, dim: int, about: Mapping[str, object]) -> None:
        """Nothing more to do: the rows are out, and there is no place for more."""

    def close(self) -> None:
        """Nothing to do: the stream is its owner's."""


_WRITERS: Final[Mapping[str, Callable[[Path, RowContent], Writer]]] = {
    ".npy": NpyFile,
    ".jsonl": LinesFile,
}


def join_parts(
    path: Path, parts: Sequence[Path], *, shape: tuple[int, int], about: Mapping[str, object]
) -> None:
    """Make NAME.npy of parts that hold rows of float32, or NAME.jsonl of parts that hold lines.

    Raises OutputFailed; `parts` stay.
    """
    with _DescribedFile(path) as file:
        if path.suffix.lower() == ".npy":
            file.write(npy_header(shape))
        for part in parts:
            with readable(printable(part)), part.open("rb") as stream:
                while data := stream.read(1 << 20):
                    file.write(data)
        file.finish(about)


class _DescribedFile(Closes):
    """A whole file and NAME.meta.json beside it, which says what made it."""

    def __init__(self, path: Path) -> None:
        self._file = WholeFile(path)
        try:
            beside = self._file.path.with_name(self._file.path.name + ".meta.json")
            self._about = WholeFile(beside)
        except BaseException:
            self._file.close()
            raise

    def write(self, data: bytes) -> None:
        """Append."""
        with self._file.writing():
            self._file.file.write(data)

    def write_first(self, data: bytes) -> None:
        """Put `data` over the first bytes."""
        with self._file.writing():
            self._file.file.seek(0)
            self._file.file.write(data)

    def finish(self, about: Mapping[str, object]) -> None:
        """Put both files in their places."""
        with self._about.writing():
            self._about.file.write(_json_bytes(about, indent=2) + b"\n")
        self._about.sync()
        self._file.sync()
        # Two files cannot be replaced at one stroke. In this order a crash leaves vectors
        # without a description, never with another run's.
        with self._about.writing():
            self._about.path.unlink(missing_ok=True)
        self._file.commit()
        self._about.commit()

    def close(self) -> None:
        """Remove what is not in its place."""
        self._about.close()
        self._file.close()


def json_line(record: Record, vector: Vectors, truncated: bool, content: RowContent) -> bytes:
    """The line of a row."""
    row: dict[str, object] = {
        "id": record.id,
        "source": record.source,
        "position": record.position,
        "last_position": record.last_position,
        "truncated": truncated,
    }
    if record.part is not None:
        row |= {"start": record.part.start, "end": record.part.end}
        row["headings"] = list(record.part.headings)
    if content.text:
        row["text"] = record.text
    if content.fields:
        row["fields"] = dict(record.fields)
    head = _json_bytes(row)
    if np.isnan(vector).all():  # the row failed, and JSON has no NaN
        return head[:-1] + b', "vector": null}\n'
    # Nine digits give a float32 back exactly.
    numbers = ", ".join(["%.9g"] * len(vector)) % tuple(cast(list[float], vector.tolist()))
    return b'%s, "vector": [%s]}\n' % (head[:-1], numbers.encode())


def _json_bytes(value: Mapping[str, object], indent: int | None = None) -> bytes:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half a character in a kept field or a name; an escape is JSON
        return json.dumps(value, indent=indent, default=str).encode()


# numpy pads the header so that a first axis can grow in place; this holds any two axes.
NPY_HEADER_BYTES = 128


def npy_header(shape: tuple[int, int]) -> bytes:
    """The first bytes of a .npy file of float32 (NEP 1, version 1.0), of fixed length."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    length = NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + f"{text:<{length - 1}}\n".encode()
