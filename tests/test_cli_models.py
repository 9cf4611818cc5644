"""`tune` and `pull`, run as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from fakehub import FakeHub

from gguf_embed.catalog.catalog import BUILTIN, builtin_path
from gguf_embed.cli import main
from gguf_embed.engine.embedder import Embedder
from gguf_embed.plan.settings import Settings

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))


def test_tune_prints_what_it_keeps_and_the_next_open_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tiny.write_qwen3(tmp_path / "model.gguf").path
    assert main(["tune", str(path), "--budget", "1", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["trials"][0]["changed"] == "start"
    assert sum(trial["kept"] for trial in tuned["trials"]) >= 1
    with Embedder.open(path, settings=Settings(tune=False)) as embedder:
        used = embedder.run_settings
    assert used.max_batch_tokens == tuned["settings"]["max_batch_tokens"]
    assert used.n_contexts == tuned["settings"]["n_contexts"]


def test_tune_refuses_a_model_without_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tiny.write_qwen3(tmp_path / "chat.gguf", pooling=None).path
    assert main(["tune", str(path)]) == 3
    assert "LAST" in capsys.readouterr().err


def test_pull_of_what_is_here_says_where(capsys: pytest.CaptureFixture[str]):
    assert main(["pull", BUILTIN, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(builtin_path())
    assert told["n_bytes"] == builtin_path().stat().st_size
    assert told["licence"] == "Apache-2.0"


@pytest.mark.parametrize("size", ["small", "nano"])  # planned by its card, by its header
def test_pull_shows_a_licence_before_anything_moves(
    size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        assert main(["pull", f"jina-embeddings-v5-text-{size}"]) == 2
    told = capsys.readouterr().err
    assert "no commercial use" in told
    assert "--accept-licence" in told
    assert not (tmp_path / "cache").exists()
