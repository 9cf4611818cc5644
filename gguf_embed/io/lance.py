"""Tables of LanceDB, each of which is the folder NAME.lance inside that of its database.

    db/rows.lance    lancedb.connect("db").open_table("rows")

A table is made of Parquet files aside, and takes its name once it is complete and on disk.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from gguf_embed.errors import BadInput, BadOption, OutputFailed
from gguf_embed.io.extras import import_pyarrow
from gguf_embed.system.files import place_folder, printable

ENDING: Final = ".lance"
INSTALL: Final = "pip install 'gguf-embed[lancedb]'"
_JOB: Final = b"gguf_embed_job"  # the key of what made a table, in its metadata
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")
_REFUSALS: Final = (OSError, RuntimeError, ValueError)  # of lancedb: it has no errors of its own


def is_table(output: str | Path) -> bool:
    """Whether it is to be a table."""
    return Path(output).suffix == ENDING


def check_table(path: Path) -> None:
    """Refuse a table that cannot be made. Raises BadOption; nothing is imported."""
    shown = printable(path)
    if importlib.util.find_spec("lancedb") is None:
        raise BadOption(f"-o {shown}: takes lancedb, which is not installed: {INSTALL}")
    if not _NAME.fullmatch(path.stem):
        raise BadOption(
            f"-o {shown}: LanceDB takes letters from a to z, digits, and _ . - in the name of a "
            "table; choose another name"
        )


def table_schema(schema: Any, path: Path) -> Any:
    """That of the table for shards of `schema`. Raises BadOption for what LanceDB cannot hold."""
    names = [name.replace(".", "_") for name in schema.names]  # it takes no full stop
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadOption(
            f"-o {printable(path)}: two columns would be called {twice[0]}, since LanceDB takes "
            "no full stop in their names; keep one of them"
        )
    arrow = import_pyarrow("LanceDB")
    fields = [field.with_name(name) for field, name in zip(schema, names, strict=True)]
    made = arrow.schema(fields, metadata=schema.metadata)
    with TemporaryDirectory(prefix="gguf_embed-") as folder:
        try:
            _connect(Path(folder)).create_table("empty", schema=made)
        except _REFUSALS as error:
            raise BadOption(f"-o {printable(path)}: LanceDB refuses: {_first(error)}") from error
    return made


def write_table(path: Path, parts: Sequence[Path], schema: Any, *, job: str, work: Path) -> None:
    """Make the table of `parts`, in the folder `work` at first; `schema` is of `table_schema`.

    One that `job` has made already stays. Raises OutputFailed; `parts` stay.
    """
    shown = printable(path)
    if path.exists():
        if _job_of(path) == job.encode():
            return
        raise OutputFailed(
            f"{shown}: has come into being meanwhile; move it away, then go on with --resume"
        )
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    schema = schema.with_metadata({**schema.metadata, _JOB: job.encode()})
    try:
        # A row that failed has no vector, which LanceDB takes for a mistake unless it is told.
        _connect(work).create_table(
            path.stem, _batches(parts, schema), schema=schema, on_bad_vectors="null"
        )
    except _REFUSALS as error:
        raise OutputFailed(
            f"{shown}: not written: {_first(error)}; all vectors are kept: make room, then go on "
            "with --resume"
        ) from error
    place_folder(work / path.name, path)


def read_table(path: Path) -> Any:
    """All of a table, as one of Arrow. Raises BadInput."""
    return _of_table(path, lambda table: table.to_arrow())


def _of_table(path: Path, get: Callable[[Any], Any]) -> Any:
    shown = printable(path)
    if importlib.util.find_spec("lancedb") is None:
        raise BadInput(f"{shown}: takes lancedb: {INSTALL}")
    try:
        return get(_connect(path.parent).open_table(path.stem))
    except _REFUSALS as error:
        raise BadInput(f"{shown}: no table of LanceDB, or damaged: {_first(error)}") from error


def _job_of(path: Path) -> bytes | None:
    """What has made a table, where it says so."""
    try:
        metadata: dict[bytes, bytes] = _of_table(path, lambda table: table.schema).metadata or {}
    except BadInput:
        return None
    return metadata.get(_JOB)


def _batches(parts: Sequence[Path], schema: Any) -> Iterator[Any]:
    """The rows of all files, a file at a time."""
    arrow = import_pyarrow("LanceDB")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    for part in parts:
        for batch in parquet.ParquetFile(part).read().to_batches():
            yield arrow.RecordBatch.from_arrays(batch.columns, schema=schema)


def _connect(folder: Path) -> Any:
    return importlib.import_module("lancedb").connect(folder)


def _first(error: Exception) -> str:
    """What LanceDB says, without the place in its own sources."""
    return str(error).partition(", /")[0].splitlines()[0]
