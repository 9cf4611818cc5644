"""`doctor` shows what is wrong with an installation, and mends what was learned wrongly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_measured import measured_run

from gguf_embed import cli
from gguf_embed.cli import doctor
from gguf_embed.engine import gain
from gguf_embed.engine.gain import Gain
from gguf_embed.machine import measured, probe, selftest, selftest_child
from gguf_embed.machine.load import Load
from gguf_embed.machine.machine import Device
from gguf_embed.machine.probe import usable_cores

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "WEIGHT_TYPES", ("Q8_0",))
    # Measured by one test of test_cli.py; it takes seconds.
    monkeypatch.setattr(gain, "measure_gain", lambda: Gain(kernel=None, remark="not measured"))


def test_a_library_that_does_not_load_is_a_row(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "gguf_embed", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)},
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("libraries")]
    assert rows == [f"libraries     {tmp_path} (LLAMA_CPP_LIB_PATH)"]
    assert "llama.cpp cannot be loaded (Shared library" in done.stdout
    assert "unset it" in done.stdout
    assert done.stdout.endswith("embedding does not work here\n")
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_kept_as_bad_is_tested_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Also types that it does not test otherwise, and GPUs."""
    monkeypatch.setenv(selftest_child.FAULT_VARIABLE, "repack:SIGILL")
    selftest.run(["Q4_1"])
    monkeypatch.setenv(selftest_child.FAULT_VARIABLE, "gpu:SIGSEGV")
    selftest.check(["F32"], gpus=["a card"])
    monkeypatch.delenv(selftest_child.FAULT_VARIABLE)
    assert selftest.verdicts()["Q4_1"].repack == "SIGILL"
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["self_test"]["Q4_1"] == {"plain": "ok", "flash": "ok", "repack": "ok"}
    assert selftest.verdicts()["Q4_1"].good
    assert any("F32: SIGSEGV" in line for line in report["advice"])
    assert selftest.check(["F32"], gpus=["a card"]).gpu


def test_a_test_that_cannot_be_made_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(selftest_child.FAULT_VARIABLE, "plain:SIGKILL")
    cli.main(["doctor", "--json"])
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert any(line.startswith("the self-test could not be made: its") for line in advice)


def test_what_is_damaged_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measured.keep(measured_run("F16"), usable_cores())
    measured.keep(replace(measured_run("Q8_0"), load=Load(before=1, during=0)), usable_cores())
    damaged = [tmp_path / folder / "bad.json" for folder in ("selftest", "measured", "tune")]
    for path in damaged:
        path.parent.mkdir(exist_ok=True)
        path.write_text("null")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(str(path) in out and not path.exists() for path in damaged)
    assert "measured      1 used by plan, 1 under load, not used\n" in out
    assert cli.main(["doctor"]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_the_self_test_runs_on_the_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    card = Device(
        name="CUDA0",
        description="a card",
        backend="CUDA",
        kind="gpu",
        free_bytes=8 << 30,
        total_bytes=8 << 30,
        device_id=None,
    )
    here = probe.probe()
    machine = replace(here, devices=(card, *here.devices))
    monkeypatch.setattr(probe, "probe", lambda **_: machine)
    monkeypatch.setattr(doctor, "_embed_one", lambda: (True, "fine"))
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_self_test"] == {"Q8_0": "ok"}
    monkeypatch.setenv(selftest_child.FAULT_VARIABLE, "gpu:SIGSEGV")
    assert cli.main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Q8_0: plain ok, flash ok, repack ok, GPU SIGSEGV" in out
    assert "the self-test fails on the GPU (Q8_0: SIGSEGV)" in out
