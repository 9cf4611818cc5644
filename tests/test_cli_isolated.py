"""`embed --isolated`: a text that kills the engine costs itself only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny

from gguf_embed.cli import options
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


def test_a_text_that_kills_the_tokenizer_is_a_failed_row_too(
    model: Path,
    notes: Path,
    tmp_path: Path,
    undisturbed: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(FAULT_VARIABLE, f"tokenize:{POISON}")
    output = tmp_path / "out.npy"
    done = run(model, notes, "-o", output, "--isolated")
    assert done.returncode == 8, done.stderr
    assert f"{notes}:4: llama.cpp dies when it tokenizes this text of 19 char" in done.stderr
    assert "1 text without a vector" in done.stderr
    vectors = np.load(output)
    assert np.isnan(vectors[ROW]).all()
    assert np.array_equal(np.delete(vectors, ROW, 0), np.delete(undisturbed, ROW, 0))


@pytest.mark.parametrize("n_texts", [400, pytest.param(10_000, marks=pytest.mark.minutes)])
def test_one_among_many_is_named_and_nothing_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_texts: int
):
    """Found by its place and tokens; all others to the bit, no process and no memory left."""
    notes, row = tmp_path / "many.txt", n_texts * 2 // 3
    texts = [f"{TEXTS[i % len(TEXTS)]} {i * 'cat ' if i < 40 else i}" for i in range(n_texts)]
    texts[row] = POISON
    notes.write_text("\n".join(texts) + "\n")
    outputs = [tmp_path / "plain.npy", tmp_path / "isolated.npy"]
    done = run(model, notes, "-o", outputs[0], "--no-isolated")
    assert done.returncode == 0, done.stderr
    before = segments()
    monkeypatch.setenv(FAULT_VARIABLE, f"run:{POISON}")
    monkeypatch.setenv("GGUF_EMBED_TEST_MARK", str(tmp_path))
    started = time.monotonic()
    done = run(model, notes, "-o", outputs[1], "--isolated")
    seconds = time.monotonic() - started
    left = marked(str(tmp_path))
    monkeypatch.delenv("GGUF_EMBED_TEST_MARK")
    assert done.returncode == 8, done.stderr
    named = [line for line in done.stderr.splitlines() if "llama.cpp dies" in line]
    assert len(named) == 1
    assert f"{notes}:{row + 1}: 6 tokens: llama.cpp dies of this text" in named[0]
    plain, isolated = map(np.load, outputs)
    assert np.flatnonzero(np.isnan(isolated).any(axis=1)).tolist() == [row]
    assert np.array_equal(np.delete(plain, row, 0), np.delete(isolated, row, 0))
    assert np.isfinite(plain[row]).all()
    assert left == []
    assert segments() <= before
    print(f"{n_texts - 1:,} of {n_texts:,} vectors equal, row {row} named, {seconds:.1f} s")


def segments() -> set[Path]:
    """Shared-memory files of this package that lie there now."""
    memory = Path("/dev/shm")
    return set(memory.glob("gguf-embed-*/*")) if memory.is_dir() else set()


def marked(mark: str) -> list[int]:
    """Processes that run with this mark in their environment, other than this one."""
    left: list[int] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and mark in process.environ().values():
                left.append(process.pid)
        except psutil.Error:
            continue
    return left


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
        file.write("the cat and the dog\n" * (options.BULK_BYTES // 20 + 1))
    done = run(model, notes, "-o", tmp_path / "large.npy")
    assert done.returncode == 8, done.stderr
    done = run(model, notes, "-o", tmp_path / "asked.npy", "--no-isolated")
    assert done.returncode == 0, done.stderr
