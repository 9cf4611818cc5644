"""`gguf-embed embed` in chunks: which rows there are, where they stand, what their vectors are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run_command

from gguf_embed.cli import options
from gguf_embed.engine.backend import Outcome
from gguf_embed.plan.settings import Settings
from gguf_embed.testing import FakeBackend, FakeEmbedder

Run = Callable[..., tuple[int, str, str]]

GUIDE = """\
# Guide

One two three four five six seven eight.

## Boats

A boat floats on the water. It has a sail and a keel.

## Bread

Flour and water make bread in the oven of the house.
"""


class _Failing(FakeBackend):
    """Has no vectors for a text with the word "keel"."""

    def run(self, sequences, **how):  # type: ignore[no-untyped-def]
        outcome = super().run(sequences, **how)
        keel = int(self.tokenize("keel.")[1])
        bad = tuple(row for row, ids in enumerate(sequences) if keel in ids)
        return Outcome(vectors=outcome.vectors, bad=bad)


def open_fake(
    model: str, settings: Settings | None = None, *, quiet: bool = False, isolated: bool = False
) -> FakeEmbedder:
    backend = _Failing() if model == "failing" else None
    n_ctx = 24 if model == "short" else 64
    return FakeEmbedder.open(model, settings=settings, n_ctx=n_ctx, backend=backend)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(options, "open_embedder", open_fake)

    return partial(run_command, capsys)


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    path = tmp_path / "guide.md"
    path.write_text(GUIDE)
    return path


def lines(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_file_becomes_rows_that_know_their_places(run: Run, guide: Path):
    code, out, err = run("embed", guide, "--chunk-tokens", 18, "--with-text")
    rows = lines(out)
    assert code == 0
    assert [row["id"] for row in rows] == [f"{guide}#{n}" for n in range(1, len(rows) + 1)]
    assert "".join(str(row["text"]) for row in rows) == GUIDE.rstrip("\n") == GUIDE[:-1]
    for row in rows:
        assert GUIDE[row["start"] : row["end"]] == row["text"]  # type: ignore[misc]
        assert GUIDE.count("\n", 0, row["start"]) + 1 == row["position"]  # type: ignore[arg-type]
    assert [row["headings"] for row in rows] == [["Guide"], ["Guide", "Boats"], ["Guide", "Bread"]]
    with FakeEmbedder.open() as embedder:
        alone = embedder.encode([str(row["text"]) for row in rows])
    np.testing.assert_allclose([row["vector"] for row in rows], alone, rtol=1e-6)
    assert "3 texts" in err


def test_late_rows_are_the_same_with_vectors_of_the_document(run: Run, guide: Path, tmp_path: Path):
    plain = lines(run("embed", guide, "--chunk-tokens", 18, "--with-text")[1])
    code, out, _ = run("embed", guide, "--chunk-tokens", 18, "--late-chunking", "--with-text")
    late = lines(out)
    assert code == 0
    without = [{k: v for k, v in row.items() if k != "vector"} for row in late]
    assert without == [{k: v for k, v in row.items() if k != "vector"} for row in plain]
    with FakeEmbedder.open(n_ctx=64) as embedder:
        spans = [(row["start"], row["end"]) for row in late]
        expected = embedder.encode_chunks(GUIDE[:-1], spans)  # type: ignore[arg-type]
    np.testing.assert_allclose([row["vector"] for row in late], expected, rtol=1e-6)
    ids = []
    for way in ((), ("--late-chunking",)):
        run("embed", guide, "--chunk-tokens", 18, "-o", tmp_path / "v.npy", *way)
        ids.append(json.loads((tmp_path / "v.npy.meta.json").read_text()))
    assert ids[0]["fingerprint"] != ids[1]["fingerprint"]
    assert (ids[0]["pooling"], ids[1]["pooling"]) == ("mean", "late-mean")
    assert (ids[0]["chunk_tokens"], ids[0]["late_chunking"]) == (18, False)
    assert ids[1]["late_chunking"]


def test_a_document_longer_than_the_model_takes_is_told(run: Run, guide: Path):
    code, out, err = run("embed", guide, "--model", "short", "--late-chunking")
    assert code == 0
    assert len(lines(out)) > 1
    assert re.search(r"1 document longer than the 24 tokens of fake: computed in parts", err)


def test_rows_and_texts_are_split_too(run: Run, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    long = " ".join(f"word{n}" for n in range(40))
    path.write_text(
        json.dumps({"n": "a", "text": "short"}) + "\n\n" + json.dumps({"n": "b", "text": long})
    )
    rows = lines(run("embed", path, "--id-field", "n", "--chunk-tokens", 20, "--keep", "n")[1])
    assert [row["id"] for row in rows] == ["a#1", "b#1", "b#2", "b#3"]
    assert [row["position"] for row in rows] == [1, 3, 3, 3]
    assert rows[3]["fields"] == {"n": "b"}
    assert rows[3]["end"] == len(long)
    given = ("embed", "--text", "one", "--text", f"{long[:99]}\n{long}")
    rows = lines(run(*given, "--chunk-tokens", 20, "--overlap", 5)[1])
    assert [row["id"] for row in rows][:3] == ["--text:1#1", "--text:2#1", "--text:2#2"]
    assert {row["position"] for row in rows[1:]} == {2}
    assert rows[3]["start"] < rows[2]["end"]  # type: ignore[operator]


def test_blank_files_have_no_rows(run: Run, tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n \n")
    (tmp_path / "b.txt").write_text("a line\n")
    for way in (("--chunk-tokens", 20), ("--late-chunking",)):
        (row,) = lines(run("embed", tmp_path, *way)[1])
        assert row["source"] == str(tmp_path / "b.txt")


def test_a_document_without_vectors(run: Run, guide: Path):
    code, out, err = run("embed", guide, "--model", "failing", "--late-chunking", "--isolated")
    assert code == 8
    assert [row["vector"] for row in lines(out)] == [None]
    assert "1 of 1 chunks have no vector" in err
    code, _, err = run("embed", guide, "--model", "failing", "--late-chunking")
    assert code == 8
    assert "llama.cpp gives NaN" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--overlap", 3], "--overlap is for chunks"),
        (["--chunk-tokens", 20, "--truncate", "end"], "never longer than the model takes"),
        (["--chunk-tokens", 20, "--whole-file"], "choose one"),
        (["--chunk-tokens", 65], "--chunk-tokens 65: fake takes 64 tokens here"),
        (["--chunk-tokens", 3], "allow at least 18"),
        (["--chunk-tokens", 20, "--overlap", 18], "half of a chunk, 9"),
    ],
)
def test_options_that_cannot_be(run: Run, guide: Path, arguments: list[object], complaint: str):
    code, out, err = run("embed", guide, *arguments)
    assert (code, out) == (2, "")
    assert complaint in err
