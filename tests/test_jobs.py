"""Jobs: cut by content, whole shards, and what is done stays done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from commands import run_command
from hypothesis import given
from hypothesis import strategies as st
from test_vector_cache import Failing

from gguf_embed.cli import console, options
from gguf_embed.errors import BadInput, BadOption, OutputFailed, duration
from gguf_embed.io.record import Record, UnreadableRow
from gguf_embed.io.shards import ArrayShards
from gguf_embed.jobs import manifest
from gguf_embed.jobs.cut import BYTES_PER_ROW, cut
from gguf_embed.jobs.encode import Encoded
from gguf_embed.jobs.forecast import Counts, Sample, forecast
from gguf_embed.jobs.job import Job, entry_of
from gguf_embed.jobs.manifest import FailedPlace, Header, ShardEntry
from gguf_embed.jobs.output import JobOutput, open_output
from gguf_embed.plan.settings import RunSettings
from gguf_embed.system import files
from gguf_embed.system.lock import Lock
from gguf_embed.testing import FakeEmbedder

DIM = 64
HEADER = Header(made_with={"model": "fake"}, run={"n_contexts": 1})


def record(row: int, text: str | None = None) -> Record:
    return Record(
        id=f"r{row}",
        text=f"text number {row}" if text is None else text,
        source="rows.txt",
        position=row,
        last_position=row,
        read_bytes=10 * row,
    )


RECORDS = [record(row) for row in range(1, 24)]


# -- cutting -----------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=900), max_size=40), st.integers(1, 9))
def test_every_record_is_in_one_shard_and_the_cuts_are_those_of_the_input(
    texts: list[str], shard_rows: int
):
    records = [record(row, text) for row, text in enumerate(texts)]
    shards = [*cut(records, [], shard_rows=shard_rows)]
    assert [each for shard in shards for each in shard.records] == records
    assert [shard.index for shard in shards] == [*range(max(1, len(shards)))]
    for shard in shards:
        assert len(shard.records) <= shard_rows
        before = sum(len(each.text) for each in shard.records[:-1])
        assert before < shard_rows * BYTES_PER_ROW
    assert shards == [*cut(iter(records), [], shard_rows=shard_rows)]
    # Later records change no earlier shard but the last.
    more = [*cut([*records, record(99)], [], shard_rows=shard_rows)]
    assert more[: len(shards) - 1] == shards[:-1]


@pytest.mark.parametrize(
    "change", [{"text": "x"}, {"id": "x"}, {"position": 99}, {"fields": {"a": 1}}, {"source": "x"}]
)
def test_the_content_of_a_shard_is_all_of_it(change: dict[str, Any]):
    (before,) = cut(RECORDS, [])
    (after,) = cut([*RECORDS[:-1], replace(RECORDS[-1], **change)], [])
    assert before.content != after.content


def test_rows_that_cannot_be_read_lie_in_the_shard_around_them():
    unreadable: list[UnreadableRow] = []

    def reading() -> Iterator[Record]:
        for row in range(1, 6):
            if row in (2, 5):
                unreadable.append(UnreadableRow("rows.txt", row, "no text"))
            else:
                yield record(row)

    shards = [*cut(reading(), unreadable, shard_rows=2)]
    assert [[each.position for each in shard.records] for shard in shards] == [[1, 3], [4]]
    assert [[each.position for each in shard.unreadable] for shard in shards] == [[2], [5]]
    assert unreadable == []
    (alone,) = cut([], [UnreadableRow("rows.txt", 1, "no text")])
    assert len(alone.unreadable) == 1


# -- the manifest --------------------------------------------------------------------------------

ENTRY = ShardEntry(
    index=0,
    file="part-00000.rows",
    content="c",
    n_bytes=5,
    n_rows=2,
    n_tokens=9,
    n_truncated=1,
    first_truncated=("rows.txt:1",),
    failed=(FailedPlace(source="rows.txt", position=2, id="r2", n_tokens=1, reason="no"),),
)


def test_a_manifest_comes_back_and_a_torn_end_counts_as_absent():
    entries = (ENTRY, replace(ENTRY, index=1))
    whole = manifest.header_line(HEADER) + b"".join(map(manifest.entry_line, entries))
    for last, finished in ((b"", False), (manifest.last_line(entries), True)):
        read = manifest.parse(whole + last, "m")
        assert (read.header, read.entries, read.finished) == (HEADER, entries, finished)
    for end in range(len(whole) + 1):
        read = manifest.parse(whole[:end], "m")
        n_lines = whole[:end].count(b"\n")
        assert len(read.entries) == max(0, n_lines - 1)
        assert (read.header is None) == (n_lines == 0)
    wrong = manifest.header_line(HEADER) + manifest.entry_line(entries[1])
    assert manifest.parse(wrong, "m").entries == ()
    assert manifest.parse(manifest.header_line(HEADER) + b"{}\n", "m").entries == ()
    for nothing in (b"[]\n", b"{}\n", b"nothing\n"):
        with pytest.raises(BadInput, match="is no manifest"):
            manifest.parse(nothing, "m")
    with pytest.raises(BadInput, match="format x"):
        manifest.parse(b'{"format": "x"}\n', "m")


def test_failed_rows_are_shown_as_embed_shows_them():
    (failed,) = ENTRY.failed
    assert failed.shown == "rows.txt:2 (id r2): 1 token: no"
    assert replace(failed, id="rows.txt:2", n_tokens=None).shown == "rows.txt:2: no"
    assert replace(failed, id=None, reason="rows.txt, line 2: bad").shown == "rows.txt, line 2: bad"


# -- a lock ----------------------------------------------------------------------------------


def test_one_at_a_time(tmp_path: Path):
    held = rf"vectors \(process {os.getpid()}\): another run"
    with Lock(tmp_path / ".lock", what="vectors"), pytest.raises(OutputFailed, match=held):
        Lock(tmp_path / ".lock", what="vectors")
    assert [*tmp_path.iterdir()] == []
    (tmp_path / ".lock").write_text("12345")  # of one that was killed
    with Lock(tmp_path / ".lock", what="vectors") as lock:
        lock.close()
        lock.close()
    with pytest.raises(OutputFailed, match="not written"):
        Lock(tmp_path / "no" / ".lock", what="vectors")


# -- jobs ------------------------------------------------------------------------------------


class Silent:
    def __init__(self) -> None:
        self.rows: list[FailedPlace] = []
        self.n_bytes = 0

    def advance(self, n_texts: int, n_tokens: int, n_bytes: int) -> None:
        self.n_bytes += n_bytes

    def failed(self, row: FailedPlace) -> None:
        self.rows.append(row)


def job(
    embedder: FakeEmbedder, output: JobOutput, watch: Silent | None = None, **choices: Any
) -> Job:
    choices = {"on_error": "skip", **choices}
    return Job(embedder, output, ArrayShards(), choices, watch or Silent())  # type: ignore[arg-type]


def shards(records: list[Record] = RECORDS) -> list[Any]:
    return [*cut(records, [], shard_rows=5)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def done(folder: Path, records: list[Record] = RECORDS) -> tuple[Any, int]:
    """The report of a run to the end, and the number of microbatches that it computed."""
    with FakeEmbedder.open() as embedder, open_output(folder, HEADER, resume=True) as output:
        report = job(embedder, output).run(shards(records))
        return report, len(embedder.backend.microbatches)


def test_a_job_writes_shards_and_what_is_done(tmp_path: Path):
    watch = Silent()
    with FakeEmbedder.open() as embedder:
        with open_output(tmp_path / "v", HEADER, resume=False) as output:
            report = job(embedder, output, watch).run(shards())
        expected = embedder.encode([each.text for each in RECORDS])
    parts = [f"part-0000{i}.rows" for i in range(5)]
    assert [*contents(tmp_path / "v")] == ["manifest.jsonl", *parts]
    data = b"".join((tmp_path / "v" / part).read_bytes() for part in parts)
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(-1, DIM), expected)
    assert (report.n_shards, report.n_rows, report.n_kept_shards) == (5, 23, 0)
    assert (report.n_tokens, report.n_computed_tokens) == (23 * 5, 23 * 5)
    assert watch.n_bytes == 230
    assert report.tokens_per_s > 0


@pytest.mark.parametrize("n_done", [0, 1, 3, 4])
@pytest.mark.parametrize("damage", ["none", "torn", "lost line", "no part", "short part"])
def test_whatever_was_left_the_result_is_the_same(tmp_path: Path, n_done: int, damage: str):
    done(tmp_path / "whole")
    folder = tmp_path / "v"
    with (
        FakeEmbedder.open() as embedder,
        open_output(folder, HEADER, resume=True) as output,
    ):
        working = job(embedder, output)

        def interrupted() -> Iterator[Any]:
            # Two are under way when the signal comes: one computed, one begun.
            yield from shards()[: n_done + 1]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            working.run(interrupted())
        assert working.report.n_shards == len(output.entries) == n_done
    text = folder / manifest.NAME
    lines = text.read_bytes().splitlines(keepends=True)
    part = folder / f"part-0000{max(0, n_done - 1)}.rows"
    n_lost = 1 if n_done else 0
    if damage == "torn":
        text.write_bytes(b"".join(lines)[:-3] if n_done else b"".join(lines) + b'{"in')
    elif damage == "lost line" and n_done:
        text.write_bytes(b"".join(lines[:-1]))
    elif damage == "no part" and n_done:
        part.unlink()
    elif damage == "short part" and n_done:
        part.write_bytes(part.read_bytes()[:-1])
    else:
        n_lost = 0
    report, _ = done(folder)
    assert report.n_kept_shards == n_done - n_lost
    assert contents(folder) == contents(tmp_path / "whole")


def test_an_input_that_changed_is_made_again_from_there(tmp_path: Path):
    done(tmp_path / "v")
    changed = [*RECORDS[:7], record(8, "another text"), *RECORDS[8:]]
    report, n_batches = done(tmp_path / "v", changed)
    assert (report.n_kept_shards, n_batches) == (4, 1)
    done(tmp_path / "whole", changed)
    assert contents(tmp_path / "v") == contents(tmp_path / "whole")
    done(tmp_path / "v", RECORDS[:6])
    done(tmp_path / "short", RECORDS[:6])
    assert contents(tmp_path / "v") == contents(tmp_path / "short")


def test_a_job_that_is_done_computes_nothing(tmp_path: Path):
    before, _ = done(tmp_path / "v")
    whole = contents(tmp_path / "v")
    report, n_batches = done(tmp_path / "v")
    assert (report.n_kept_rows, n_batches, report.tokens_per_s) == (23, 0, 0.0)
    assert report.n_tokens == before.n_tokens
    assert contents(tmp_path / "v") == whole


def test_a_disk_that_is_full_costs_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done(tmp_path / "whole")
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] >= 9:
            raise OSError(28, "No space left on device")
        real(descriptor)

    for patched in (files.os,):
        monkeypatch.setattr(patched, "fsync", full)
    with pytest.raises(OutputFailed, match="No space left"):
        done(tmp_path / "v")
    monkeypatch.undo()
    report, _ = done(tmp_path / "v")
    assert report.n_kept_shards in (1, 2)
    assert contents(tmp_path / "v") == contents(tmp_path / "whole")


def test_failed_rows_have_their_side_file(tmp_path: Path):
    records = [record(1), record(2, "bad"), record(3, "w " * 40), record(4)]
    watch = Silent()
    unreadable = [UnreadableRow("rows.txt", 9, "rows.txt, line 9: no text")]
    with FakeEmbedder.open(backend=Failing()) as embedder:
        with open_output(tmp_path / "v", HEADER, resume=True) as output:
            report = job(embedder, output, watch).run(cut(records, unreadable, shard_rows=9))
        assert report.n_failed == 3
        assert report.first_failed == ["rows.txt:9", "rows.txt:2 (id r2)", "rows.txt:3 (id r3)"]
        lines = (tmp_path / "v" / "failed.jsonl").read_text().splitlines()
        assert [(row["position"], row["n_tokens"]) for row in map(json.loads, lines)] == [
            (9, None),
            (2, 3),
            (3, 42),
        ]
        assert [row.position for row in watch.rows] == [9, 2, 3]
        with open_output(tmp_path / "w", HEADER, resume=True) as output:
            with pytest.raises(BadInput, match=r"rows\.txt:3 \(id r3\): 42 tokens"):
                job(embedder, output, on_error="raise").run(cut(records, [], shard_rows=9))
            surrogate = [record(1, "\ud800")]
            with pytest.raises(BadInput, match=r"rows\.txt:1 \(id r1\): character 0"):
                job(embedder, output, on_error="raise").run(cut(surrogate, []))


def test_cut_texts_are_counted_and_named():
    (shard,) = cut(RECORDS, [])
    encoded = Encoded(
        vectors=np.zeros((23, 4), np.float32),
        token_counts=np.full(23, 2, np.int32),
        truncated=np.arange(23) < 7,
        failed=(),
        n_cached=0,
        n_computed_tokens=0,
    )
    entry = entry_of(shard, encoded, ending=".rows", n_bytes=1)
    assert (entry.n_truncated, entry.n_tokens) == (7, 46)
    assert entry.first_truncated == tuple(f"rows.txt:{row}" for row in range(1, 6))


def test_what_a_folder_holds_is_told(tmp_path: Path):
    folder = tmp_path / "v"
    at_work = pytest.raises(OutputFailed, match="another run is at work")
    with open_output(folder, HEADER, resume=False), at_work:
        open_output(folder, HEADER, resume=True)
    with pytest.raises(BadOption, match="holds a job, which has 0 of its shards; go on with"):
        open_output(folder, HEADER, resume=False)
    done(folder)
    with pytest.raises(BadOption, match="which is complete"):
        open_output(folder, HEADER, resume=False)
    other = replace(HEADER, made_with={"model": "other"})
    with pytest.raises(BadOption, match="otherwise \\(model 'fake' there, 'other' now\\)"):
        open_output(folder, other, resume=True)
    with open_output(folder, replace(HEADER, run={}), resume=True) as output:
        assert output.header == HEADER
    (tmp_path / "mine.txt").touch()
    with pytest.raises(BadOption, match="is not empty, and holds no job"):
        open_output(tmp_path, HEADER, resume=True)
    with pytest.raises(OutputFailed, match="cannot be made"):
        open_output(tmp_path / "mine.txt" / "v", HEADER, resume=True)


# -- a forecast ------------------------------------------------------------------------------


def test_a_forecast_counts_all_and_measures_a_sample():
    records = [*RECORDS, record(30, "w " * 40), record(31, "\ud800"), record(32, RECORDS[0].text)]
    unreadable = [UnreadableRow("rows.txt", 9, "no text")]
    with FakeEmbedder.open() as embedder:
        seen = forecast(
            embedder, cut(records, unreadable, shard_rows=30), ArrayShards(), {"prompt": "q "}
        )
        assert (seen.n_texts, seen.n_too_long, seen.n_unusable, seen.n_shards) == (25, 1, 2, 1)
        assert seen.n_tokens == 24 * 6
        assert seen.n_computed_tokens == 23 * 6
        assert seen.most_tokens == 43
        assert [(each.most_tokens, each.n_texts) for each in seen.histogram] == [
            (8, 24),
            (16, 0),
            (32, 0),
            (64, 1),
        ]
        assert seen.result_bytes == 4 * DIM * 27
        assert seen.tokens_per_s > 0
        assert seen.seconds > 0
        assert seen.memory_bytes > 2**20
        nothing = forecast(embedder, cut([], []), ArrayShards(), {})
        assert (nothing.n_texts, nothing.histogram, nothing.seconds) == (0, (), 0.0)


def test_counts_of_texts_that_are_cut():
    counts = Counts(10, cuts=True)
    counts.add(["a", "b", "a"], [40, 3, 40])
    assert (counts.n_tokens, counts.n_computed, counts.n_too_long, counts.most) == (23, 13, 2, 40)


def test_a_sample_is_of_all_of_the_input():
    sample = Sample(20)
    for row in range(1000):
        sample.add(record(row))
    positions = [each.position for each in sample.records]
    assert len({*positions}) == 20
    assert min(positions) < 300
    assert max(positions) > 700


# -- the command -------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments) -> (exit code, standard output, standard error), with the fake engine."""

    def open_fake(model: str, settings: Any = None, **_: object) -> FakeEmbedder:
        return FakeEmbedder.open(model, settings=settings, backend=Failing())

    monkeypatch.setattr(options, "open_embedder", open_fake)
    return partial(run_command, capsys, "embed")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"id": row, "text": f"text number {row}", "tag": ["x", row]} for row in range(23)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def table_of(folder: Path) -> Any:
    return pyarrow.parquet.read_table([*sorted(folder.glob("part-*.parquet"))])


