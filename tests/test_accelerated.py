"""Models with the accelerator: it runs where it is proved right, else llama.cpp's kernels do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from gguf_embed import BadOption, Embedder, NativeFailed, Settings
from gguf_embed.engine import trial
from gguf_embed.engine.loaded import limits_of
from gguf_embed.engine.trial import FAULT_VARIABLE
from gguf_embed.engine.tune_record import safe_run
from gguf_embed.machine.selftest import SafePaths
from gguf_embed.native import accelerator, library
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings, keep_asked
from gguf_embed.system.child import Child
from gguf_embed.vectors import Pooling

pytestmark = pytest.mark.native

TEXTS = ["one", "a second text that is a little longer", "the third", "and a fourth one"] * 3
OPEN = Settings(tune=False, n_threads=1)
SAFE = SafePaths(flash=True, repack=True, remark=None)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(accelerator.SWITCH, raising=False)


@pytest.fixture
def compiled() -> None:
    if remark := library.why_not_accelerated():
        pytest.skip(remark)
    if library.accelerated().kernel is None:
        pytest.skip(library.accelerated().remark)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.write_qwen3(tmp_path / "qwen3.gguf", outtype="Q8_0").path


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1)


@pytest.mark.usefixtures("compiled")
def test_both_live_side_by_side(path: Path):
    with Embedder.open(path, settings=replace(OPEN, accelerator=False)) as plain:
        before = plain.encode(TEXTS)
        with Embedder.open(path, settings=OPEN) as fast:
            assert fast.run_settings.accelerator
            assert not fast.run_settings.repack
            assert fast.remarks == ()
            ours = fast.encode(TEXTS)
            assert np.array_equal(plain.encode(TEXTS), before)
        assert not plain.run_settings.accelerator
    assert not np.array_equal(ours, before), "it did not run"
    assert cosines(ours, before).min() > 0.99


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("isolated", [False, True])
def test_exact_costs_no_company(path: Path, isolated: bool):
    with Embedder.open(path, settings=replace(OPEN, exact=True), isolated=isolated) as embedder:
        assert embedder.run_settings.accelerator
        together = embedder.encode(TEXTS[:4])
        for text, vector in zip(TEXTS[:4], together, strict=True):
            assert np.array_equal(embedder.encode(text), vector)


@pytest.mark.usefixtures("compiled")
def test_contexts_and_threads_leave_the_bits(path: Path):
    def vectors(n_contexts: int, n_threads: int) -> np.ndarray:
        settings = replace(OPEN, n_contexts=n_contexts, n_threads=n_threads)
        with Embedder.open(path, settings=settings) as embedder:
            assert embedder.run_settings.accelerator
            assert embedder.run_settings.n_contexts == n_contexts
            return embedder.encode(TEXTS)

    one = vectors(1, 1)
    for n_contexts, n_threads in [(1, 2), (4, 1), (4, 2)]:
        assert np.array_equal(vectors(n_contexts, n_threads), one)


def test_exact_packs_texts_together_where_it_may():
    mode = EmbedMode(pooling=Pooling.LAST, causal=True, encoder=False)
    assert limits_of(RunSettings(), mode, exact=True).max_seqs == 1
    fast = limits_of(RunSettings(accelerator=True), mode, exact=True)
    assert fast == limits_of(RunSettings(accelerator=True), mode, exact=False)
    assert fast.max_seqs > 1


@pytest.mark.usefixtures("compiled")
@pytest.mark.slow
def test_where_it_crashes_it_is_left_out(path: Path, monkeypatch: pytest.MonkeyPatch):
    with Embedder.open(path, settings=replace(OPEN, accelerator=False)) as plain:
        expected = plain.encode(TEXTS)
    monkeypatch.setenv(FAULT_VARIABLE, "accelerator:SIGSEGV")
    with Embedder.open(path, settings=OPEN) as embedder:
        assert not embedder.run_settings.accelerator
        assert "SIGSEGV" in embedder.remarks[0]
        assert "no accelerator" in embedder.remarks[0]
        assert np.array_equal(embedder.encode(TEXTS), expected)
    monkeypatch.delenv(FAULT_VARIABLE)
    monkeypatch.setattr(Child, "__init__", no_child)
    with pytest.raises(NativeFailed, match="leave out accelerator=True"):
        Embedder.open(path, settings=replace(OPEN, accelerator=True))


def no_child(*_: object, **__: object) -> None:
    raise AssertionError("a child was started: the verdict was not kept")


@pytest.mark.usefixtures("compiled")
@pytest.mark.slow
def test_a_killed_proof_says_nothing_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, "accelerator:SIGKILL")
    with Embedder.open(path, settings=OPEN) as embedder:
        assert not embedder.run_settings.accelerator
        assert "no accelerator" in embedder.remarks[0]
    monkeypatch.delenv(FAULT_VARIABLE)
    with Embedder.open(path, settings=OPEN) as embedder:
        assert embedder.run_settings.accelerator


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (Settings(accelerator=True, repack=True), "repack"),
        (Settings(accelerator=True, flash_attn=False), "flash attention"),
    ],
)
def test_what_it_cannot_go_with(path: Path, settings: Settings, why: str):
    with pytest.raises(BadOption, match=why):
        Embedder.open(path, settings=settings)
    settings = replace(settings, accelerator=None, tune=False)
    with Embedder.open(path, settings=settings) as embedder:
        assert not embedder.run_settings.accelerator
        assert embedder.remarks == ()


def test_the_environment_keeps_it_out(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(accelerator.SWITCH, "0")
    with Embedder.open(path, settings=OPEN) as embedder:
        assert not embedder.run_settings.accelerator
        assert embedder.remarks == ()
    with pytest.raises(BadOption, match=accelerator.SWITCH):
        Embedder.open(path, settings=replace(OPEN, accelerator=True))


def test_wrong_vectors_are_told_apart():
    rng = np.random.default_rng(0)
    right = rng.standard_normal((4, 64)).astype(np.float32)
    wrong = right.copy()
    wrong[2] = rng.standard_normal(64)
    assert trial.difference(right, right, Pooling.LAST, 0.99) == ""
    assert "cosine" in trial.difference(wrong, right, Pooling.LAST, 0.99)
    wrong[2] = np.nan
    assert "cosine" in trial.difference(wrong, right, Pooling.LAST, 0.99)
    scores = np.array([[3.0], [-2.0]], np.float32)
    assert trial.difference(scores + 0.01, scores, Pooling.RANK, 0.99) == ""
    assert "scores" in trial.difference(scores + 0.1, scores, Pooling.RANK, 0.99)
    assert "scores" in trial.difference(scores + np.nan, scores, Pooling.RANK, 0.99)


def test_what_runs_with_it():
    wanted = RunSettings(accelerator=True, repack=True, flash_attn=False)
    assert safe_run(wanted, SAFE) == replace(wanted, accelerator=False)
    assert safe_run(wanted, replace(SAFE, accelerator=True)) == RunSettings(
        accelerator=True, repack=False, flash_attn=True
    )


@pytest.mark.parametrize("measured", [True, False])
def test_a_measurement_decides_unless_the_user_has(measured: bool):
    kept = RunSettings(accelerator=measured)
    assert keep_asked(kept, RunSettings(), Settings()).accelerator == measured
    for asked in (True, False):
        run = keep_asked(kept, RunSettings(), Settings(accelerator=asked))
        assert run.accelerator == asked


def test_the_build_id_holds_its_file(compiled: None, monkeypatch: pytest.MonkeyPatch):
    version = library.version()
    stat = accelerator.library_path(version).stat()
    assert str(stat.st_mtime_ns) in accelerator.identity(version)
    assert os.environ.get(accelerator.SWITCH) is None
