"""Vectors read back: files and folders that hold one vector space, or an error that names two.

for stored in read_vectors(["vectors/", "more.jsonl"]):
    stored.ids, stored.vectors      # of one file, float32
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from gguf_embed.errors import BadInput
from gguf_embed.io.extras import import_pyarrow
from gguf_embed.io.lance import ENDING, is_table, read_table
from gguf_embed.io.shards import METADATA
from gguf_embed.io.sources import readable
from gguf_embed.io.vector_packing import Packed, unpack
from gguf_embed.io.vector_types import DTYPES, VectorType
from gguf_embed.system.files import printable
from gguf_embed.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVectors:
    """What one file holds."""

    path: Path
    about: Mapping[str, Any]  # what made it: "fingerprint", "model", "dim", ...
    ids: Sequence[str]  # of an array the numbers of its rows, from 0
    vectors: Vectors  # (n, dim) float32; all NaN where a row has none


def read_vectors(
    paths: Iterable[str | Path], *, fingerprint: str | None = None
) -> Iterator[StoredVectors]:
    """The vectors of .parquet, .jsonl, .npy, .lance and folders of a job, one after the other.

    All must be of the space `fingerprint`, else of that of the first. Raises BadInput for two
    spaces, for a file that does not say its own, for a job that is not complete, and for damage.
    """
    first: StoredVectors | None = None
    for path in _files(Path(each) for each in paths):
        stored = _read(path)
        wanted = fingerprint or (first or stored).about["fingerprint"]
        if stored.about["fingerprint"] != wanted:
            about = stored.about
            other = "" if first is None else f" as {printable(first.path)} is"
            raise BadInput(
                f"{printable(path)}: is of the vector space {about['fingerprint']} "
                f"({about.get('model')} {about.get('quant')}), not of {wanted}{other}; "
                "vectors of two spaces cannot be compared: embed one of them again"
            )
        first = first or stored
        yield stored


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if is_table(path) or not path.is_dir():
            yield path
            continue
        with readable(printable(path)):
            lines = (path / "manifest.jsonl").read_bytes().splitlines()
        try:
            entries: list[Any] = [json.loads(line) for line in lines]
            finished = "n_shards" in entries[-1]
            names = [cast("str", entry["file"]) for entry in entries[1 : -1 if finished else None]]
        except (ValueError, IndexError, TypeError, KeyError):
            finished, names = False, []
        if not finished:
            raise BadInput(
                f"{printable(path)}: the job there is not complete; go on with it: "
                "gguf-embed embed ... --resume"
            )
        yield from (path / name for name in names)


def _read(path: Path) -> StoredVectors:
    with readable(printable(path)):
        match path.suffix.lower():
            case ".parquet":
                return _parquet(path)
            case ".npy":
                vectors: Vectors = np.load(path, mmap_mode="r")
                ids = [str(row) for row in range(len(vectors))]
                return StoredVectors(path=path, about=_beside(path), ids=ids, vectors=vectors)
            case ".jsonl":
                return _lines(path)
            case suffix if suffix == ENDING:
                return _of_table(read_table(path), path)
            case _:
                raise BadInput(
                    f"{printable(path)}: holds no vectors that are known here; name .parquet, "
                    ".jsonl, .npy or .lance"
                )


def _parquet(path: Path) -> StoredVectors:
    pyarrow = import_pyarrow(printable(path))
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        return _of_table(parquet.read_table(path), path)
    except pyarrow.ArrowException as error:
        raise BadInput(f"{printable(path)}: not Parquet, or damaged: {error}") from error


def _of_table(table: Any, path: Path) -> StoredVectors:
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    about = _about(metadata.get(METADATA), path)
    vector_type: VectorType = about.get("vector_type", "float32")
    column = table.column("vector").combine_chunks()
    lost = column.is_null().to_numpy(zero_copy_only=False)
    width = column.type.list_size
    # Of the buffer itself: a missing vector has its place in it as well.
    buffer = column.values.buffers()[1] if len(column) else b""
    start = (column.offset + column.values.offset // width) * width
    values = np.frombuffer(buffer, DTYPES[vector_type])[start : start + len(column) * width]
    scales = None
    if vector_type == "int8":
        scales = np.nan_to_num(table.column("scale").to_numpy()).astype(np.float32)
    packed = Packed(values=values.reshape(len(column), width), scales=scales)
    vectors = unpack(packed, vector_type)
    vectors[lost] = np.nan
    return StoredVectors(
        path=path, about=about, ids=table.column("id").to_pylist(), vectors=vectors
    )


def _lines(path: Path) -> StoredVectors:
    about = _beside(path)
    ids: list[str] = []
    rows: list[Vectors] = []
    lost = np.full(int(about["dim"]), np.nan, np.float32)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row: dict[str, Any] = json.loads(line)
                vector = row["vector"]
                rows.append(lost if vector is None else np.array(vector, np.float32))
                ids.append(row["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(
                    f"{printable(path)}, line {number}: holds no vector: {error}"
                ) from error
    vectors = np.stack(rows) if rows else np.empty((0, len(lost)), np.float32)
    return StoredVectors(path=path, about=about, ids=ids, vectors=vectors)


def _beside(path: Path) -> Mapping[str, Any]:
    beside = path.with_name(path.name + ".meta.json")
    return _about(beside.read_bytes() if beside.exists() else None, path)


def _about(data: bytes | None, path: Path) -> Mapping[str, Any]:
    try:
        about: object = json.loads(data or b"null")
    except ValueError:
        about = None
    if not isinstance(about, dict) or "fingerprint" not in about:
        raise BadInput(
            f"{printable(path)}: does not say what made its vectors, so they may be of any space; "
            "embed the texts again"
        )
    return cast("dict[str, Any]", about)
