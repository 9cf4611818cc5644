"""What this machine is and what of it this process may use: `probe() -> Machine`.

Devices are asked of ggml, the rest of the operating system. It makes no remarks and starts no
tools to find something to remark on: `advice` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gguf_embed.errors import BadOption, counted
from gguf_embed.machine import linux, macos
from gguf_embed.machine.build import Native, backends, read_native
from gguf_embed.machine.host import Cores, Cpu, Host, Ram, this_host
from gguf_embed.machine.machine import Device, Machine, System, one_line
from gguf_embed.system.files import free_bytes


def probe(
    *,
    root: Path = Path("/"),
    store: Path | None = None,
    host: Host | None = None,
    native: Native | None = None,
) -> Machine:
    """This machine, as this process may use it.

    `store` is the folder (made or not) whose free disk space is wanted. `root` holds /proc, /sys
    and /dev; with `host` and `native` it lets a test describe any machine. Loads llama.cpp, and
    with it the GPU drivers, unless `native` is given.
    """
    host = host or this_host()
    native = native or read_native()
    system: System
    if host.system == "Linux":
        system = "wsl" if linux.is_wsl(root) else "linux"
        cpu = linux.read_cpu(root, host)
    elif host.system == "Darwin":
        system = "macos"
        cpu = macos.read_cpu(host)
    else:
        system = "windows"
        cpu = Cpu(model=host.processor(), features=())
    cores, memory = read_cores(root, host), _read_ram(root, host)
    unified = (host.system, host.arch) == ("Darwin", "arm64") or _only_integrated(native.devices)
    return Machine(
        name="this machine",
        source="reading",
        os=system,
        arch={"aarch64": "arm64", "AMD64": "x86_64"}.get(host.arch, host.arch),
        cpu_model=one_line(cpu.model) or host.arch,
        cpu_features=cpu.features,
        physical_cores=cores.physical,
        performance_cores=cores.performance,
        usable_cores=cores.usable,
        cpu_quota=cores.quota,
        ram_total_bytes=memory.total,
        ram_available_bytes=memory.available,
        memory_limit_bytes=memory.limit,
        unified_memory=unified,
        devices=tuple(_settled(device, memory, unified) for device in _each_once(native.devices)),
        store_free_bytes=None if store is None else free_bytes(store),
        backends=backends(native),
        build=native.build,
        remarks=(),
    )


def usable_cores() -> int:
    """`probe().usable_cores` without the rest of the probe, at the start of every run."""
    return read_cores().usable


def read_cores(root: Path = Path("/"), host: Host | None = None) -> Cores:
    """Cores and those of them that this process may use; the arguments are those of `probe`."""
    host = host or this_host()
    if host.system == "Linux":
        return linux.read_cores(root, host)
    if host.system == "Darwin":
        return macos.read_cores(host)
    physical, allowed = host.cores()
    return Cores(physical=physical, performance=physical, usable=min(physical, allowed))


def check_threads(
    n_threads: int, *, root: Path = Path("/"), host: Host | None = None
) -> str | None:
    """A remark where this process may use fewer CPUs than so many threads want.

    Raises BadOption where the machine itself has fewer: they would wait for each other.
    """
    host = host or this_host()
    n_cpus, n_allowed = host.cpus()
    cores = read_cores(root, host)
    if n_threads > n_cpus:
        raise BadOption(
            f"{n_threads} threads are more than the {counted(n_cpus, 'CPU')} of this machine; "
            f"give at most {n_cpus}, or leave it out"
        )
    if cores.quota is not None:
        n_allowed = min(n_allowed, math.ceil(cores.quota))
    if n_threads > n_allowed:
        return (
            f"{n_threads} threads share the {counted(n_allowed, 'CPU')} that this process may use "
            f"of {n_cpus} (affinity or the limit of a container): more than {n_allowed} are slower"
        )
    return None


def _each_once(devices: Sequence[Device]) -> Iterator[Device]:
    """GPUs with the PCI address of an earlier one left out, as llama.cpp does (src/llama.cpp)."""
    seen: set[str] = set()
    for device in devices:
        if device.kind in ("gpu", "igpu") and device.device_id is not None:
            if device.device_id in seen:
                continue
            seen.add(device.device_id)
        yield device


def _only_integrated(devices: Sequence[Device]) -> bool:
    kinds = {device.kind for device in devices}
    return "igpu" in kinds and "gpu" not in kinds


def _settled(device: Device, memory: Ram, unified: bool) -> Device:
    """The device with the memory that this process can have of it."""
    if device.kind == "cpu":
        total = memory.total if memory.limit is None else memory.limit
        return replace(device, free_bytes=memory.available, total_bytes=total)
    if device.kind == "igpu" or (device.kind == "gpu" and unified):
        # ggml asks the driver, which does not count what other processes hold of the RAM.
        return replace(device, free_bytes=min(device.free_bytes, memory.available))
    return device


def _read_ram(root: Path, host: Host) -> Ram:
    if host.system == "Linux":
        return linux.read_ram(root, host)
    total, available = host.memory()
    return Ram(total=total, available=max(0, min(available, total)), limit=None)
