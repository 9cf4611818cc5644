"""Rows of Parquet and Arrow files, a batch at a time."""

from __future__ import annotations

import importlib
import io
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from gguf_embed.errors import BadInput
from gguf_embed.io.extras import import_pyarrow
from gguf_embed.io.record import (
    DEFAULT_FIELD,
    OnBadRow,
    Reading,
    Record,
    UnreadableRow,
    check_columns,
    row_of,
)
from gguf_embed.io.sources import TABLES, TextSource, readable
from gguf_embed.vectors import Vectors

BATCH_ROWS: Final = 1024


def read(
    source: TextSource, reading: Reading, done_bytes: int, on_bad_row: OnBadRow | None
) -> Iterator[Record]:
    """The texts of one file, in order. Raises BadInput with file and row."""
    with _table(source) as table:
        check_columns(table.names, reading, source.name)
        wanted = _columns(table.names, reading)
        position = 0
        for columns in table.batches(wanted):
            for values in zip(*columns.values(), strict=True):
                position += 1
                fields: Mapping[str, object] = dict(zip(columns, values, strict=True))
                try:
                    row = row_of(fields, reading, f"{source.name}, row {position}")
                except BadInput as error:
                    if on_bad_row is None:
                        raise
                    on_bad_row(UnreadableRow(source.name, position, str(error)))
                    continue
                done = (source.n_bytes or 0) * position // max(table.n_rows, position)
                yield Record(
                    id=f"{source.name}:{position}" if row.id is None else row.id,
                    text=row.text,
                    source=source.name,
                    position=position,
                    last_position=position,
                    fields=row.fields,
                    read_bytes=done_bytes + done,
                )


def kept_types(sources: Iterable[TextSource], reading: Reading) -> dict[str, Any]:
    """The Arrow type of each kept column; empty where not all sources are tables that agree."""
    types: dict[str, Any] = {}
    for number, source in enumerate(sources):
        if source.kind not in TABLES:
            return {}
        with readable(source.name), _table(source) as table:
            check_columns(table.names, reading, source.name)
            text = reading.field or DEFAULT_FIELD
            names = [name for name in _columns(table.names, reading) if name != text]
            here = {
                name: table.types[name]
                for name in names
                if reading.keep_all or name in reading.keep
            }
        if number and here != types:
            return {}
        types = here
    return types


def _columns(names: Sequence[str], reading: Reading) -> list[str]:
    """Those that are read, in the order of the file."""
    wanted = {reading.field or DEFAULT_FIELD, reading.id_field, *reading.keep}
    return [name for name in names if reading.keep_all or name in wanted]


class _Table:
    """An open file."""

    def __init__(self, schema: Any, n_rows: int, batches: Any) -> None:
        self.names: list[str] = schema.names
        self.types: dict[str, Any] = dict(zip(schema.names, schema.types, strict=True))
        self.n_rows = n_rows  # 0: the file does not say
        self._batches = batches

    def batches(self, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        """The values of these columns."""
        for batch in self._batches(names):
            yield {name: batch.column(name).to_pylist() for name in names}


@contextmanager
def _table(source: TextSource) -> Generator[_Table]:
    """The file of a source, open. Raises BadInput."""
    pyarrow = import_pyarrow(source.name)
    try:
        with source.open() as stream:
            yield _parquet(stream) if source.kind == ".parquet" else _arrow(pyarrow, stream)
    except pyarrow.ArrowException as error:
        what = "Parquet" if source.kind == ".parquet" else "Arrow IPC"
        raise BadInput(f"{source.name}: not {what}, or damaged: {error}") from error


def _parquet(stream: Any) -> _Table:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    # What is read ahead of its use would be all of a row group.
    file: Any = parquet.ParquetFile(stream, pre_buffer=False)

    def batches(names: Sequence[str]) -> Iterator[Any]:
        return file.iter_batches(batch_size=BATCH_ROWS, columns=[*names], use_threads=False)

    return _Table(file.schema_arrow, file.metadata.num_rows, batches)


def _arrow(pyarrow: Any, stream: Any) -> _Table:
    """The file format, which Feather is too, or the stream format."""
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file: Any = pyarrow.ipc.open_file(stream)

        def of_file(names: Sequence[str]) -> Iterator[Any]:
            for number in range(file.num_record_batches):
                yield from _sliced(file.get_batch(number))

        return _Table(file.schema, 0, of_file)
    reader: Any = pyarrow.ipc.open_stream(stream)

    def of_stream(names: Sequence[str]) -> Iterator[Any]:
        for batch in reader:
            yield from _sliced(batch)

    return _Table(reader.schema, 0, of_stream)


def _sliced(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)


def table_bytes(columns: Mapping[str, object], vectors: Vectors) -> bytes:
    """A Parquet file of columns, and of a column `vector` of float32."""
    arrow = import_pyarrow("Parquet")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    flat = arrow.array(vectors.reshape(-1), arrow.float32())
    packed = arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    stream = io.BytesIO()
    parquet.write_table(arrow.table({**columns, "vector": packed}), stream)
    return stream.getvalue()
