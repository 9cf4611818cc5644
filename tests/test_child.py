"""Child processes: what they import, how they answer, how their end is explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gguf_embed.system import child
from gguf_embed.system.child import Child, Ending

pytestmark = pytest.mark.slow


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module that a child can run, and gives its name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(body: str) -> str:
        name = f"for_child_{len(list(folder.iterdir()))}"
        head = "import os, signal, sys, time\nfrom gguf_embed.system.child import take_job, tell\n"
        (folder / f"{name}.py").write_text(head + body)
        return name

    return write


def test_a_job_and_its_answers(module):
    name = module("job = take_job()\nfor n in range(job['n']): tell({'n': n})")
    with Child(name, {"n": 3}) as running:
        assert [answer["n"] for answer in running.answers(timeout_s=30)] == [0, 1, 2]
    assert running.ending.ok
    assert running.ending.reason == ""


def test_more_jobs_until_it_is_closed(module):
    name = module("while True: tell({'twice': 2 * take_job()})")
    with Child(name, 1) as running:
        answers = running.answers(timeout_s=30)
        assert next(answers) == {"twice": 2}
        running.send(21)
        assert next(answers) == {"twice": 42}
    assert not psutil.pid_exists(running.pid)


def test_jobs_are_done_by_the_thread_that_reads_them(module):
    name = module(
        "from threading import current_thread as thread, main_thread\n"
        "from gguf_embed.system.child import do_jobs\n"
        "take_job()\n"
        "do_jobs(lambda job: tell({'job': job, 'main': thread() is main_thread()}))\n"
        "tell({'ended': True})"
    )
    with Child(name, "the first") as running:
        answers = running.answers(timeout_s=30)
        time.sleep(0.5)  # it waits for jobs by now
        for job in (1, "two", [3]):
            running.send(job)
            assert next(answers) == {"job": job, "main": False}
        running.send(None)
        assert next(answers) == {"ended": True}
        assert running.ending.ok


def test_jobs_that_came_too_early_are_done(module):
    name = module(
        "from gguf_embed.system.child import do_jobs\n"
        "take_job()\ntime.sleep(0.5)\ndo_jobs(lambda job: tell({'job': job}))"
    )
    with Child(name, "the first", 1, 2, None) as running:
        assert list(running.answers()) == [{"job": 1}, {"job": 2}]
    assert running.ending.ok


def test_one_that_says_much_ends_though_nobody_listens(module):
    with Child(module("print('x' * 10_000_000)")) as running:
        assert running.ending.ok


@pytest.mark.parametrize(
    ("body", "reason", "crashed"),
    [
        ("sys.exit('no luck\\nat all')", "at all", False),
        ("sys.exit(5)", "exit code 5", False),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", False),
        (
            "print('x.c:1: GGML_ASSERT(a) failed', file=sys.stderr, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGABRT)",
            "SIGABRT (x.c:1: GGML_ASSERT(a) failed)",
            True,
        ),
    ],
)
def test_a_bad_end_is_explained(module, body: str, reason: str, crashed: bool):
    with Child(module(f"take_job()\n{body}"), None) as running:
        assert list(running.lines(timeout_s=30)) == []
    assert (running.ending.reason, running.ending.crashed) == (reason, crashed)
    assert not running.ending.ok


AUTOGROUP = Path("/proc/self/autogroup")


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="no autogroups here")
def test_a_child_of_least_priority_has_a_session_of_least_priority(module):
    """Between sessions Linux asks for no priority of a process."""
    name = module(
        "from pathlib import Path\ntake_job()\n"
        "tell({'group': Path('/proc/self/autogroup').read_text(), 'alone': os.getsid(0)})"
    )
    code = (
        f"import os, sys, time; sys.path.insert(0, {sys.path[0]!r})\n"
        "from gguf_embed.system.child import Child\n"
        "running = Child(NAME)\nrunning.send(None)\nprint(next(running.answers()))\n"
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
        "running = Child(NAME)\nrunning.send(None)\n"
        "print(next(running.answers()), running.pid)"
    ).replace("NAME", repr(name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert f"'alone': {os.getsid(0)}" in before
    assert "nice 19" in after
    assert after.endswith(f"'alone': {after.split()[-1]}}} {after.split()[-1]}")


def test_a_slow_one_is_ended(module):
    name = module("take_job()\ntell({'begun': 1})\ntime.sleep(60)")
    with Child(name, None) as running:
        assert list(running.answers(timeout_s=2)) == [{"begun": 1}]
    assert running.ending == Ending(code=None, errors="", timeout_s=2)
    assert running.ending.reason == "no answer in 2 s"


def test_it_ends_with_its_parent(module, tmp_path: Path):
    """Even killed outright, and even where the child is inside a long call."""
    name = module("take_job()\ntell({'pid': os.getpid()})\ntime.sleep(60)")
    code = (
        f"import sys, time; sys.path.insert(0, {sys.path[0]!r})\n"
        "from gguf_embed.system.child import Child\n"
        f"running = Child({name!r}, None)\n"
        "print(next(running.answers())['pid'], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["json", "numpy", "random", "queue"])
def test_no_module_of_the_current_folder_runs(
    name: str, module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('foreign code')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    name = module(f"import {name}\ntake_job()\ntell({{'file': {name}.__file__}})")
    with Child(name, None) as running:
        (answer,) = running.answers(timeout_s=30)
    assert Path(answer["file"]).parent != tmp_path


def test_what_native_code_prints_is_no_answer(module):
    name = module("take_job()\nprint('[ 1/9] loading')\nprint('[1]', flush=True)\ntell({'a': 1})")
    with Child(name, None) as running:
        assert list(running.answers(timeout_s=30)) == [{"a": 1}]


def test_a_job_for_a_child_that_is_dead(module):
    with Child(module("sys.exit(4)"), None) as running:
        assert running.ending.code == 4
        running.send("x" * 100_000)


def test_a_tool_that_is_not_there_or_too_slow():
    assert child.run_tool(["no-such-program-here"]) is None
    assert child.run_tool([sys.executable, "-c", "import time; time.sleep(9)"], timeout_s=1) is None
    done = child.run_tool([sys.executable, "-c", "print('ü')"])
    assert done
    assert done.returncode == 0


def test_signals_that_are_crashes():
    crashes = {s.name for s in signal.Signals if Ending(code=-s, errors="").crashed}
    assert crashes == {"SIGILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGTRAP"}
    assert os.name == "nt" or Ending(code=-64, errors="").reason
