"""How busy other work keeps the machine: from counters, and on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from gguf_embed.machine import load
from gguf_embed.machine.load import MAX_BUSY, Load, LoadMeter, Times, share_taken, worse

REAL = load.read_times  # before conftest's fixture takes it away
START = Times(at_s=100.0, busy_s=50.0, steal_s=5.0, own_s=7.0, n_cpus=4)


def later(seconds: float = 10, *, busy: float = 0, steal: float = 0, own: float = 0) -> Times:
    """`seconds` after START; the others are CPU seconds meanwhile."""
    return replace(
        START,
        at_s=START.at_s + seconds,
        busy_s=START.busy_s + busy,
        steal_s=START.steal_s + steal,
        own_s=START.own_s + own,
    )


@pytest.mark.parametrize(
    ("end", "n_cores", "share"),
    [
        (later(), 4, 0.0),
        (later(busy=40, own=40), 4, 0.0),  # all of it is ours
        (later(busy=40, own=30), 4, 0.25),
        (later(busy=20), 4, 0.5),
        (later(busy=40), 4, 1.0),
        (later(busy=20), 2, 0.0),  # on CPUs that we do not need
        (later(busy=30), 2, 0.5),
        (later(busy=40), 1, 1.0),
        (later(busy=10), 64, 0.25),  # more threads than CPUs
        (later(busy=10, own=12), 4, 0.0),  # clocks differ a little
        (later(seconds=0), 4, 0.0),
    ],
)
def test_the_share_that_others_take(end: Times, n_cores: int, share: float):
    assert share_taken(START, end, n_cores)[0] == pytest.approx(share)


def test_what_other_machines_steal_counts():
    taken, steal = share_taken(START, later(busy=20, own=10, steal=10), 4)
    assert (taken, steal) == pytest.approx((0.25, 0.25))
    assert share_taken(START, later(busy=10, own=10, steal=8), 4)[0] == pytest.approx(0.2)


def test_quiet_or_not():
    assert Load(before=0.25, during=0.25).quiet
    assert not Load(before=0.26, during=0.0).quiet
    assert not Load(before=0.0, during=0.26).quiet
    with pytest.raises(ValueError, match="below 0"):
        Load(before=-0.1, during=0.0)
    assert str(Load(before=0.1, during=0.5, steal=0.2)) == (
        "other work kept 10 % of the cores busy before and 50 % during it, "
        "20 % by other virtual machines"
    )


def test_the_worse_of_two():
    one, other = Load(before=0.1, during=0.2), Load(before=0.0, during=0.3, steal=0.1)
    assert worse(one, other) == Load(before=0.1, during=0.3, steal=0.1)
    assert worse(None, other) is other
    assert worse(one, None) is one
    assert worse(None, None) is None


def test_where_the_system_does_not_tell_nothing_is_marked():
    meter = LoadMeter(2)
    assert meter.quiet
    assert meter.end() is None


@contextmanager
def spinning(n: int, *, adopted: bool) -> Iterator[None]:
    """Processes that keep a core busy each, ours or those of a stranger."""
    code = "import time; end = time.time() + 20\nwhile time.time() < end: pass"
    # A shell that ends at once leaves its child to the system.
    shell = f"{sys.executable} -c '{code}' >/dev/null 2>&1 & echo $!"
    processes: list[subprocess.Popen[str]] = []
    pids: list[int] = []
    for _ in range(n):
        if adopted:
            done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
            pids.append(int(done.stdout))
        else:
            processes.append(subprocess.Popen([sys.executable, "-c", code], text=True))
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, 9)
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts of a container are Linux's")
def test_on_this_machine_others_count_and_our_own_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load, "read_times", REAL)
    n = len(os.sched_getaffinity(0))
    with spinning(n, adopted=True):
        time.sleep(0.5)
        assert LoadMeter(n).before > MAX_BUSY
    with spinning(n, adopted=False):
        first = REAL()
        time.sleep(1)
        last = REAL()
    assert first
    assert last
    assert last.own_s > first.own_s
    all_strange = replace(last, own_s=first.own_s)
    assert share_taken(first, last, n) < share_taken(first, all_strange, n)
