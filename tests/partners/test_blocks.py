"""The blocks of docs/integrations.md for partners, as they are: `pytest -m partners`."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest
from test_docs import BLOCK, partner_of

from gguf_embed import Embedder, Reranker, Settings
from gguf_embed.testing import FakeReranker

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "integrations.md").read_text("utf-8")
BLOCKS = {
    partner: code
    for language, code in BLOCK.findall(PAGE + (DOCS / "ray.md").read_text("utf-8"))
    if language == "python" and (partner := partner_of(code))
}


@pytest.fixture(autouse=True)
def _what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model, without a measurement; no reranker is built in."""
    open_model = Embedder.open

    def open_quick(name: str, **_: object) -> Embedder:
        return open_model(name, settings=Settings(tune=False))

    monkeypatch.setattr(Embedder, "open", open_quick)
    monkeypatch.setattr(Reranker, "open", lambda *_, **__: FakeReranker.open())


@pytest.mark.parametrize("partner", BLOCKS)
def test_a_block_runs(partner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec(partner) is None:
        pytest.skip(f"{partner} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[partner], "<docs>", "exec"), {})


def test_every_partner_has_its_block():
    assert {*BLOCKS} == {
        *("sentence_transformers", "langchain_core", "llama_index", "haystack", "chromadb"),
        *("txtai", "ray"),
    }


def test_the_commands_of_llm_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llm")
    from click.testing import CliRunner
    from llm.cli import cli

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (block,) = [code for language, code in BLOCK.findall(PAGE) if language == "sh"]
    for line in block.splitlines():
        done = CliRunner().invoke(cli, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert "The flour for the bread" in done.output
