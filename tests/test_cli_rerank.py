"""`gguf-embed rerank` and `search --rerank`: what they print, and what they answer to bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import run_command

from gguf_embed.cli import options
from gguf_embed.engine.backend import Head, Outcome
from gguf_embed.errors import ModelNotFound
from gguf_embed.plan.settings import Settings
from gguf_embed.testing import FakeEmbedder, FakePairBackend, FakeReranker

Run = Callable[..., tuple[int, str, str]]
opened: list[tuple[str, Settings | None, bool]] = []


class _Failing(FakePairBackend):
    """Finds no vector for texts of six words and more."""

    def run(self, sequences, *, head=Head.POOLED, n_prefix=0, n_contexts=1):  # type: ignore[no-untyped-def]
        outcome = super().run(sequences, head=head, n_prefix=n_prefix, n_contexts=n_contexts)
        bad = tuple(row for row, ids in enumerate(sequences) if len(ids) > 10)
        return Outcome(vectors=outcome.vectors, bad=bad)


def open_fake(
    model: str, settings: Settings | None = None, *, quiet: bool = False, isolated: bool = False
) -> FakeReranker:
    opened.append((model, settings, isolated))
    if model == "none":
        raise ModelNotFound("no such model")
    backend = _Failing() if model == "failing" else None
    return FakeReranker.open(model, settings=settings, backend=backend)


def open_embedder(
    model: str, settings: Settings | None = None, *, quiet: bool = False, isolated: bool = False
) -> FakeEmbedder:
    return FakeEmbedder.open(model, settings=settings)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments) -> (exit code, standard output, standard error), with the fakes."""
    monkeypatch.setattr(options, "open_reranker", open_fake)
    monkeypatch.setattr(options, "open_embedder", open_embedder)
    opened.clear()

    return partial(run_command, capsys)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("a dog runs\n\nthe cat sits\na cat\n")
    return path


def test_it_prints_the_best_first(run: Run, notes: Path):
    code, out, err = run("rerank", "the cat", notes, "--top", 2)
    assert (code, err) == (0, "")
    assert re.findall(r"^ *(\d+)  (\d\.\d+)  \S*notes\.txt:(\d+)$", out, re.MULTILINE) == [
        ("1", "0.881", "3"),
        ("2", "0.500", "4"),
    ]
    assert opened[0][0] == options.RERANKER
    assert not opened[0][2]


def test_results_for_programs(run: Run, notes: Path):
    code, out, _ = run("rerank", "the cat", notes, "--json", "--model", "any", "--isolated")
    found = json.loads(out)
    assert code == 0
    assert found["format"] == "gguf-embed-rerank/1"
    assert (found["query"], found["model"], found["task"]) == ("the cat", "fake", None)
    assert (found["n_documents"], found["n_failed"], found["n_truncated"]) == (3, 0, 0)
    assert found["results"][0] == {
        "score": 0.880797,
        "id": f"{notes}:3",
        "source": str(notes),
        "position": 3,
        "last_position": 3,
        "n_tokens": 9,
        "truncated": False,
        "text": "the cat sits",
    }
    assert [each["position"] for each in found["results"]] == [3, 4, 1]
    assert opened[0][2]


def test_a_cut_is_said(run: Run, tmp_path: Path):
    path = tmp_path / "long.txt"
    path.write_text("short\n" + "word " * 70 + "\n")
    code, out, err = run("rerank", "the cat", path, "--json")
    assert code == 0
    assert json.loads(out)["n_truncated"] == 1
    assert "1 of 2 documents cut to fit into 64 tokens" in err
    code, _, err = run("rerank", "the cat", path, "--truncate", "error")
    assert code == 2
    assert re.search(r"long\.txt:2: 76 tokens with the question", err)
    assert "1 text too long: with the question beside it a text may take 64 tokens of fake" in err


def test_what_has_no_score_is_named_and_counted(run: Run, tmp_path: Path):
    path = tmp_path / "some.txt"
    path.write_text("a cat\none two three four five six\n")
    code, out, err = run("rerank", "cat", path, "--model", "failing", "--json")
    assert code == 8
    assert re.search(r"some\.txt:2: no score", err)
    assert json.loads(out)["n_failed"] == 1
    assert len(json.loads(out)["results"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([" ", "notes.txt"], 2, "the question is empty"),
        (["x"], 2, "required: INPUT"),
        (["x", "absent.txt"], 2, "absent.txt"),
        (["word " * 80, "notes.txt"], 2, "the query takes"),
        (["x", "notes.txt", "--task", "a task"], 2, "takes no task"),
        (["x", "notes.txt", "--task", "a\udcff"], 2, "lone surrogate"),
        (["x", "notes.txt", "--model", "none"], 4, "no such model"),
        (["x", "notes.txt", "--pooling", "mean"], 2, "--pooling"),
    ],
)
def test_bad_input(
    run: Run, notes: Path, monkeypatch: pytest.MonkeyPatch, arguments, code: int, complaint: str
):
    monkeypatch.chdir(notes.parent)
    found, out, err = run("rerank", *arguments)
    assert (found, out) == (code, "")
    assert complaint in err


def test_nothing_to_order(run: Run, tmp_path: Path):
    (tmp_path / "blank.txt").write_text("\n \n")
    code, out, err = run("rerank", "x", tmp_path / "blank.txt")
    assert (code, out) == (0, "")
    assert "no text in" in err


def test_more_texts_than_a_window(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gguf_embed.cli.rerank.WINDOW", 3)
    path = tmp_path / "many.txt"
    path.write_text("".join(f"number {n}\n" for n in range(7)) + "the number cat\nthe cat\n")
    found = json.loads(run("rerank", "the cat", path, "--json", "--top", 4)[1])
    assert [each["position"] for each in found["results"]] == [8, 9, 1, 2]
    assert found["n_documents"] == 9


def test_search_reranks_what_it_found(run: Run, tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("cat cat\nthe cat and other words that say no more\nthe bird\n" + "fish\n" * 9)
    plain = json.loads(run("search", "the cat", path, "--json")[1])
    assert plain["format"] == "gguf-embed-search/1"
    assert "reranker" not in plain
    assert "similarity" not in plain["results"][0]
    code, out, _ = run("search", "the cat", path, "--json", "--rerank", "some", "--candidates", 3)
    found = json.loads(out)
    assert code == 0
    assert found["reranker"] == "fake"
    assert len(found["results"]) == 5  # --top is 5: never fewer candidates
    first = found["results"][0]
    assert first["position"] == 2
    assert first["score"] == 0.880797
    cosines = {each["position"]: each["score"] for each in plain["results"]}
    assert first["similarity"] == cosines[2]
    assert plain["results"][0]["position"] == 1
    _, out, _ = run("search", "the cat", path, "--rerank", "some", "--top", 1)
    assert re.match(r" 1  0\.881  \S+:2\n", out)


def test_a_wrong_reranker_is_told_before_the_search(run: Run, notes: Path):
    code, _, err = run("search", "x", notes, "--rerank", "none", "--threads", 2)
    assert code == 4
    assert "no such model" in err
    ((_, settings, _),) = opened
    assert settings is not None
    assert settings.n_threads == 2
    assert settings.pooling is None
