"""What the operating system answers other than through files."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gguf_embed.system.child import run_tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The operating system's answers; a test gives those of any system."""

    system: str  # platform.system()
    arch: str  # platform.machine()
    processor: Callable[[], str]  # platform.processor, which may start `uname`
    run: Callable[[Sequence[str]], str | None]  # a command's output; None: absent or failed
    memory: Callable[[], tuple[int, int]]  # (total, available) bytes
    cores: Callable[[], tuple[int, int]]  # (physical cores, logical CPUs allowed)
    cpus: Callable[[], tuple[int, int]]  # logical CPUs: (the machine's, those allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The CPU's name and those of machine.CPU_FEATURES that the system tells."""

    model: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """As in Machine."""

    physical: int
    performance: int
    usable: int
    quota: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ram:
    """As in Machine, in bytes."""

    total: int
    available: int
    limit: int | None


def this_host() -> Host:
    """The running operating system."""
    return Host(
        system=platform.system(),
        arch=platform.machine(),
        processor=platform.processor,
        run=_run,
        memory=_psutil_memory,
        cores=_psutil_cores,
        cpus=_logical_cpus,
    )


def whole_number(text: str) -> int | None:
    """A whole number of 0 or more; None for anything else, such as "max" and "-1"."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _run(command: Sequence[str]) -> str | None:
    done = run_tool(command)
    return done.stdout if done is not None and done.returncode == 0 else None


def _psutil_memory() -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _logical_cpus() -> tuple[int, int]:
    n_cpus = os.cpu_count() or 1
    if sys.platform == "linux":
        return n_cpus, min(n_cpus, len(os.sched_getaffinity(0)))
    return n_cpus, n_cpus


def _psutil_cores() -> tuple[int, int]:
    import psutil

    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    process = psutil.Process()
    # macOS has no affinity, and psutil no such method there.
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else physical
    return physical, allowed
