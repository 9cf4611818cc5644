"""Manners of long work on a machine that somebody uses: it takes little, and waits where it is in
the way.

    say(step_back(threads=None))        # before a model is opened: its threads and child inherit it
    pace = Pace(say=print)
    embedder.meter.pace(pace.wait)      # before each microbatch
    ...
    pace.end()                          # nobody waits any more
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from gguf_embed.system.child import lower_session

CHECK_S: Final = 2.0  # looking takes a millisecond
WAIT_S: Final = 5.0
# Work stops beyond the first value, and goes on once the second is reached.
BATTERY_PERCENT: Final = (30.0, 35.0)
STALLED_PERCENT: Final = (10.0, 3.0)  # of the time somebody waits for memory (Linux, 10 s)
FREE_SHARE: Final = (0.04, 0.08)  # of the RAM, where the system does not tell who waits
COOL_DEGREES: Final = 8.0  # below the limit of its maker
_LIMITS: Final = (60.0, 120.0)  # what a limit of a sensor may be; others say nothing
_PRESSURE: Final = Path("/proc/pressure/memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strain:
    """What may be a reason to wait; None where the machine does not tell, or has it not."""

    battery_percent: float | None = None  # None also while it is plugged in
    stalled_percent: float | None = None
    free_share: float | None = None
    over_limit_degrees: float | None = None  # of the hottest sensor; below 0: it is cooler


def reason_to_wait(strain: Strain, *, waiting: bool) -> str:
    """Why work has to wait, or ""; once it waits, until there is some room again."""
    if strain.battery_percent is not None and (
        strain.battery_percent < BATTERY_PERCENT[1 if waiting else 0]
    ):
        return f"the battery is at {strain.battery_percent:.0f} %"
    if strain.over_limit_degrees is not None and (
        strain.over_limit_degrees > (-COOL_DEGREES if waiting else 0)
    ):
        return "the machine is hot"
    if strain.stalled_percent is not None:
        if strain.stalled_percent > STALLED_PERCENT[1 if waiting else 0]:
            return "memory is short"
    elif strain.free_share is not None and strain.free_share < FREE_SHARE[1 if waiting else 0]:
        return "memory is short"
    return ""


def read_strain() -> Strain:
    """How it is now."""
    import psutil

    memory = psutil.virtual_memory()
    battery: Any = _asked("sensors_battery")
    sensors: Any = _asked("sensors_temperatures") or {}
    percent: float | None = None
    if battery is not None and battery.power_plugged is False:
        percent = float(battery.percent)
    return Strain(
        battery_percent=percent,
        stalled_percent=stalled_percent(_PRESSURE),
        free_share=memory.available / memory.total,
        over_limit_degrees=over_limit(each for found in sensors.values() for each in found),
    )


def stalled_percent(path: Path) -> float | None:
    """The share of the last ten seconds in which somebody waited for memory."""
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in path.read_text().splitlines() if line.startswith("some "))
        fields = dict(field.split("=", 1) for field in line.split()[1:])
        return float(fields.get("avg10", "nan").strip())
    return None


def over_limit(sensors: Iterable[Any]) -> float | None:
    """Degrees above the limit that its maker gave, of the sensor that is nearest to its own."""
    found: list[float] = []
    for each in sensors:
        limits = [limit for limit in (each.high, each.critical) if limit is not None]
        sane = [limit for limit in limits if _LIMITS[0] <= limit <= _LIMITS[1]]
        if sane and each.current is not None:
            found.append(each.current - min(sane))
    return max(found, default=None)


def _asked(name: str) -> object:
    """What psutil says, which is not everywhere the same."""
    import psutil

    try:
        return cast("Callable[[], object]", getattr(psutil, name))()
    except Exception:  # not on this system, or a driver answers what psutil does not expect
        return None


def step_back(*, threads: int | None) -> str:
    """Give this process, and all that it starts, the least priority and half of the cores.

    With `threads` as many cores as that. Returns in words what the system granted.
    """
    granted = [_take_fewer_cores(threads), _lower_priority(), _lower_reading()]
    return ", ".join(each for each in granted if each) or "as any other program"


def _take_fewer_cores(threads: int | None) -> str:
    import psutil

    process: Any = psutil.Process()
    with suppress(Exception):  # macOS has no such call
        cores: list[int] = sorted(process.cpu_affinity())
        n = min(len(cores), threads or max(1, len(cores) // 2))
        process.cpu_affinity(cores[-n:])
        return f"on {n} of {len(cores)} cores"
    return ""


def _lower_priority() -> str:
    import psutil

    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            if os.getsid(0) == os.getpid():  # else it is also that of the user's shell
                lower_session(os.getpid())
            return "when no other program wants them"
    with suppress(Exception):
        lowest = getattr(psutil, "IDLE_PRIORITY_CLASS", 19)
        psutil.Process().nice(lowest)
        return "with the least priority"
    return ""


def _lower_reading() -> str:
    import psutil

    process: Any = psutil.Process()
    with suppress(Exception):
        lowest = getattr(psutil, "IOPRIO_CLASS_IDLE", None)
        if lowest is not None:
            process.ionice(lowest)
        elif sys.platform == "win32":
            process.ionice(psutil.IOPRIO_VERYLOW)
    return ""


class Pace:
    """Lets work go on while nothing speaks against it; any thread may ask."""

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        strain: Callable[[], Strain] = read_strain,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """`say` gets a line when work stops and when it goes on."""
        self._say = say
        self._strain = strain
        self._clock = clock
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait
        self._lock = threading.Lock()
        self._next_look = float("-inf")

    def wait(self) -> None:
        """Come back when work may go on; at once after `end`."""
        with self._lock:  # who comes meanwhile waits here
            if self._ended.is_set() or self._clock() < self._next_look:
                return
            reason = reason_to_wait(self._strain(), waiting=False)
            if reason:
                self._say(f"paused: {reason}; it goes on by itself")
            began = self._clock()
            while reason and not self._ended.is_set():
                self._sleep(WAIT_S)
                reason = reason_to_wait(self._strain(), waiting=True)
                if not reason:
                    self._say(f"goes on, after {self._clock() - began:.0f} s")
            self._next_look = self._clock() + CHECK_S

    def end(self) -> None:
        """Let all go that wait, and hold nobody any more."""
        self._ended.set()
