"""Work in the background: when it waits, when it goes on, and what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from commands import run_command
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.cli import manners, options
from gguf_embed.machine import background
from gguf_embed.machine.background import (
    Pace,
    Strain,
    over_limit,
    read_strain,
    reason_to_wait,
    stalled_percent,
)
from gguf_embed.testing import FakeEmbedder

EASY = Strain(battery_percent=None, stalled_percent=0.0, free_share=0.5, over_limit_degrees=-20)
percents = st.none() | st.floats(0, 100)
strains = st.builds(
    Strain,
    battery_percent=percents,
    stalled_percent=percents,
    free_share=st.none() | st.floats(0, 1),
    over_limit_degrees=st.none() | st.floats(-50, 30),
)


@given(strains)
def test_who_waits_needs_more_than_who_works(strain: Strain):
    if reason_to_wait(strain, waiting=False):
        assert reason_to_wait(strain, waiting=True)
    else:
        assert not reason_to_wait(EASY, waiting=True)


@pytest.mark.parametrize(
    ("strain", "begins", "goes_on"),
    [
        (EASY, "", True),
        (Strain(), "", True),
        (Strain(battery_percent=29), "the battery is at 29 %", False),
        (Strain(battery_percent=31), "", False),
        (Strain(battery_percent=36), "", True),
        (Strain(stalled_percent=11, free_share=0.9), "memory is short", False),
        (Strain(stalled_percent=5, free_share=0.01), "", False),
        (Strain(stalled_percent=1, free_share=0.01), "", True),
        (Strain(free_share=0.03), "memory is short", False),
        (Strain(free_share=0.06), "", False),
        (Strain(over_limit_degrees=1), "the machine is hot", False),
        (Strain(over_limit_degrees=-5), "", False),
        (Strain(over_limit_degrees=-9), "", True),
    ],
)
def test_reasons(strain: Strain, begins: str, goes_on: bool):
    assert reason_to_wait(strain, waiting=False) == begins
    assert (not reason_to_wait(strain, waiting=True)) == goes_on


@given(st.lists(strains, max_size=30))
def test_work_goes_on_exactly_while_nothing_speaks_against_it(seen: list[Strain]):
    now, said, looks, slept = [0.0], list[str](), iter([*seen, EASY]), [0]

    def sleep(seconds: float) -> None:
        slept[0] += 1
        now[0] += seconds

    used: list[Strain] = []

    def look() -> Strain:
        used.append(next(looks))
        return used[-1]

    pace = Pace(say=said.append, strain=look, clock=lambda: now[0], sleep=sleep)
    pace.wait()
    paused = bool(reason_to_wait(used[0], waiting=False))
    assert len(said) == (2 if paused else 0)
    assert slept[0] == len(used) - 1
    assert all(reason_to_wait(each, waiting=True) for each in used[1:-1])
    assert not reason_to_wait(used[-1], waiting=paused)
    n = len(used)
    pace.wait()  # looked at a moment ago
    assert len(used) == n


def test_who_waits_is_let_go_at_the_end():
    said: list[str] = []
    pace = Pace(say=said.append, strain=lambda: Strain(battery_percent=3.0))
    thread = threading.Thread(target=pace.wait, daemon=True)
    thread.start()
    pace.end()
    thread.join(10)
    assert not thread.is_alive()
    pace.wait()
    assert len(said) <= 1


def sensor(current: float | None, high: float | None, critical: float | None) -> SimpleNamespace:
    return SimpleNamespace(current=current, high=high, critical=critical)


def test_sensors_without_a_sane_limit_say_nothing(tmp_path: Path):
    nonsense = [sensor(90, None, None), sensor(50, 0, 0), sensor(30, 65261.0, None)]
    assert over_limit(nonsense) is None
    assert over_limit([*nonsense, sensor(70, 100, 105), sensor(60, None, 75)]) == -15
    assert over_limit([sensor(70, 100, 105)]) == -30
    assert over_limit([sensor(None, 100, None), sensor(101, 60, 120)]) == 41
    assert over_limit([]) is None
    assert stalled_percent(tmp_path / "none") is None
    (tmp_path / "memory").write_text("some avg10=12.50 avg60=0.00 total=1\nfull avg10=1.00\n")
    assert stalled_percent(tmp_path / "memory") == 12.5
    (tmp_path / "memory").write_text("nothing of that kind\n")
    assert stalled_percent(tmp_path / "memory") is None


@pytest.fixture
def sensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the system's sensors say, to be changed: psutil's answers and the kernel's file."""
    said: dict[str, Any] = {
        "sensors_battery": SimpleNamespace(percent=80, power_plugged=True),
        "sensors_temperatures": {"cpu": [sensor(50, 100, 110)], "disk": [sensor(40, 70, None)]},
        "virtual_memory": SimpleNamespace(available=1, total=4),
    }

    def ask(name: str) -> object:
        if isinstance(said[name], Exception):
            raise said[name]
        return said[name]

    for name in said:
        monkeypatch.setattr(psutil, name, lambda name=name: ask(name), raising=False)
    monkeypatch.setattr(background, "_PRESSURE", tmp_path / "memory")
    (tmp_path / "memory").write_text("some avg10=2.50 avg60=0.00 avg300=0.00 total=1\n")
    return said


