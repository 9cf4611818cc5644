"""How busy other work keeps this machine while something is measured.

A speed that was measured beside other work is too low, and says little about which setting or
which level is the fastest. So each measurement carries its load, and choices pass over it where
that was high.

    meter = LoadMeter(n_cores)  # looks at the machine for a moment
    ...                         # measure
    load = meter.end()
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from gguf_embed.machine.probe import read_cores

MAX_BUSY = 0.25  # above it a measurement is not used for choices
SAMPLE_S = 0.2  # the kernel counts in hundredths of a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Shares of the cores in use that others took: 0 is none, 1 is all of them."""

    before: float  # just before the measurement
    during: float
    steal: float = 0.0  # of that, by other virtual machines; 0 where the system does not tell

    def __post_init__(self) -> None:
        if not min(self.before, self.during, self.steal) >= 0:
            raise ValueError("a share is below 0")

    @property
    def quiet(self) -> bool:
        """Whether speeds measured under it may be used to choose."""
        return max(self.before, self.during) <= MAX_BUSY

    def __str__(self) -> str:
        stolen = f", {100 * self.steal:.0f} % by other virtual machines" if self.steal else ""
        return (
            f"other work kept {100 * self.before:.0f} % of the cores busy before and "
            f"{100 * self.during:.0f} % during it{stolen}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """CPU seconds since the start of the system, over the CPUs that this process may use."""

    at_s: float
    busy_s: float  # by anybody, steal included
    steal_s: float
    own_s: float  # by this process and its children
    n_cpus: int


def worse(one: Load | None, other: Load | None) -> Load | None:
    """The load of two measurements together; None where neither is known."""
    if one is None or other is None:
        return one or other
    return Load(
        before=max(one.before, other.before),
        during=max(one.during, other.during),
        steal=max(one.steal, other.steal),
    )


def share_taken(first: Times, last: Times, n_cores: int) -> tuple[float, float]:
    """Shares of what `n_cores` need that others, and of them other machines, took meanwhile.

    Other work on CPUs that are not needed does no harm.
    """
    seconds = max(last.at_s - first.at_s, 1e-3)
    steal = max(0.0, last.steal_s - first.steal_s) / seconds
    own = last.own_s - first.own_s
    taken = max(steal, (last.busy_s - first.busy_s - own) / seconds)
    needed = min(float(n_cores), last.n_cpus)
    spare = last.n_cpus - needed
    return max(0.0, min(1.0, (taken - spare) / needed)), min(1.0, steal / needed)


class LoadMeter:
    """Watches the machine during a measurement that uses `n_cores`."""

    def __init__(self, n_cores: int) -> None:
        """Look for a moment, before the measurement starts."""
        self._n_cpus_needed = n_cores * _cpus_per_core()
        first = read_times()
        if first is not None:
            time.sleep(SAMPLE_S)
        self._start = read_times()
        self.before = 0.0
        if first is not None and self._start is not None:
            self.before, _ = share_taken(first, self._start, self._n_cpus_needed)

    @property
    def quiet(self) -> bool:
        """Whether the machine is quiet enough to measure; True where it is not known."""
        return self.before <= MAX_BUSY

    def end(self) -> Load | None:
        """The load of the measurement; None where the system does not tell."""
        last = read_times()
        if self._start is None or last is None:
            return None
        during, steal = share_taken(self._start, last, self._n_cpus_needed)
        return Load(before=round(self.before, 3), during=round(during, 3), steal=round(steal, 3))


class BusyMeter:
    """Watches the machine during work that must not wait for a look at it beforehand."""

    def __init__(self, n_cores: int) -> None:
        """Nothing is read before `start`."""
        self._n_cores = n_cores
        self._first: Times | None = None

    def start(self) -> None:
        """From here on it counts."""
        self._first = read_times()

    def end(self) -> Load | None:
        """The load since `start`; None where the system does not tell."""
        last = read_times()
        if self._first is None or last is None:
            return None
        during, steal = share_taken(self._first, last, self._n_cores * _cpus_per_core())
        return Load(before=round(during, 3), during=round(during, 3), steal=round(steal, 3))


def read_times() -> Times | None:
    """Now; None where the system does not tell."""
    import psutil

    try:
        process = psutil.Process()
        cpus = psutil.cpu_times(percpu=True)
        if hasattr(process, "cpu_affinity"):  # not on macOS
            allowed = [cpu for cpu in process.cpu_affinity() if cpu < len(cpus)]
            cpus = [cpus[cpu] for cpu in allowed] or cpus
        own = sum(os.times()[:4])
        for child in process.children(recursive=True):
            try:
                own += sum(child.cpu_times()[:4])
            except psutil.Error:  # it has ended meanwhile
                continue
    except (psutil.Error, OSError, NotImplementedError):
        return None
    # Guests are counted in user and nice already.
    idle = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(sum(getattr(cpu, name) for name in cpu._fields if name not in idle) for cpu in cpus)
    steal = sum(getattr(cpu, "steal", 0.0) for cpu in cpus)
    return Times(
        at_s=time.monotonic(), busy_s=busy, steal_s=steal, own_s=own, n_cpus=max(1, len(cpus))
    )


def _cpus_per_core() -> int:
    """Hyper-threads of a core: other work on any of them takes from the core."""
    import psutil

    cores = read_cores()
    return max(1, (psutil.cpu_count() or 1) // cores.physical)
