"""What a shard of a job holds, as the bytes of a file.

    .parquet  a row per text: id, source, position, last_position, truncated, what was kept, vector
    .jsonl    a line per text, as in NAME.jsonl
    .rows     the rows of an array: float32, without a header

The same rows give the same bytes, with the same pyarrow.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from gguf_embed.errors import BadInput
from gguf_embed.io.extras import import_pyarrow
from gguf_embed.io.record import Record
from gguf_embed.io.vector_packing import pack, width
from gguf_embed.io.vector_types import VectorType
from gguf_embed.io.write import RowContent, json_line
from gguf_embed.vectors import Vectors

METADATA: Final = (
    b"gguf_embed"  # the key of what made the vectors, in the metadata of a Parquet file
)
OWN_COLUMNS: Final = (
    *("id", "source", "position", "last_position", "truncated", "start", "end", "headings"),
    *("text", "vector", "scale"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Texts with their vectors."""

    records: Sequence[Record]
    vectors: Vectors  # (n, dim); all NaN where a row has none
    truncated: Sequence[bool]


class ShardFormat(Protocol):
    """How rows become the bytes of a file."""

    @property
    def ending(self) -> str:
        """Of the files."""
        ...

    def encode(self, rows: Rows) -> bytes:
        """A whole file."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LineShards:
    """Lines of JSON."""

    content: RowContent
    ending: str = ".jsonl"

    def encode(self, rows: Rows) -> bytes:
        """A line per row."""
        lines = zip(rows.records, rows.vectors, rows.truncated, strict=True)
        return b"".join(json_line(*row, self.content) for row in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayShards:
    """Rows of float32."""

    ending: str = ".rows"

    def encode(self, rows: Rows) -> bytes:
        """The values, row after row."""
        return np.ascontiguousarray(rows.vectors, "<f4").tobytes()


class ParquetShards:
    """Tables."""

    ending = ".parquet"

    def __init__(
        self,
        *,
        dim: int,
        vector_type: VectorType,
        content: RowContent,
        chunks: bool,
        kept: Sequence[str] | None,
        kept_types: Mapping[str, Any],
        about: Mapping[str, object],
    ) -> None:
        """`kept` are the names of kept fields; without types these are texts, or JSON as text.

        With `kept` None, for fields whose names nobody said, all of a row are one column of JSON.
        """
        self._arrow = import_pyarrow("Parquet")
        self._parquet: Any = importlib.import_module("pyarrow.parquet")
        self._vector_type: VectorType = vector_type
        self._width = width(dim, vector_type)
        self._content = content
        self._chunks = chunks
        self._kept = kept
        self._kept_types = kept_types
        self.schema: Any = self._made_schema(about)

    def encode(self, rows: Rows) -> bytes:
        """One row group."""
        arrow, records = self._arrow, rows.records
        columns: dict[str, Any] = {
            "id": [record.id for record in records],
            "source": [record.source for record in records],
            "position": [record.position for record in records],
            "last_position": [record.last_position for record in records],
            "truncated": [*rows.truncated],
        }
        if self._chunks:
            parts = [record.part for record in records]
            columns["start"] = [part and part.start for part in parts]
            columns["end"] = [part and part.end for part in parts]
            columns["headings"] = [part and list(part.headings) for part in parts]
        if self._content.text:
            columns["text"] = [record.text for record in records]
        if self._content.fields and self._kept is None:
            columns["fields"] = [_as_text(dict(record.fields)) for record in records]
        for name in (self._kept or ()) if self._content.fields else ():
            values = [record.fields.get(name) for record in records]
            if name not in self._kept_types:
                values = [_as_text(value) for value in values]
            columns[_column(name)] = values
        lost = np.isnan(rows.vectors).all(axis=1) if len(records) else np.zeros(0, np.bool_)
        packed = pack(rows.vectors, self._vector_type)
        flat = arrow.array(packed.values.reshape(-1))
        columns["vector"] = arrow.FixedSizeListArray.from_arrays(
            flat, self._width, mask=arrow.array(lost)
        )
        if packed.scales is not None:
            columns["scale"] = arrow.array(packed.scales, mask=lost)
        try:
            arrays = [
                arrow.array(columns[field.name], field.type)
                if isinstance(columns[field.name], list)
                else columns[field.name].cast(field.type)
                for field in self.schema
            ]
        except arrow.ArrowException as error:
            raise BadInput(f"a kept field does not fit its column: {error}") from error
        sink = io.BytesIO()
        self._parquet.write_table(
            arrow.Table.from_arrays(arrays, schema=self.schema),
            sink,
            row_group_size=max(1, len(records)),
            # Vectors do not get smaller, and reading them is faster as they are.
            compression={
                name: "NONE" if name.startswith("vector") else "ZSTD" for name in self._leaves()
            },
            use_dictionary=False,
            write_statistics=False,
        )
        return sink.getvalue()

    def _made_schema(self, about: Mapping[str, object]) -> Any:
        arrow = self._arrow
        value = {
            "float32": arrow.float32(),
            "float16": arrow.float16(),
            "int8": arrow.int8(),
            "binary": arrow.uint8(),
        }[self._vector_type]
        fields: list[tuple[str, Any]] = [
            ("id", arrow.string()),
            ("source", arrow.string()),
            ("position", arrow.int64()),
            ("last_position", arrow.int64()),
            ("truncated", arrow.bool_()),
        ]
        if self._chunks:
            fields += [("start", arrow.int64()), ("end", arrow.int64())]
            fields.append(("headings", arrow.list_(arrow.string())))
        if self._content.text:
            fields.append(("text", arrow.string()))
        if self._content.fields and self._kept is None:
            fields.append(("fields", arrow.string()))
        for name in (self._kept or ()) if self._content.fields else ():
            fields.append((_column(name), self._kept_types.get(name, arrow.string())))
        fields.append(("vector", arrow.list_(value, self._width)))
        if self._vector_type == "int8":
            fields.append(("scale", arrow.float32()))
        metadata = {METADATA: json.dumps(about, ensure_ascii=True).encode()}
        return arrow.schema(fields, metadata=metadata)

    def _leaves(self) -> list[str]:
        """The names of columns as Parquet has them, those inside lists with their path."""
        sink = io.BytesIO()
        self._parquet.ParquetWriter(sink, self.schema).close()
        schema: Any = self._parquet.ParquetFile(io.BytesIO(sink.getvalue())).schema
        return [schema.column(i).path for i in range(len(schema))]


def _column(name: str) -> str:
    """The column of a kept field: its own name, where that is not taken."""
    return f"fields.{name}" if name in (*OWN_COLUMNS, "fields") else name


def _as_text(value: object) -> str | None:
    """A text as it is, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