def test_what_the_sensors_say(sensors: dict[str, Any], tmp_path: Path):
    assert read_strain() == Strain(
        battery_percent=None, stalled_percent=2.5, free_share=0.25, over_limit_degrees=-30
    )
    sensors["sensors_battery"] = SimpleNamespace(percent=29.4, power_plugged=False)
    sensors["sensors_temperatures"]["disk"] = [sensor(71, 70, None)]
    (tmp_path / "memory").unlink()
    now = read_strain()
    assert (now.battery_percent, now.over_limit_degrees, now.stalled_percent) == (29.4, 1, None)


@pytest.mark.parametrize("plugged", [True, None])  # None: the system does not know
def test_a_battery_counts_only_while_it_is_surely_used(sensors: dict[str, Any], plugged: object):
    sensors["sensors_battery"] = SimpleNamespace(percent=5, power_plugged=plugged)
    assert read_strain().battery_percent is None


@pytest.mark.parametrize("name", ["sensors_battery", "sensors_temperatures"])
def test_sensors_that_are_not_there_say_nothing(
    sensors: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
):
    field = "battery_percent" if name == "sensors_battery" else "over_limit_degrees"
    for answer in (None, RuntimeError("a driver"), NotImplementedError()):
        sensors[name] = answer
        assert getattr(read_strain(), field) is None
    monkeypatch.delattr(psutil, name)  # as on systems of which psutil knows none
    assert getattr(read_strain(), field) is None


@pytest.mark.parametrize(
    ("sensor_name", "bad", "good", "reason"),
    [
        (
            "sensors_battery",
            SimpleNamespace(percent=20, power_plugged=False),
            SimpleNamespace(percent=20, power_plugged=True),
            "the battery is at 20 %",
        ),
        ("sensors_temperatures", {"cpu": [sensor(101, 100, 110)]}, {}, "the machine is hot"),
        ("memory", "some avg10=50.0 total=1\n", "some avg10=0.0 total=1\n", "memory is short"),
    ],
    ids=["battery", "heat", "memory"],
)
def test_work_stops_and_goes_on_by_the_sensors(
    sensors: dict[str, Any], sensor_name: str, bad: Any, good: Any, reason: str, tmp_path: Path
):
    """From the system's answers to the lines that a person reads."""

    def set_to(answer: Any) -> None:
        if sensor_name == "memory":
            (tmp_path / "memory").write_text(answer)
        else:
            sensors[sensor_name] = answer

    said, slept = list[str](), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            set_to(good)

    set_to(bad)
    pace = Pace(say=said.append, clock=lambda: sum(slept), sleep=sleep)
    pace.wait()
    assert said == [f"paused: {reason}; it goes on by itself", "goes on, after 10 s"]
    pace.wait()
    assert len(slept) == 2


