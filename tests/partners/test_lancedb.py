"""`embed -o NAME.lance` with LanceDB itself: `pytest -m partners`."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from commands import run_command
from test_docs import BLOCK, partner_of
from test_jobs import SLOW_COMMAND, Run, run  # noqa: F401  (a fixture)

from gguf_embed import Embedder, Settings, cli
from gguf_embed.io import lance
from gguf_embed.io.stored import read_vectors

lancedb: Any = pytest.importorskip("lancedb")
pytestmark = [pytest.mark.partners, pytest.mark.filterwarnings("default")]

DOCS = Path(__file__).parents[2] / "docs"
N_ROWS = 600


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"id": row, "text": f"text number {row}"} for row in range(N_ROWS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ids(path: Path) -> list[str]:
    return lancedb.connect(path.parent).open_table(path.stem).to_arrow()["id"].to_pylist()


def test_what_was_embedded_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("id,text\n7,a cat sleeps\n9,the stock exchange closes\n")
    command = ["embed", "rows.csv", "--field", "text", "--id-field", "id", "--with-text"]
    for output in ("db/rows.lance", "v/"):
        assert cli.main([*command, "--keep", "id", "-o", output]) == 0
    table = lancedb.connect("db").open_table("rows")
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        (first, _) = table.search(embedder.encode_query("kittens")).limit(2).to_list()
        fingerprint = embedder.fingerprint().id
    assert json.loads(table.schema.metadata[b"gguf_embed"])["fingerprint"] == fingerprint
    assert (first["id"], first["fields_id"], first["text"]) == ("7", "7", "a cat sleeps")
    of_table, of_folder = read_vectors(["db/rows.lance", "v"], fingerprint=fingerprint)
    np.testing.assert_array_equal(of_table.vectors, of_folder.vectors)
    (code,) = [
        code
        for _, code in BLOCK.findall((DOCS / "jobs.md").read_text("utf-8"))
        if partner_of(code) == "lancedb"
    ]
    capsys.readouterr()
    exec(compile(code, "<docs>", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["9", "7"]


@pytest.mark.parametrize("kind", ["float32", "float16", "binary"])
def test_rows_that_failed_have_no_vector_and_are_not_found(
    run: Run,  # noqa: F811
    tmp_path: Path,
    kind: str,
):
    path, output = tmp_path / "rows.jsonl", tmp_path / "t.lance"
    path.write_text('{"text": "good"}\nnothing\n{"text": "bad"}\n')
    assert run(path, "-o", output, "--vector-type", kind)[0] == 8
    table = lancedb.connect(tmp_path).open_table("t")
    assert [each is None for each in table.to_arrow()["vector"].to_pylist()] == [False, True]
    query = np.zeros(8, np.uint8) if kind == "binary" else np.ones(64, np.float32)
    metric = "hamming" if kind == "binary" else "cosine"
    found = table.search(query, vector_column_name="vector").distance_type(metric).to_list()
    assert len(found) == 1
    (stored,) = read_vectors([output])
    assert np.isnan(stored.vectors).all(axis=1).tolist() == [False, True]


def test_int8_is_not_searched(tmp_path: Path):
    """As long as this holds, the command refuses it."""
    vectors = pa.array([[1, 2]], pa.list_(pa.int8(), 2))
    table = lancedb.connect(tmp_path).create_table("t", pa.table({"vector": vectors}))
    with pytest.raises(ValueError, match="element type Int8"):
        table.search(np.ones(2, np.float32), vector_column_name="vector").to_list()


def test_kills_lose_and_double_no_row(run: Run, rows: Path, tmp_path: Path):  # noqa: F811
    """SIGKILL while it computes, and while the table is made; a second process is refused."""
    output, folder = tmp_path / "db" / "t.lance", tmp_path / "db" / "t.lance.job"
    arguments = [str(rows), "--id-field", "id", "-o", str(output), "--shard-rows", "20"]
    command = [sys.executable, "-c", SLOW_COMMAND, "0.01", "50", "embed", *arguments, "--resume"]
    chance = random.Random(7)

    def killed_at(path: Path, within_s: float) -> bool:
        """Whether a run was killed so long after it had made `path` anew; else it has ended."""
        before = path.stat().st_ctime_ns if path.exists() else None
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (path.exists() and path.stat().st_ctime_ns != before):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, within_s))
        process.send_signal(signal.SIGSTOP)  # so that it is at work however long this takes
        if process.poll() is None and path.name != ".table":
            code, _, err = run(*arguments, "--resume")
            assert (code, "another run is at work" in err) == (7, True)
        process.kill()
        process.communicate()
        return process.returncode != 0

    for _ in range(5):
        n_shards = len([*folder.glob("part-*")])
        assert killed_at(folder / f"part-{n_shards + 1:05}.parquet", 0.05)
        assert not output.exists()
    n_killed = 0
    while folder.exists() and killed_at(folder / ".table", 0.02):
        n_killed += 1
        assert not output.exists() or ids(output) == [str(row) for row in range(N_ROWS)]
        if n_killed == 10 and folder.exists():
            assert run(*arguments, "--resume")[0] == 0
    assert n_killed > 0
    assert ids(output) == [str(row) for row in range(N_ROWS)]
    assert [each.name for each in output.parent.iterdir()] == ["t.lance"]
    whole = tmp_path / "whole.lance"
    assert run(*arguments[:3], "-o", whole, "--shard-rows", "20")[0] == 0
    tables = [lance.read_table(each) for each in (output, whole)]
    assert tables[0].to_pydict() == tables[1].to_pydict()


def test_what_lancedb_refuses_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    interval = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    with pytest.raises(lance.BadOption, match=r"Unsupported data type: Interval\(MonthDayNano\)$"):
        lance.table_schema(pa.table({"i": interval}).schema, tmp_path / "t.lance")
    (tmp_path / "rows.txt").write_text("a\n")
    code, _, err = partial(run_command, capsys)(
        "embed", tmp_path / "rows.txt", "-o", tmp_path / "ä.lance"
    )
    assert (code, "in the name of a table" in err) == (2, True)