def test_a_folder_of_parquet(run: Run, rows: Path, tmp_path: Path):
    folder = tmp_path / "v"
    arguments = (rows, "--id-field", "id", "--keep", "tag,id", "--with-text", "--shard-rows", 5)
    code, out, err = run(*arguments, "-o", f"{folder}/", "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert (summary["format"], summary["shape"]) == ("gguf-embed-embed/1", [23, DIM])
    assert (summary["n_shards"], summary["n_kept_shards"], summary["n_failed"]) == (5, 0, 0)
    table = table_of(folder)
    assert table.column_names == [
        *("id", "source", "position", "last_position", "truncated", "text", "tag", "fields.id"),
        "vector",
    ]
    assert table.column("tag")[3].as_py() == '["x", 3]'
    assert table.column("id").to_pylist() == [str(row) for row in range(23)]
    about = json.loads(table.schema.metadata[b"gguf_embed"])
    assert about["model"] == "fake"
    with FakeEmbedder.open() as embedder:
        assert about["fingerprint"] == embedder.fingerprint().id
        expected = embedder.encode(table.column("text").to_pylist())
    np.testing.assert_array_equal(np.stack(table.column("vector").to_numpy()), expected)
    code, _, err = run(*arguments, "-o", f"{folder}/", "--resume")
    assert code == 0
    assert "not computed again: 23 texts of 5 shards done before, 0 texts from the cache" in err
    code, _, err = run(*arguments, "-o", folder)
    assert (code, "go on with --resume" in err) == (2, True)


def test_kept_columns_have_the_types_of_their_tables(run: Run, rows: Path, tmp_path: Path):
    path = tmp_path / "rows.parquet"
    made = pyarrow.table({"text": ["a", "b"], "n": [1, None], "body": ["x", "y"]})
    pyarrow.parquet.write_table(made, path)
    assert run(path, "--keep", "all", "-o", f"{tmp_path / 'v'}/")[0] == 0
    kept = table_of(tmp_path / "v")
    assert kept.column("n").to_pylist() == [1, None]
    assert kept.column("body").to_pylist() == ["x", "y"]
    assert run(rows, "--keep", "all", "-o", f"{tmp_path / 'w'}/")[0] == 0
    assert json.loads(table_of(tmp_path / "w").column("fields")[4].as_py()) == {
        "id": 4,
        "tag": ["x", 4],
    }


@pytest.mark.parametrize("name", ["v.npy", "v.jsonl"])
def test_a_file_that_is_made_of_shards_is_as_one_that_is_not(
    run: Run, rows: Path, tmp_path: Path, name: str
):
    output = tmp_path / name
    assert run(rows, "-o", output)[0] == 0
    plain, about = output.read_bytes(), json.loads((tmp_path / f"{name}.meta.json").read_text())
    output.unlink()
    assert run(rows, "-o", output, "--resume", "--shard-rows", 5)[0] == 0
    assert output.read_bytes() == plain
    made = json.loads((tmp_path / f"{name}.meta.json").read_text())
    assert {key: made.get(key) for key in about if key != "plan"} == {
        key: value for key, value in about.items() if key != "plan"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rows.jsonl",
        name,
        f"{name}.meta.json",
    ]


@pytest.mark.parametrize("kind", ["float16", "int8", "binary"])
def test_smaller_vectors(run: Run, rows: Path, tmp_path: Path, kind: str):
    from gguf_embed.io.stored import read_vectors

    assert run(rows, "-o", f"{tmp_path / 'v'}/", "--vector-type", kind)[0] == 0
    assert run(rows, "-o", tmp_path / "v.npy")[0] == 0
    exact = np.load(tmp_path / "v.npy")
    (stored,) = read_vectors([tmp_path / "v"])
    if kind == "binary":
        np.testing.assert_array_equal(stored.vectors > 0, exact > 0)
    else:
        np.testing.assert_allclose(stored.vectors, exact, atol=1e-3 if kind == "float16" else 5e-3)


def test_rows_that_fail_do_not_stop_a_job(run: Run, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    lines = ['{"text": "good"}', "nothing", '{"text": "bad"}', json.dumps({"text": "w " * 40})]
    path.write_text("\n".join(lines) + "\n")
    folder = tmp_path / "v"
    code, _, err = run(path, "-o", f"{folder}/")
    assert code == 8
    assert f"3 rows without a vector, in {folder / 'failed.jsonl'}" in err
    assert f"{path}, line 2: not JSON" in err
    assert f"{path}:4: 42 tokens: longer than the 32 tokens" in err
    assert table_of(folder).column("vector").null_count == 2
    for arguments in ((), ("--resume", "--on-error", "stop")):
        code, _, err = run(path, "-o", tmp_path / "v.npy", *arguments)
        assert (code, "line 2: not JSON" in err) == (2, True)
    code, _, err = run(path, "-o", tmp_path / "w.npy", "--on-error", "skip")
    assert (code, np.load(tmp_path / "w.npy").shape) == (8, (3, DIM))
    side = (tmp_path / "w.npy.failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["position"] for line in side] == [2, 3, 4]
    assert run(path, "-o", tmp_path / "v.npy", "--resume")[0] == 8
    assert np.isnan(np.load(tmp_path / "v.npy")[1:]).all()
    assert (tmp_path / "v.npy.failed.jsonl").read_text().splitlines() == side


def test_a_dry_run_tells_and_writes_nothing(run: Run, rows: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(rows, "-o", f"{tmp_path / 'v'}/", "--dry-run")
    assert code == 0
    assert "23 in 1 shard" in " ".join(out.split())
    assert "to 8" in out
    code, out, _ = run(rows, "--dry-run", "--json", "--shard-rows", 5)
    assert code == 0
    seen = json.loads(out)
    assert (seen["n_texts"], seen["n_tokens"], seen["n_shards"]) == (23, 115, 5)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_spares_the_work(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    assert run(rows, "-o", tmp_path / "a.npy", "--cache")[0] == 0
    code, out, _ = run(rows, "-o", f"{tmp_path / 'v'}/", "--cache", "--json")
    assert (code, json.loads(out)["n_cached_texts"]) == (0, 23)
    assert json.loads(out)["n_computed_tokens"] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-o", "v.npy", "--vector-type", "int8"], "is for a folder"),
        (["-o", "v/", "--late-chunking"], "is not for jobs"),
        (["--resume"], "name one with -o"),
        (["-o", "v.txt", "--resume"], "the ending says the format"),
        (["-o", "v.npy", "--resume", "--with-text"], "has no place for texts"),
        (["-o", "."], "holds the input"),
    ],
)
def test_what_a_job_cannot_do(
    run: Run,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(rows, *arguments)
    assert (code, complaint in err) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_job_goes_on_as_the_model_ran_or_not_at_all(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, opened = tmp_path / "v", list[Any]()
    command = (rows, "-o", f"{folder}/", "--resume", "--shard-rows", 2)
    before = options.open_embedder

    def open_embedder(model: str, settings: Any = None, **how: Any) -> Any:
        opened.append(settings)
        return before(model, settings, **how)

    monkeypatch.setattr(options, "open_embedder", open_embedder)
    assert run(*command)[0] == 0
    whole = contents(folder)
    assert run(*command)[0] == 0  # nothing to do
    assert run(*command, "--threads", 1)[0] == 0
    runs = [each.run for each in opened]
    assert runs[0] is None
    assert runs[1] == RunSettings(**{f.name: getattr(runs[1], f.name) for f in fields(RunSettings)})
    assert runs[2] is None  # the user says how
    header, *lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    written = json.loads(header)
    written["run"] |= {"n_threads": 7, "cpu": "another"}
    other = json.dumps(written).encode() + b"\n"
    (folder / "manifest.jsonl").write_bytes(b"".join([other, *lines[:1]]))
    code, _, err = run(*command)
    assert code == 2
    assert "n_threads 7 there, 1 now" in err
    assert "cpu 'another' there" in err
    assert "pass --other-bits" in err
    assert opened[-1].run.n_threads == 7
    code, _, err = run(*command, "--other-bits")
    assert code == 0
    assert "may be other than in an undisturbed run" in err
    assert contents(folder) == whole | {"manifest.jsonl": b"".join([other, *lines])}
    (folder / "manifest.jsonl").write_bytes(header.replace(b"n_threads", b"n_other"))
    assert "--other-bits" in run(*command)[2]  # of a version that knows other settings
    assert opened[-1].run is None
    code, _, err = run(rows, "-o", f"{tmp_path / 'w'}/", "--other-bits")
    assert (code, "is for --resume" in err) == (2, True)


def test_progress_in_a_log_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with console.progress("embed", 1000, quiet=False, lines_s=30) as bar:
        bar.advance(0, 0, 100)  # done before
        clock[0] = 10
        bar.advance(50, 500, 0)
        clock[0] = 40
        bar.advance(50, 500, 100)
    assert capsys.readouterr().err == (
        "gguf-embed: embed: 100 texts, 25 tokens/s, 20%, about 5 min left\n"
    )
    seconds = (5.4, 89, 95, 600, 7200)
    assert [duration(s) for s in seconds] == ["5 s", "89 s", "2 min", "10 min", "2.0 h"]


SLOW_COMMAND = """
import sys, time
from gguf_embed import cli
from gguf_embed.cli import bulk, options
from gguf_embed.testing import FakeBackend, FakeEmbedder

class Slow(FakeBackend):
    def run(self, sequences, **choices):
        time.sleep(SECONDS)
        return super().run(sequences, **choices)

SECONDS, bulk.TERMINATED_S = float(sys.argv.pop(1)), float(sys.argv.pop(1))
options.open_embedder = lambda model, settings=None, **_: FakeEmbedder.open(backend=Slow())
sys.exit(cli.main())
"""


def start_slow(rows: Path, folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_COMMAND, str(seconds), "50", "embed", str(rows)]
    command += ["-o", f"{folder}/", "--resume", "--shard-rows", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (folder / "part-00000.parquet").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_sigterm_is_answered_by_75_and_resume_goes_on(run: Run, rows: Path, tmp_path: Path):
    assert run(rows, "-o", f"{tmp_path / 'whole'}/", "--shard-rows", 2)[0] == 0
    folder = tmp_path / "v"
    for number in (signal.SIGTERM, signal.SIGKILL):
        (folder / "part-00000.parquet").unlink(missing_ok=True)
        process = start_slow(rows, folder, 0.3)
        process.send_signal(signal.SIGSTOP)  # so that it is at work however long this takes
        code, _, err = run(rows, "-o", f"{folder}/", "--resume", "--shard-rows", 2)
        assert (code, f"(process {process.pid}): another run is at work" in err) == (7, True)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (75 if number == signal.SIGTERM else -number)
        if number == signal.SIGTERM:
            assert "the same command with --resume goes on" in err
    assert run(rows, "-o", f"{folder}/", "--resume", "--shard-rows", 2)[0] == 0
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_microbatch_that_takes_too_long_is_not_waited_for(rows: Path, tmp_path: Path):
    process = start_slow(rows, tmp_path / "v", 0.01)
    process.kill()
    process.communicate()
    command = [sys.executable, "-c", SLOW_COMMAND, "60", "4", "embed", str(rows), "--resume"]
    command += ["-o", f"{tmp_path / 'v'}/", "--shard-rows", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while (tmp_path / "v" / ".lock").read_text() != str(process.pid):
        time.sleep(0.01)
    time.sleep(0.3)  # it computes now
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - began < 30  # also on a busy machine
