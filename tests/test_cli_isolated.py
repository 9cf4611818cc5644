"""`embed --isolated`: a text that kills the engine costs itself only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from gguf_embed.cli import embed
from gguf_embed.engine.hosted import FAULT_VARIABLE

pytestmark = pytest.mark.native

POISON = "a fish in the river"
TEXTS = [f"the {word} and the dog" for word in ("cat", "boat", "bread", "oven", "house")]
ROW = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_qwen3(tmp_path_factory.mktemp("tiny") / "qwen3.gguf").path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n".join([*TEXTS[:ROW], POISON, *TEXTS[ROW:]]) + "\n")
    return path


def run(model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gguf_embed", "embed", "--no-tune", "--model", str(model)]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def undisturbed(model: Path, notes: Path, tmp_path: Path) -> np.ndarray:
    output = tmp_path / "plain.npy"
    done = run(model, notes, "-o", output)
    assert done.returncode == 0, done.stderr
    return np.load(output)


def test_the_row_is_named_and_the_rest_is_written(
    model: Path,
    notes: Path,
    tmp_path: Path,
    undisturbed: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(FAULT_VARIABLE, f"run:{POISON}")
    output = tmp_path / "out.npy"
    done = run(model, notes, "-o", output, "--isolated", "--json")
    assert done.returncode == 8, done.stderr
    assert f"{notes}:4: 6 tokens: llama.cpp dies of this text" in done.stderr
    assert "1 text without a vector" in done.stderr
    summary = json.loads(done.stdout)
    assert summary["n_failed"] == summary["made_with"]["n_failed"] == 1
    assert summary["n_texts"] == len(TEXTS) + 1
    vectors = np.load(output)
    assert np.isnan(vectors[ROW]).all()
    assert np.array_equal(np.delete(vectors, ROW, 0), np.delete(undisturbed, ROW, 0))


def test_lines_say_null(model: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, f"run:{POISON}")
    output = tmp_path / "out.jsonl"
    done = run(model, notes, "-o", output, "--isolated")
    assert done.returncode == 8, done.stderr
    vectors = [json.loads(line)["vector"] for line in output.read_text().splitlines()]
    assert [row for row, vector in enumerate(vectors) if vector is None] == [ROW]


def test_much_text_is_isolated_unasked(
    model: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(FAULT_VARIABLE, f"run:{POISON}")
    assert run(model, notes, "-o", tmp_path / "small.npy").returncode == 0
    with notes.open("a") as file:
        file.write("the cat and the dog\n" * (embed.BULK_BYTES // 20 + 1))
    done = run(model, notes, "-o", tmp_path / "large.npy")
    assert done.returncode == 8, done.stderr
    done = run(model, notes, "-o", tmp_path / "asked.npy", "--no-isolated")
    assert done.returncode == 0, done.stderr
