"""The scripts of docs/examples, as they are: their import line is all that a script must change."""

from __future__ import annotations

import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

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


@pytest.fixture(autouse=True)
def _what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model, without a measurement; no reranker is built in."""
    open_model = partial(Embedder.open, settings=Settings(tune=False))
    monkeypatch.setattr(Embedder, "open", lambda name, **_: open_model(name))
    monkeypatch.setattr(Reranker, "open", lambda *_, **__: FakeReranker.open())


def test_semantic_search(capsys: pytest.CaptureFixture[str]):
    shown = run("semantic_search", capsys).split("Query: ")[1:]
    best = [lines.splitlines()[1] for lines in shown]
    expected = ("rye bread", "violin", "leopard", "train to the coast")
    for line, part in zip(best, expected, strict=True):
        assert part in line


def test_clustering(capsys: pytest.CaptureFixture[str]):
    shown = run("clustering", capsys)
    assert re.findall(r"Cluster \d, (\d) sentences", shown) == ["3", "3", "2"]
    assert "weather" not in shown


def test_retrieve_and_rerank(capsys: pytest.CaptureFixture[str]):
    shown = run("retrieve_rerank", capsys)
    assert shown.count("Cross-encoder") == 2
    assert "yeast makes gas" in shown.split("Cross-encoder")[0]


def test_one_line_differs():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text("utf-8")
        assert text.count("gguf_embed") == text.count(IMPORT) == 1
