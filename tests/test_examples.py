"""The scripts of docs/examples and the programs of examples, as they are."""

from __future__ import annotations

import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import Write

from gguf_embed import Embedder, Reranker, Settings
from gguf_embed.testing import FakeReranker

pytestmark = [pytest.mark.native, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
IMPORT = "from gguf_embed.integrations.sentence_transformers import"


def run(name: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a script prints."""
    before, sys.argv = sys.argv, [name, *words]
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return capsys.readouterr().out


@pytest.fixture
def _what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model, without a measurement; no reranker is built in."""
    open_model = partial(Embedder.open, settings=Settings(tune=False))
    monkeypatch.setattr(Embedder, "open", lambda name, **_: open_model(name))
    monkeypatch.setattr(Reranker, "open", lambda *_, **__: FakeReranker.open())


@pytest.mark.usefixtures("_what_is_here")
def test_semantic_search(capsys: pytest.CaptureFixture[str]):
    shown = run("semantic_search", capsys).split("Query: ")[1:]
    best = [lines.splitlines()[1] for lines in shown]
    expected = ("rye bread", "violin", "leopard", "train to the coast")
    for line, part in zip(best, expected, strict=True):
        assert part in line


@pytest.mark.usefixtures("_what_is_here")
def test_clustering(capsys: pytest.CaptureFixture[str]):
    shown = run("clustering", capsys)
    assert re.findall(r"Cluster \d, (\d) sentences", shown) == ["3", "3", "2"]
    assert "weather" not in shown


@pytest.mark.usefixtures("_what_is_here")
def test_retrieve_and_rerank(capsys: pytest.CaptureFixture[str]):
    shown = run("retrieve_rerank", capsys)
    assert shown.count("Cross-encoder") == 2
    assert "yeast makes gas" in shown.split("Cross-encoder")[0]


def test_one_line_differs():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text("utf-8")
        assert text.count("gguf_embed") == text.count(IMPORT) == 1


# -- programs --------------------------------------------------------------------------------

PROGRAMS = Path(__file__).parents[1] / "examples"


def program(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> str:
    """What one of the programs prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


NOTES = """\
The cat sleeps on the warm stove.
Rent is due on the first of each month.
You must pay the rent on the first day of every month.
The train to the coast leaves at nine.
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text(NOTES.replace("\n", "\n\n"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "notes.txt"


def test_a_program_searches_a_folder(
    notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shown = program("search_folder", monkeypatch, capsys, notes.parent, "when must money be paid?")
    assert "rent" in shown.splitlines()[0].lower()
    assert "notes.txt" in shown


def test_a_program_leaves_out_what_was_said_before(
    notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shown = program("deduplicate", monkeypatch, capsys, notes).splitlines()
    kept = NOTES.splitlines()
    assert shown == [kept[0], kept[1], kept[3]]


def test_a_program_answers_from_notes(
    notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("LLM_URL", raising=False)
    shown = program("rag", monkeypatch, capsys, notes, "where does the train go?")
    assert "coast" in shown


def test_a_program_serves_and_calls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shown = program("serve_and_call", monkeypatch, capsys, "a text", "another")
    assert shown.count("384 numbers") == 2


def test_a_program_compares_levels(
    tiny_model: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    files = [tiny_model("qwen3", quant) for quant in ("F16", "Q8_0")]
    shown = program("compare_levels", monkeypatch, capsys, *files)
    mean = float(shown.split()[1])
    assert 0.98 < mean < 1
    assert shown.count(" MiB") == 2


def test_a_program_makes_the_level_that_it_compares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Called without files: the built-in model, and the same in fewer bits."""
    shown = program("compare_levels", monkeypatch, capsys)
    cosines, sizes = shown.splitlines()
    mean, least = (float(number) for number in re.findall(r"0\.\d{4}", cosines))
    assert 0.9 < least <= mean < 1
    whole, made = (float(number) for number in re.findall(r"[\d.]+(?= MiB)", sizes))
    assert made < whole


def test_there_are_five_programs_and_each_says_how_it_is_called():
    programs = sorted(PROGRAMS.glob("*.py"))
    assert len(programs) == 5
    for path in programs:
        assert f"python examples/{path.name}" in path.read_text("utf-8")
