"""Tables of LanceDB, by a stand-in; tests/partners/test_lancedb.py has the package itself."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import run_command
from test_jobs import Run, rows, run  # noqa: F401  (fixtures)

from gguf_embed.cli import bulk
from gguf_embed.errors import BadInput, BadOption, OutputFailed
from gguf_embed.io import lance
from gguf_embed.io.stored import read_vectors
from gguf_embed.system import files


class FakeLance:
    """A database whose tables are folders with one Parquet file."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def create_table(
        self, name: str, data: Any = (), *, schema: pa.Schema, on_bad_vectors: str = "error"
    ) -> None:
        for field in schema:
            if "." in field.name or pa.types.is_interval(field.type):
                raise RuntimeError(f"lance error: Unsupported: {field.name}, /root/schema.rs:1")
        folder = self.folder / f"{name}.lance"
        folder.mkdir(parents=True)
        with pyarrow.parquet.ParquetWriter(folder / "data", schema) as writer:
            for batch in data:
                if batch.column("vector").null_count and on_bad_vectors != "null":
                    raise ValueError("Vector column 'vector' has variable length vectors")
                writer.write_batch(batch)

    def open_table(self, name: str) -> Any:
        path = self.folder / f"{name}.lance" / "data"
        if not path.exists():
            raise ValueError(f"Table '{name}' was not found")
        file = pyarrow.parquet.ParquetFile(path)
        return SimpleNamespace(schema=file.schema_arrow, to_arrow=file.read)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "lancedb", SimpleNamespace(connect=FakeLance))
    monkeypatch.setattr(
        lance.importlib.util, "find_spec", lambda name: name == "lancedb" or find(name)
    )


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lance.importlib.util, "find_spec", lambda name: None)


def table_of(path: Path) -> pa.Table:
    return FakeLance(path.parent).open_table(path.stem).to_arrow()


@pytest.mark.usefixtures("installed")
def test_a_table_has_the_rows_of_a_folder(run: Run, rows: Path, tmp_path: Path):  # noqa: F811
    command = (rows, "--id-field", "id", "--keep", "tag,id", "--with-text", "--shard-rows", 5)
    path = tmp_path / "db" / "rows.lance"
    assert run(*command, "-o", path)[0] == 0
    assert run(*command, "-o", f"{tmp_path / 'v'}/")[0] == 0
    table = table_of(path)
    shards = pyarrow.parquet.read_table([*sorted((tmp_path / "v").glob("part-*"))])
    assert table.column_names == [name.replace(".", "_") for name in shards.column_names]
    assert table.to_pydict() == shards.rename_columns(table.column_names).to_pydict()
    assert table.schema.metadata[b"gguf_embed"] == shards.schema.metadata[b"gguf_embed"]
    assert [each.name for each in path.parent.iterdir()] == ["rows.lance"]
    of_table, *of_shards = read_vectors([path, tmp_path / "v"])
    np.testing.assert_array_equal(of_table.vectors, np.vstack([s.vectors for s in of_shards]))
    with pytest.raises(BadInput, match="not of another"):
        next(read_vectors([path], fingerprint="another"))
    code, _, err = run(*command, "-o", f"{path}/", "--resume")
    assert (code, "no table is written over" in err) == (2, True)


@pytest.mark.usefixtures("installed")
def test_failed_rows_of_a_table(run: Run, tmp_path: Path):  # noqa: F811
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\nnothing\n{"text": "bad"}\n')
    assert run(path, "-o", tmp_path / "t.lance", "--vector-type", "float16")[0] == 8
    assert table_of(tmp_path / "t.lance").column("vector").null_count == 1
    side = (tmp_path / "t.lance.failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["position"] for line in side] == [2, 3]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("when", ["written", "placed", "tidied"])
def test_a_table_that_was_interrupted_is_made_whole(
    run: Run,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
):
    """Whatever ends the run, each row is in the table once; nothing is computed twice."""
    path = tmp_path / "t.lance"
    command = (rows, "-o", path, "--resume", "--shard-rows", 5, "--json")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_at_job(folder: Path | str, *_: object, **__: object) -> None:
        if Path(folder).suffix == ".job":
            fail()

    with monkeypatch.context() as broken:
        if when == "written":
            broken.setattr(pyarrow.parquet.ParquetWriter, "write_batch", fail)
        elif when == "placed":
            broken.setattr(files, "_rename", fail)
        else:
            broken.setattr(bulk.shutil, "rmtree", fail_at_job)
        code, _, err = run(*command)
        assert code != 0
        assert "No space left on device" in err
    assert path.exists() == (when == "tidied")
    code, out, _ = run(*command)
    assert (code, json.loads(out)["n_kept_shards"]) == (0, 5)
    assert table_of(path).num_rows == 23
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows.jsonl", "t.lance"]


@pytest.mark.usefixtures("installed")
def test_a_table_of_others_stays(run: Run, rows: Path, tmp_path: Path):  # noqa: F811
    path, schema = tmp_path / "t.lance", pa.schema([("vector", pa.list_(pa.float32(), 2))])
    FakeLance(tmp_path).create_table("t", schema=schema)
    code, _, err = run(rows, "-o", path, "--dry-run")
    assert (code, "is there already" in err) == (2, True)
    for damage in (False, True):
        (tmp_path / "t.lance.job").mkdir(exist_ok=True)
        if damage:
            (path / "data").unlink()
        code, _, err = run(rows, "-o", path, "--resume")
        assert (code, "has come into being meanwhile" in err) == (7, True)
    shutil.rmtree(path)
    assert run(rows, "-o", path, "--resume")[0] == 0
    assert table_of(path).num_rows == 23


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("output", "more", "complaint"),
    [
        ("my table.lance", [], "in the name of a table"),
        ("t.lance", ["--vector-type", "int8"], "does not search it"),
        ("t.lance", ["--late-chunking"], "is not for jobs"),
        ("t.lance", ["--ray", "local"], "is for a folder"),
    ],
)
def test_what_a_table_cannot_be(
    run: Run,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    output: str,
    more: list[str],
    complaint: str,
):
    code, _, err = run(rows, "-o", tmp_path / output, *more)
    assert (code, complaint in err) == (2, True), err
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.usefixtures("installed")
def test_columns_that_lancedb_does_not_take(run: Run, tmp_path: Path):  # noqa: F811
    path, text = tmp_path / "rows.parquet", pa.array(["a"])
    for columns, complaint in (
        ({"a.b": text, "a_b": text}, "two columns would be called a_b"),
        ({"i": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}, "LanceDB refuses: lance"),
    ):
        pyarrow.parquet.write_table(pa.table({"text": text}), path)
        schema = pa.table({"text": text, **columns}).schema
        with pytest.raises(BadOption, match=complaint) as refused:
            lance.table_schema(schema, path)
        assert "/root" not in str(refused.value)


@pytest.mark.usefixtures("absent")
def test_lancedb_is_missing(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Told before a model is opened: no engine is here."""
    command = partial(run_command, capsys, "embed")
    code, _, err = command(rows, "-o", tmp_path / "t.lance", "--model", "is-not-there")
    assert (code, "pip install 'gguf-embed[lancedb]'" in err) == (2, True)
    with pytest.raises(BadInput, match=r"pip install 'gguf-embed\[lancedb\]'"):
        [*read_vectors([tmp_path / "t.lance"])]
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.usefixtures("installed")
def test_a_folder_that_cannot_be_placed(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(OutputFailed, match="not written: Directory not empty"):
        files.place_folder(tmp_path / "a", tmp_path / "b")
    files.place_folder(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "a" / "file").exists()
