"""Parquet, Arrow and compressed files; rows that cannot be used; patterns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from gguf_embed.errors import BadInput
from gguf_embed.io import extras, tables
from gguf_embed.io.read import read
from gguf_embed.io.record import Reading, Record, UnreadableRow
from gguf_embed.io.sources import find

N_ROWS = 2500  # more than two batches


def table(**columns: Any) -> pa.Table:
    columns.setdefault("text", [f"text {row}" for row in range(N_ROWS)])
    columns.setdefault("n", [*range(len(columns["text"]))])
    return pa.table(columns)


def write_stream(rows: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, rows.schema) as writer:
        writer.write_table(rows)


WRITERS: dict[str, Callable[[pa.Table, Path], object]] = {
    "rows.parquet": lambda rows, path: pa.parquet.write_table(rows, path, row_group_size=1000),
    "rows.feather": lambda rows, path: pa.feather.write_feather(rows, str(path)),
    "rows.arrow": write_stream,
}


def records(path: Path, on_bad_row: Any = None, **reading: Any) -> list[Record]:
    return [*read(find([str(path)]), Reading(**reading), on_bad_row=on_bad_row)]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_tables(tmp_path: Path, name: str):
    path = tmp_path / name
    WRITERS[name](table(other=[None] * N_ROWS), path)
    rows = records(path, id_field="n", keep=("n",))
    assert [row.text for row in rows] == [f"text {row}" for row in range(N_ROWS)]
    assert [row.position for row in rows] == [*range(1, N_ROWS + 1)]
    assert (rows[7].id, rows[7].fields) == ("7", {"n": 7})
    assert records(path)[7].id == f"{path}:8"
    assert dict(records(path, keep_all=True)[7].fields) == {"n": 7, "other": None}
    read_bytes = [row.read_bytes for row in rows]
    assert read_bytes == sorted(read_bytes)
    if name == "rows.parquet":
        assert read_bytes[-1] == path.stat().st_size


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_of_other_types(tmp_path: Path, kind: Any):
    path = tmp_path / "rows.parquet"
    pa.parquet.write_table(table(text=pa.array(["a", "b", "a"], kind)), path)
    assert [row.text for row in records(path)] == ["a", "b", "a"]


def test_what_is_no_table_is_named(tmp_path: Path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"nothing that anyone wrote")
        with pytest.raises(BadInput, match=rf"{name}: not .*, or damaged"):
            records(tmp_path / name)
    path = tmp_path / "b.parquet"
    pa.parquet.write_table(table(text=["a", None, "c"], n=["x", "y", None]), path)
    with pytest.raises(BadInput, match=r"b\.parquet: no field 'body'; the fields are 'text', 'n'"):
        records(path, field="body")
    with pytest.raises(BadInput, match=r"b\.parquet, row 2: field 'text' holds null"):
        records(path)
    bad: list[UnreadableRow] = []
    assert [row.text for row in records(path, bad.append, id_field="n")] == ["a"]
    assert [(each.source, each.position) for each in bad] == [(str(path), 2), (str(path), 3)]


def test_without_pyarrow_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(table(), path)

    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", fail)
    with pytest.raises(BadInput, match=r"takes pyarrow: pip install 'gguf-embed\[arrow\]'"):
        records(path)


def test_types_of_kept_columns_are_those_of_all_tables(tmp_path: Path):
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pa.parquet.write_table(table(text=["x"]), a)
    pa.parquet.write_table(table(text=["x"]), b)
    reading = Reading(keep=("n",))
    assert tables.kept_types(find([str(a), str(b)]), reading) == {"n": pa.int64()}
    assert tables.kept_types(find([str(a)]), Reading(keep_all=True)) == {"n": pa.int64()}
    pa.parquet.write_table(table(text=["x"], n=["y"]), b)
    assert tables.kept_types(find([str(a), str(b)]), reading) == {}
    (tmp_path / "c.csv").write_text("text,n\nx,1\n")
    assert tables.kept_types(find([str(a), str(tmp_path / "c.csv")]), reading) == {}


# -- compressed ------------------------------------------------------------------------------

LINES = "".join(json.dumps({"text": f"text {row}"}) + "\n" for row in range(5000)).encode()


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".zst", lambda data: pa.compress(data, "zstd", asbytes=True))],
)
def test_compressed_files(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]):
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(pack(LINES[:70_000]) + pack(LINES[70_000:]))  # as parts put together are
    rows = records(path)
    assert [row.text for row in rows] == [f"text {row}" for row in range(5000)]
    assert rows[0].read_bytes <= rows[-1].read_bytes <= path.stat().st_size
    (source,) = find([str(tmp_path)])
    assert (source.kind, source.packing) == (".jsonl", ending)
    whole = pack(LINES)
    for damaged in (whole[: len(whole) // 2], b"no such thing" * 9):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=rf"rows\.jsonl\{ending}"):
            records(path)


# -- rows that cannot be used ------------------------------------------------------------------


def test_bad_rows_are_named_and_the_others_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n\n[]\n{"text": 5}\n{"text": "\xff"}\n{no\n{"body": ""}\n'
        b'{"text": "end"}\n'
    )
    bad: list[UnreadableRow] = []
    assert [row.text for row in records(path, bad.append)] == ["good", "end"]
    assert [each.position for each in bad] == [3, 4, 5, 6, 7]
    assert "not UTF-8" in str(bad[2])
    with pytest.raises(BadInput, match="line 1: no field 'body'"):
        records(path, bad.append, field="body")


def test_bad_rows_of_csv_and_lines(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("text,n\na,1\nb\nc,3\n")
    bad: list[UnreadableRow] = []
    assert [row.text for row in records(path, bad.append)] == ["a", "c"]
    assert "1 columns where the header has 2" in str(bad[0])
    path.write_bytes(b'text,n\n"a\n\xff",1\n')  # the row would be another without that line
    with pytest.raises(BadInput, match="not UTF-8"):
        records(path, bad.append)
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n\xff\nc\n")
    assert [(row.text, row.position) for row in records(path, bad.append)] == [("a", 1), ("c", 3)]


# -- patterns ----------------------------------------------------------------------------------


def test_patterns_that_the_shell_left(tmp_path: Path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")

    def found(pattern: str) -> list[str]:
        return [Path(source.name).name for source in find([str(tmp_path / pattern)])]

    assert found("[ab].txt") == ["a.txt", "b.txt"]
    assert found("**/*.txt") == ["[x].txt", "a.txt", "b.txt", "c.txt"]
    assert found("d*") == ["c.txt"]
    assert found("[x].txt") == ["[x].txt"]
    with pytest.raises(BadInput, match="no such file"):
        find([str(tmp_path / "q*")])
