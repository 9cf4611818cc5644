"""The plugin of llm, found by its entry point: `pytest -m partners`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from partners.conftest import TEXTS

pytest.importorskip("llm")

import llm
import llm.cli
from click.testing import CliRunner

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def user_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))


def test_models_are_registered_by_the_entry_point():
    models = {each.model.model_id: each for each in llm.get_embedding_models_with_aliases()}
    assert "gguf/qwen3-embedding-0.6b" in models
    assert "gguf/qwen3-embedding:0.6b" in models["gguf/qwen3-embedding-0.6b"].aliases
    assert "gguf/qwen3-reranker-0.6b" not in models


def test_the_vectors_are_those_of_the_engine(direct: np.ndarray):
    model = llm.get_embedding_model("gguf/all-minilm")
    np.testing.assert_allclose([*model.embed_multi(TEXTS)], direct, atol=1e-6)
    np.testing.assert_allclose(model.embed(TEXTS[0]), direct[0], atol=1e-6)


def test_its_command(direct: np.ndarray):
    done = CliRunner().invoke(llm.cli.cli, ["embed", "-m", "gguf/all-minilm", "-c", TEXTS[0]])
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(json.loads(done.output), direct[0], atol=1e-6)


def test_a_collection_finds_what_is_near(tmp_path: Path):
    def run(*words: str) -> str:
        database = ["-d", str(tmp_path / "notes.db")]
        done = CliRunner().invoke(llm.cli.cli, [words[0], "notes", *words[1:], *database])
        assert done.exit_code == 0, done.output
        return done.output

    for n in (0, 2):
        run("embed", str(n), "-m", "gguf/all-minilm", "-c", TEXTS[n], "--store")
    first = json.loads(run("similar", "-c", "baking").splitlines()[0])
    assert (first["id"], first["content"]) == ("2", TEXTS[2])
