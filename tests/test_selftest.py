"""The first decode of a build happens in a child process, and its death costs only speed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import NativeFailed
from gguf_embed.gguf.header import read_header
from gguf_embed.machine import selftest
from gguf_embed.machine.selftest_child import FAULT_VARIABLE
from gguf_embed.machine.tested import folder
from gguf_embed.machine.tiny_model import write_tiny_model
from gguf_embed.native import library
from gguf_embed.plan.settings import Settings

pytestmark = pytest.mark.native


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
    monkeypatch.setenv(FAULT_VARIABLE, f"repack:{name}")
    with Embedder.open(settings=Settings(tune=False, repack=True)) as embedder:
        vector = embedder.encode("a text")
        (remark,) = embedder.remarks
    assert "repack" in remark
    assert name in remark
    assert "doctor" in remark
    assert vector @ expected > 0.999
    assert selftest.verdicts()["Q8_0"].repack == name


def test_a_crash_with_flash_attention_does_without(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, "flash:SIGILL")
    working = selftest.check(["Q8_0"])
    assert (working.flash, working.repack) == (False, True)


def test_a_build_for_another_cpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, "plain:SIGILL")
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
    write_tiny_model(tmp_path / "tiny.gguf", weight_type)
    header = read_header(tmp_path / "tiny.gguf")
    matrices = {tensor.type for tensor in header.tensors if len(tensor.shape) == 2}
    assert matrices == {weight_type}


# -- what says nothing about the build ------------------------------------------------------------


_CHECK = """
import json, sys
from gguf_embed.machine import selftest
from gguf_embed.machine.selftest_child import FAULT_VARIABLE
from gguf_embed.machine.tiny_model import write_tiny_model
{prepare}
working = selftest.check(["Q8_0"])
kept = list(selftest.verdicts())
print(json.dumps([working.flash, working.repack, working.gpu, working.remark, kept]))
"""


def checked(
    prepare: str = "", cwd: Path | None = None, **environment: str
) -> tuple[bool, bool, bool, str, list[str]]:
    """(flash, repack, gpu, remark, weight types with a kept verdict) as a fresh process has it."""
    done = subprocess.run(
        [sys.executable, "-c", _CHECK.format(prepare=prepare)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals are POSIX's")
@pytest.mark.parametrize(
    ("prepare", "environment", "cause"),
    [
        (LIMIT, {}, r"File too large; raise the limit .*ulimit -f"),
        ("selftest.TIMEOUT_S = 0.01", {}, r"no answer in 0\.01 s; try again when .* less busy"),
        (
            "",
            {FAULT_VARIABLE: "plain:SIGKILL"},
            r"killed \(SIGKILL\).* memory is short",
        ),
        ("", {FAULT_VARIABLE: "repack:SIGTERM"}, "ended early"),
    ],
)
def test_what_says_nothing_about_the_build_is_not_kept(
    prepare: str, environment: dict[str, str], cause: str
):
    flash, repack, gpu, remark, kept = checked(prepare, **environment)
    assert (repack, gpu, kept) == (False, True, [])
    assert flash == ("repack" in str(environment))
    assert re.search(f"could not be made: .*{cause}", remark)
    assert "next opening" in remark
    assert checked() == [True, True, True, None, ["Q8_0"]]  # measured again, and all is well


def test_without_a_place_for_temporary_files_it_says_so(tmp_path: Path):
    nowhere = f"import tempfile; tempfile.tempdir = {str(tmp_path / 'gone')!r}"
    remark = checked(nowhere)[3]
    assert re.search(r"could not be made: No such file .*gone.*; .*set TMPDIR to", remark)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a small disk is made with unshare")
@pytest.mark.parametrize("home_is_full", [False, True])
def test_a_full_disk_for_temporary_files(tmp_path: Path, home_is_full: bool):
    """The tiny model goes beside what is kept; where that disk is full too, it says so."""
    full, home = tmp_path / "full", tmp_path / "home"
    full.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {full}"
    own = ["unshare", "-rm", "sh", "-ec"]
    if subprocess.run([*own, mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    done = subprocess.run(
        [*own, f'{mount}; exec "$@"', "sh", sys.executable, "-c", _CHECK.format(prepare="")],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "TMPDIR": str(full),
            "GGUF_EMBED_HOME": str(full if home_is_full else home),
        },
    )
    assert done.returncode == 0, done.stderr
    flash, _, _, remark, kept = json.loads(done.stdout)
    assert (flash, kept) == ((False, []) if home_is_full else (True, ["Q8_0"]))
    if home_is_full:
        assert re.search("No space left on device; make room, or set TMPDIR", remark)


def test_files_of_the_current_folder_are_not_run(tmp_path: Path):
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("json", "numpy", "random", "tempfile"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the user ran')")
    code = (
        "import sys; sys.path = [entry for entry in sys.path if entry]\n"
        f"import os; os.chdir({str(folder)!r})\n"
        "sys.path.insert(0, '')\n"
    )
    assert checked(code) == [True, True, True, None, ["Q8_0"]]


def test_only_the_crash_of_a_gpu_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, "gpu:SIGKILL")
    assert not selftest.check(["Q8_0"], gpus=["a card"]).gpu
    monkeypatch.delenv(FAULT_VARIABLE)
    assert selftest.check(["Q8_0"], gpus=["a card"]).gpu
    monkeypatch.setenv(FAULT_VARIABLE, "gpu:SIGSEGV")
    assert not selftest.check(["Q8_0"], gpus=["another card"]).gpu
    monkeypatch.delenv(FAULT_VARIABLE)
    assert "SIGSEGV" in str(selftest.check(["Q8_0"], gpus=["another card"]).remark)
    assert selftest.forget_bad_gpus() == ["Q8_0: SIGSEGV"]
    assert selftest.check(["Q8_0"], gpus=["another card"]).gpu


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        "[" * 100_000,
        '{"Q8_0": null}',
        '{"Q8_0": {"weight_type": "Q8_0", "plain": "No space left on device"}}',
        '{"Q8_0": {"weight_type": "Q8_0", "plain": "SIGKILL"}}',
        '{"Q8_0": {"weight_type": "Q8_0", "plain": "ok"}}',
        '{"Q8_0": {"weight_type": "Q8_0"}}',
        '{"Q8_0": {"weight_type": "F16", "plain": "SIGILL"}}',
    ],
)
def test_a_file_that_is_not_right_is_healed(content: str, tmp_path: Path):
    expected = selftest.check(["Q8_0"])
    (path,) = (tmp_path / "selftest").iterdir()
    path.write_text(content)
    assert selftest.verdicts() == {}
    assert selftest.check(["Q8_0"]) == expected
    assert selftest.verdicts()["Q8_0"].good


def _vector() -> np.ndarray:
    with Embedder.open(settings=Settings(tune=False, repack=False)) as embedder:
        return embedder.encode("a text")


def _forget() -> None:
    for path in folder().iterdir():
        path.unlink()


def test_gpus_are_tested_anew_and_what_is_proven_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, "gpu:SIGSEGV")
    assert selftest.run_gpus(["F32"], ["a third card"]) == {"F32": "SIGSEGV"}
    assert not selftest.check(["F32"], gpus=["a third card"]).gpu
    monkeypatch.delenv(FAULT_VARIABLE)
    assert selftest.run_gpus(["F32"], ["a third card"]) == {"F32": "ok"}
    assert selftest.check(["F32"], gpus=["a third card"]).gpu