def test_one_thread_looks_for_all():
    said, both, met = list[str](), threading.Barrier(2), list[int]()

    def look() -> Strain:
        with suppress(threading.BrokenBarrierError):  # nobody else comes
            met.append(both.wait(timeout=0.2))
        return EASY

    pace = Pace(say=said.append, strain=look, clock=lambda: 0.0)
    threads = [threading.Thread(target=pace.wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (said, met) == ([], [])


def test_nothing_waits_once_the_command_is_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    waits: list[Callable[[], None]] = []
    embedder = nullcontext(SimpleNamespace(meter=SimpleNamespace(pace=waits.append)))
    monkeypatch.setattr(background, "step_back", lambda *, threads: "")
    monkeypatch.setattr(Pace, "__init__", _with(lambda: Strain(battery_percent=3.0)))
    args = SimpleNamespace(background=True, threads=None, quiet=True)
    with pytest.raises(KeyboardInterrupt), manners.opened(args, lambda: embedder):  # type: ignore[arg-type]
        raise KeyboardInterrupt
    thread = threading.Thread(target=waits[0], daemon=True)
    thread.start()
    thread.join(5)
    assert (thread.is_alive(), capsys.readouterr().err) == (False, "")


@pytest.mark.slow
def test_stepping_back_takes_fewer_cores_and_is_inherited():
    code = """if True:
        import json, os, subprocess, sys
        from gguf_embed.machine.background import read_strain, step_back
        read_strain()
        said = step_back(threads=1)
        show = "import os; print(os.sched_getscheduler(0), len(os.sched_getaffinity(0)))"
        child = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True)
        print(json.dumps([said, child.stdout.split()]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, child = json.loads(done.stdout)
    if sys.platform == "linux":
        n = len(os.sched_getaffinity(0))
        assert said == f"on 1 of {n} cores, when no other program wants them"
        assert child == [str(os.SCHED_IDLE), "1"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    taken: list[object] = []

    def step_back(*, threads: int | None) -> str:
        taken.append(threads)
        return "beside others"

    looks = iter([Strain(battery_percent=20.0), EASY])
    monkeypatch.setattr(background, "step_back", step_back)
    monkeypatch.setattr(background, "WAIT_S", 0.01)
    monkeypatch.setattr(Pace, "__init__", _with(lambda: next(looks, EASY)))
    monkeypatch.setattr(options, "open_embedder", lambda model, *_, **how: FakeEmbedder.open())
    return taken


def _with(strain):  # type: ignore[no-untyped-def]
    made = Pace.__init__

    def init(self, *, say):  # type: ignore[no-untyped-def]
        made(self, say=say, strain=strain)

    return init


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", "rows.txt", "-o", "rows.jsonl"],
        ["embed", "rows.txt", "-o", "rows.npy", "--resume"],
        ["index", "rows.txt", "-o", "./rows.index"],
    ],
    ids=["embed", "job", "index"],
)
def test_commands_pause_and_go_on(
    steps: list[object],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("one\ntwo\n")
    code, _, err = run_command(capsys, *arguments)
    assert (code, steps, "paused" in err) == (0, [], False)
    for output in tmp_path.glob("rows.[jni]*"):
        if output.is_file():
            output.unlink()
    if arguments[0] == "index":
        arguments = [*arguments, "--rebuild"]
    code, _, err = run_command(capsys, *arguments, "--background", "--threads", "3")
    assert (code, steps) == (0, [3]), err
    assert "in the background: beside others" in err
    assert "paused: the battery is at 20 %; it goes on by itself" in err
    assert "goes on, after 0 s" in err
