"""The first decode of a build happens in a child process, and its death costs only speed."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import Settings
from gguf_embed.errors import NativeFailed
from gguf_embed.gguf.header import read_header
from gguf_embed.machine import selftest
from gguf_embed.native import library


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))


def test_this_build_works_here():
    verdict = selftest.run(["Q8_0"])["Q8_0"]
    assert (verdict.plain, verdict.flash) == ("ok", "ok")
    assert selftest.check(["Q8_0"]).flash


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGABRT"])
def test_a_crash_while_repacking_leaves_a_working_engine(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    expected = _vector()
    _forget()
    monkeypatch.setenv(selftest.FAULT_VARIABLE, f"repack:{name}")
    with Embedder.open(settings=Settings(tune=False, repack=True)) as embedder:
        vector = embedder.encode("a text")
        (remark,) = embedder.remarks
    assert "repack" in remark
    assert name in remark
    assert "doctor" in remark
    assert vector @ expected > 0.999
    assert selftest.verdicts()["Q8_0"].repack == name


def test_a_crash_with_flash_attention_does_without(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(selftest.FAULT_VARIABLE, "flash:SIGILL")
    working = selftest.check(["Q8_0"])
    assert (working.flash, working.repack) == (False, True)


def test_a_build_for_another_cpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(selftest.FAULT_VARIABLE, "plain:SIGILL")
    with pytest.raises(NativeFailed, match=r"SIGILL.*GGML_NATIVE=OFF"):
        selftest.check(["Q8_0"])


def test_the_verdict_is_kept_per_build(monkeypatch: pytest.MonkeyPatch):
    selftest.check(["Q8_0"])
    monkeypatch.setattr(selftest, "_child", lambda *_: pytest.fail("ran again"))
    selftest.check(["Q8_0"])
    monkeypatch.setattr(library, "build_id", lambda: "another build")
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        selftest.check(["Q8_0"])


def test_a_wrong_result_counts_as_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        selftest,
        "_child",
        lambda *_: ({"plain": "ok", "flash": "ok", "repack": "wrong result, cosine 0.1000"}, None),
    )
    assert not selftest.check(["Q8_0"]).repack


def test_a_home_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        assert selftest.check(["F16"]).flash
    assert "not kept" in caplog.text


@pytest.mark.parametrize("weight_type", ["F16", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS"])
def test_the_tiny_model_is_of_the_asked_type(weight_type: str, tmp_path: Path):
    selftest.write_tiny_model(tmp_path / "tiny.gguf", weight_type)
    header = read_header(tmp_path / "tiny.gguf")
    matrices = {tensor.type for tensor in header.tensors if len(tensor.shape) == 2}
    assert matrices == {weight_type}


def _vector() -> np.ndarray:
    with Embedder.open(settings=Settings(tune=False, repack=False)) as embedder:
        return embedder.encode("a text")


def _forget() -> None:
    for path in (selftest.paths.home() / "selftest").iterdir():
        path.unlink()
