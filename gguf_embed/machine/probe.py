"""What this machine is and what of it this process may use: `probe() -> Machine`.

Devices are asked of ggml, the rest of the operating system. Neither ggml nor psutil knows of
containers, so cgroup limits, CPU quota and affinity are read here. A `Machine` also travels as
JSON, so that a plan can be made for hardware that is elsewhere.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, cast

from gguf_embed.errors import BadInput, NativeFailed

Kind: TypeAlias = Literal["cpu", "gpu", "igpu", "accel"]
System: TypeAlias = Literal["linux", "wsl", "macos", "windows"]

FORMAT = "gguf-embed-machine/1"
REQUIREMENT = "llama-cpp-python>=0.3.36,<0.4"  # as in pyproject.toml; a test compares them

# CPU features that llama.cpp has kernels for, in the order of printing.
CPU_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "bmi2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni", "avx512_bf16"),
    *("amx_int8", "amx_bf16"),
    *("neon", "dotprod", "i8mm", "sve", "sme"),
)
# Other names of theirs: three of /proc/cpuinfo, two of llama_print_system_info (in lower case).
_ALIASES = {
    "asimd": "neon",
    "asimddp": "dotprod",
    "avx512vbmi": "avx512_vbmi",
    "avx512": "avx512f",
    "matmul_int8": "i8mm",
}
# A build without these, on a CPU that has them, is several times slower than it could be.
_EXPECTED = ("avx2", "fma", "f16c", "dotprod", "i8mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of the llama.cpp build, memory in bytes as this process may use it.

    A CPU's memory is the RAM that is left to this process (ggml would say: all of it), and so is
    the upper bound for a GPU that has no memory of its own.
    """

    name: str  # as llama.cpp calls it: "CUDA0"
    description: str
    backend: str  # "CUDA", "Metal", "Vulkan", "ROCm", "SYCL", "CPU", ...
    kind: Kind
    free_bytes: int
    total_bytes: int
    device_id: str | None  # PCI address where known; the same card may be seen by two backends


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as one process sees it: limits of containers and affinity are taken off."""

    name: str
    source: Literal["reading", "specification"]  # specification: made from public facts
    os: System
    arch: str  # "x86_64", "arm64", ...
    cpu_model: str
    cpu_features: tuple[str, ...]  # of CPU_FEATURES; empty where the system does not tell
    physical_cores: int
    performance_cores: int  # the fast ones of a hybrid CPU, else physical_cores
    usable_cores: int  # threads that pay in prompt processing: cores x affinity x quota
    cpu_quota: float | None  # CPUs' worth of time per period, from the cgroup
    ram_total_bytes: int
    ram_available_bytes: int  # after the tightest limit
    memory_limit_bytes: int | None  # cgroup or address-space limit, if below ram_total_bytes
    unified_memory: bool  # the GPU's memory is the RAM
    devices: tuple[Device, ...]  # in llama.cpp's order, each card once
    store_free_bytes: int | None  # disk space where models are kept
    backends: tuple[str, ...]  # compiled into the build, whether or not a device was found
    build: str | None  # the llama.cpp build; None when it cannot be loaded
    remarks: tuple[str, ...]  # what a person should know, with the next step


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """What the installed llama.cpp says about itself; `problem` says why it says nothing."""

    devices: tuple[Device, ...] = ()
    system_info: str = ""
    build: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the operating system answers other than through files."""

    system: str  # platform.system()
    arch: str  # platform.machine()
    processor: str  # platform.processor()
    run: Callable[[Sequence[str]], str | None]  # a command's output; None: absent or failed
    memory: Callable[[], tuple[int, int]]  # (total, available) bytes
    cores: Callable[[], tuple[int, int]]  # (physical cores, logical CPUs allowed)


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
        system = "wsl" if "microsoft" in _text(root / "proc/version").lower() else "linux"
        cpu = _linux_cpu(root, host)
    elif host.system == "Darwin":
        system = "macos"
        cpu = _macos_cpu(host)
    else:
        system = "windows"
        cpu = _Cpu(model=host.processor, features=())
    cores, memory = _cores(root, host), _memory(root, host)
    unified = (host.system, host.arch) == ("Darwin", "arm64") or _only_integrated(native.devices)
    machine = Machine(
        name="this machine",
        source="reading",
        os=system,
        arch={"aarch64": "arm64", "AMD64": "x86_64"}.get(host.arch, host.arch),
        cpu_model=_printable(cpu.model) or host.arch,
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
        store_free_bytes=None if store is None else _disk_free(store),
        backends=_backends(native),
        build=native.build,
        remarks=(),
    )
    return replace(machine, remarks=tuple(_remarks(machine, root, host, native)))


def usable_cores() -> int:
    """`probe().usable_cores` without the rest of the probe, at the start of every run."""
    return _cores(Path("/"), this_host()).usable


def this_host() -> Host:
    """The running operating system."""
    return Host(
        system=platform.system(),
        arch=platform.machine(),
        processor=platform.processor(),
        run=_run,
        memory=_psutil_memory,
        cores=_psutil_cores,
    )


def read_native() -> Native:
    """Devices and features of the installed llama.cpp; a library that does not load is told."""
    from gguf_embed.native import library as llama

    try:
        native_devices = llama.devices()
        system_info = llama.system_info()
        build = f"llama-cpp-python {llama.version()} ({llama.build_id()})"
    except (ImportError, OSError, RuntimeError, NativeFailed) as error:
        return Native(problem=_printable(str(error)) or type(error).__name__)
    return Native(
        devices=tuple(
            Device(
                name=device.name,
                description=_printable(device.description),
                backend=_backend_name(device.backend),
                kind=device.kind,
                free_bytes=min(device.free_bytes, device.total_bytes),
                total_bytes=device.total_bytes,
                device_id=device.device_id,
            )
            for device in native_devices
            if device.kind != "meta"  # a wrapper around devices that are listed themselves
        ),
        system_info=system_info,
        build=build,
    )


# -- devices -------------------------------------------------------------------------------------


def _backend_name(native_name: str) -> str:
    """The backend's usual name: ggml calls Metal "MTL"."""
    return {"MTL": "Metal"}.get(native_name, native_name)


def _backends(native: Native) -> tuple[str, ...]:
    """Backends of the build: those with a device, and those that report features without one."""
    names = [device.backend for device in native.devices]
    for item in native.system_info.split("|"):
        name, colon, _ = item.partition(" : ")  # "CUDA : ARCHS = 890 | ... | CPU : SSE3 = 1 | ..."
        if colon:
            names.append(_backend_name(name.strip()))
    return tuple(dict.fromkeys(names))


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


def _settled(device: Device, memory: _Memory, unified: bool) -> Device:
    """The device with the memory that this process can have of it."""
    if device.kind == "cpu":
        total = memory.total if memory.limit is None else memory.limit
        return replace(device, free_bytes=memory.available, total_bytes=total)
    if device.kind == "igpu" or (device.kind == "gpu" and unified):
        # ggml asks the driver, which does not count what other processes hold of the RAM.
        return replace(device, free_bytes=min(device.free_bytes, memory.available))
    return device


# -- cores and CPU -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cpu:
    model: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cores:
    physical: int
    performance: int
    usable: int
    quota: float | None = None


def _cores(root: Path, host: Host) -> _Cores:
    if host.system == "Linux":
        return _linux_cores(root, host)
    if host.system == "Darwin":
        return _macos_cores(host)
    physical, allowed = host.cores()
    return _Cores(physical=physical, performance=physical, usable=min(physical, allowed))


def _linux_cpu(root: Path, host: Host) -> _Cpu:
    info = _fields(root / "proc/cpuinfo")
    flags = (info.get("flags") or info.get("Features") or "").split()  # x86, ARM
    board = _text(root / "sys/firmware/devicetree/base/model")  # ARM names no model
    return _Cpu(
        model=info.get("model name") or board or host.processor,
        features=_features(flags),
    )


def _features(names: Iterable[str]) -> tuple[str, ...]:
    found = {_ALIASES.get(name, name) for name in names}
    return tuple(feature for feature in CPU_FEATURES if feature in found)


def _linux_cores(root: Path, host: Host) -> _Cores:
    """Cores by sibling sets; `usable` counts whole cores that affinity allows, fast ones first."""
    cpus = root / "sys/devices/system/cpu"
    siblings: dict[int, frozenset[int]] = {}  # an offline CPU has no topology
    capacity: dict[int, int] = {}
    for folder in cpus.glob("cpu[0-9]*"):
        cpu = int(folder.name.removeprefix("cpu"))
        if threads := _cpu_list(_text(folder / "topology/thread_siblings_list")):
            siblings[cpu] = threads
            capacity[cpu] = _whole(_text(folder / "cpu_capacity")) or 0
    allowed = _cpu_list(_fields(root / "proc/self/status").get("Cpus_allowed_list", ""))
    if not siblings:  # some sandboxes hide /sys: count each CPU as a core
        n_physical, n_allowed = host.cores()
        siblings = {cpu: frozenset({cpu}) for cpu in allowed or range(min(n_physical, n_allowed))}

    fast = _cpu_list(_text(root / "sys/devices/cpu_core/cpus"))  # Intel hybrid
    if not fast:  # ARM big.LITTLE: cores of more than half the best one's capacity keep pace
        best = max(capacity.values(), default=0)
        fast = frozenset(cpu for cpu in siblings if 2 * capacity.get(cpu, 0) > best)
    fast = (fast & siblings.keys()) or frozenset(siblings)
    allowed = (allowed & siblings.keys()) or frozenset(siblings)

    def n_cores(chosen: frozenset[int]) -> int:
        return len({siblings[cpu] for cpu in chosen})

    # A slow core holds up the others at each barrier, a hyper-thread shares the multipliers.
    usable = n_cores(allowed & fast) or n_cores(allowed)
    quota = _cpu_quota(root)
    return _Cores(
        physical=n_cores(frozenset(siblings)),
        performance=n_cores(fast),
        usable=usable if quota is None else min(usable, math.ceil(quota)),
        quota=quota,
    )


def _macos_cpu(host: Host) -> _Cpu:
    features: tuple[str, ...] = ()
    if host.arch == "arm64":  # every Apple core has neon; an Intel Mac's features stay untold
        named = {"dotprod": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "sme": "FEAT_SME"}
        have = [name for name, key in named.items() if _sysctl(host, f"hw.optional.arm.{key}")]
        features = ("neon", *have)
    model = host.run(("sysctl", "-n", "machdep.cpu.brand_string")) or ""
    return _Cpu(model=model, features=features)


def _macos_cores(host: Host) -> _Cores:
    physical = _sysctl(host, "hw.physicalcpu") or host.cores()[0]
    performance = _sysctl(host, "hw.perflevel0.physicalcpu") or physical
    return _Cores(physical=physical, performance=performance, usable=performance)


def _sysctl(host: Host, key: str) -> int:
    """A number of macOS's sysctl; 0 where it does not exist."""
    return _whole(host.run(("sysctl", "-n", key)) or "") or 0


# -- memory and cgroups --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    total: int
    available: int
    limit: int | None


def _memory(root: Path, host: Host) -> _Memory:
    """RAM, and the tightest limit on this process that is below it."""
    info = _fields(root / "proc/meminfo") if host.system == "Linux" else {}
    total, available = _kib(info.get("MemTotal")), _kib(info.get("MemAvailable"))
    if total is None or available is None:
        total, available = host.memory()
    limits = [*_cgroup_memory(root), *_address_space(root)] if host.system == "Linux" else []
    # A limit above the RAM limits nothing; cgroup v1 writes "unlimited" as 2**63 less a page.
    binding = [(limit, room) for limit, room in limits if limit < total]
    return _Memory(
        total=total,
        available=max(0, min([available, total, *(room for _, room in binding)])),
        limit=min((limit for limit, _ in binding), default=None),
    )


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, room left under it) of this process's cgroup and of each ancestor that has one."""
    groups, is_v1 = _groups(root, "memory")
    for group in groups:
        if is_v1:
            limits = [_whole(_text(group / "memory.limit_in_bytes"))]
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:  # above memory.high the kernel throttles: as good as a limit for us
            limits = [_whole(_text(group / name)) for name in ("memory.max", "memory.high")]
            used, cache = "memory.current", "inactive_file"
        set_limits = [limit for limit in limits if limit is not None]
        if set_limits:
            # File pages not in use are counted as used, and given back before the limit bites.
            reclaimable = _whole(_fields(group / "memory.stat").get(cache, "")) or 0
            usage = _whole(_text(group / used)) or 0
            yield min(set_limits), min(set_limits) - max(0, usage - reclaimable)


def _address_space(root: Path) -> Iterator[tuple[int, int]]:
    """`ulimit -v`, if set, and what is left of it; mapped weights count against it."""
    for line in _text(root / "proc/self/limits").splitlines():
        if line.startswith("Max address space"):
            limit = _whole(line.removeprefix("Max address space").split()[0])
            if limit is not None:
                used = _kib(_fields(root / "proc/self/status").get("VmSize")) or 0
                yield limit, limit - used


def _cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that the tightest cgroup allows; None: no quota."""
    groups, is_v1 = _groups(root, "cpu")
    quotas: list[float] = []
    for group in groups:
        if is_v1:
            parts = [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        else:
            parts = _text(group / "cpu.max").split()  # "max 100000" or "50000 100000"
        quota, period = (_whole(part) for part in parts) if len(parts) == 2 else (None, None)
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> tuple[list[Path], bool]:
    """Folders of this process's cgroup and its ancestors, innermost first; True for cgroup v1."""
    entries = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    v1 = [entry[2] for entry in entries if len(entry) == 3 and controller in entry[1].split(",")]
    v2 = [entry[2] for entry in entries if len(entry) == 3 and not entry[1]]
    for line in _text(root / "proc/self/mountinfo").splitlines():
        # "36 35 0:29 ROOT MOUNT_POINT rw,... [tags] - cgroup SOURCE rw,memory" (man 5 proc)
        before, after = (part.split() for part in line.partition(" - ")[::2])
        if len(before) < 5 or len(after) < 3 or not (v1 or v2):
            continue
        if after[0] != ("cgroup" if v1 else "cgroup2"):
            continue
        if v1 and controller not in after[2].split(","):
            continue
        top = root / before[4].lstrip("/")
        path = PurePosixPath((v1 or v2)[0])
        # In a container the mount may show only a part of the tree, and the path may lead out of
        # it: then the top of what is mounted is what we have.
        inside = path.relative_to(before[3]).parts if path.is_relative_to(before[3]) else ()
        if ".." in inside:
            inside = ()
        return [top.joinpath(*inside[:n]) for n in range(len(inside), -1, -1)], bool(v1)
    return [], False


# -- remarks -------------------------------------------------------------------------------------


def _remarks(machine: Machine, root: Path, host: Host, native: Native) -> Iterator[str]:
    """What a person should know about this machine, with the next step."""
    os = machine.os
    if native.problem is not None:
        yield (
            f"llama.cpp cannot be loaded ({native.problem}); "
            f"reinstall it: {_reinstall(os, '-DGGML_NATIVE=on')}"
        )
    else:
        yield from _build_against_cpu(machine, native)
        yield from _unused_gpus(machine, root, host)
    for device in machine.devices:
        if device.kind == "igpu" or (device.kind == "gpu" and machine.unified_memory):
            yield (
                f"{device.name} has no memory of its own: its {_gib(device.free_bytes)} free are "
                f"part of the {_gib(machine.ram_available_bytes)} of RAM, not in addition"
            )
    if os == "wsl":
        yield (
            "WSL: when the GPU is full, Windows lends it RAM instead of failing, and everything "
            "becomes very slow; keep some GPU memory free"
        )
    if container := _container(root):
        yield f"in a container ({container}): cores, memory and GPUs are those it was given"


def _build_against_cpu(machine: Machine, native: Native) -> Iterator[str]:
    """The build's instructions against the CPU's, where the system tells us the latter."""
    _, _, cpu_part = native.system_info.partition("CPU : ")
    built = set(_features(item.split("=")[0].strip().lower() for item in cpu_part.split("|")))
    have = set(machine.cpu_features)
    if not (built and have):
        return
    lacking = [feature for feature in CPU_FEATURES if feature in built - have]
    unused = [feature for feature in _EXPECTED if feature in have - built]
    if lacking:
        yield (
            f"llama.cpp was compiled for {', '.join(lacking)}, which this CPU lacks: it can die "
            f"of an illegal instruction; rebuild it here: "
            f"{_reinstall(machine.os, '-DGGML_NATIVE=on')}"
        )
    if unused:
        yield (
            f"llama.cpp was compiled without {', '.join(unused)}, which this CPU has: it runs far "
            f"below its speed; rebuild it here: {_reinstall(machine.os, '-DGGML_NATIVE=on')}"
        )


def _unused_gpus(machine: Machine, root: Path, host: Host) -> Iterator[str]:
    """GPUs that are here and that the build does not use."""
    os = machine.os
    gpus = [device for device in machine.devices if device.kind in ("gpu", "igpu")]
    if os == "macos":
        if machine.arch == "arm64" and not gpus:
            yield (
                "the installed llama.cpp has no Metal, so this Mac's GPU is idle; "
                f"{_reinstall(os, '-DGGML_METAL=on')}"
            )
        elif _sysctl(host, "sysctl.proc_translated"):
            yield (
                "Python runs as x86_64 under Rosetta, without the GPU and at a fraction of the "
                "CPU's speed; install an arm64 Python"
            )
        return

    cards = _display_controllers(root)
    uses_nvidia = any(
        gpu.backend == "CUDA" or (gpu.backend == "Vulkan" and "nvidia" in gpu.description.lower())
        for gpu in gpus
    )
    if not uses_nvidia:
        yield from _unused_nvidia(machine, root, host, in_pci="0x10de" in cards)
    if not (root / "dev/dri").exists():  # no driver, or not given to this container
        return
    for vendor, name, backends, also in (
        ("0x1002", "AMD", ("ROCm", "Vulkan"), "; with ROCm, -DGGML_HIP=on instead"),
        ("0x8086", "Intel", ("SYCL", "Vulkan"), ""),
    ):
        if vendor in cards and not any(gpu.backend in backends for gpu in gpus):
            yield (
                f"an {name} GPU (perhaps an integrated one) is here, and the installed llama.cpp "
                f"(backends: {', '.join(machine.backends)}) does not use it; with the Vulkan SDK "
                f"installed: {_reinstall(os, '-DGGML_VULKAN=on')}{also}"
            )


def _unused_nvidia(machine: Machine, root: Path, host: Host, *, in_pci: bool) -> Iterator[str]:
    query = ("--query-gpu=name,memory.total", "--format=csv,noheader")
    listed: str | None = None
    for program in ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi"):
        listed = listed or host.run((program, *query))
    names = "; ".join(_printable(line) for line in (listed or "").splitlines() if line.strip())
    if not (names or in_pci or (root / "proc/driver/nvidia").exists()):
        return
    reinstall = f"with the CUDA toolkit installed: {_reinstall(machine.os, '-DGGML_CUDA=on')}"
    if names and "CUDA" not in machine.backends:
        yield (
            f"{names}: here, but the installed llama.cpp (backends: "
            f"{', '.join(machine.backends)}) cannot use it; {reinstall}"
        )
    elif names:
        yield (
            f"{names}: here, and llama.cpp has CUDA, but CUDA offers no device; look at "
            "CUDA_VISIBLE_DEVICES and at the driver's version in nvidia-smi"
        )
    elif _container(root) is not None:
        yield (
            "an NVIDIA GPU is in this machine but not in this container; start it with the GPU "
            "(docker run --gpus all)"
            + ("" if "CUDA" in machine.backends else f"; then, {reinstall}")
        )
    else:
        yield (
            "an NVIDIA GPU is in this machine but nvidia-smi does not answer; install or load "
            "its driver" + ("" if "CUDA" in machine.backends else f"; then, {reinstall}")
        )


def _display_controllers(root: Path) -> set[str]:
    """PCI vendors ("0x10de") of the display controllers (class 0x03....)."""
    return {
        _text(device / "vendor").strip()
        for device in (root / "sys/bus/pci/devices").glob("*")
        if _text(device / "class").startswith("0x03")
    }


def _container(root: Path) -> str | None:
    """The container system that this process runs in, if any."""
    groups = _text(root / "proc/self/cgroup") + _text(root / "proc/1/cgroup")
    if "kubepods" in groups or (root / "var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists() or "/docker" in groups:
        return "docker"
    return _text(root / "run/systemd/container").strip() or None


def _reinstall(os: System, flags: str) -> str:
    pip = f'pip install --force-reinstall --no-cache-dir "{REQUIREMENT}"'
    if os == "windows":
        return f'$env:CMAKE_ARGS="{flags}"; {pip}'
    return f'CMAKE_ARGS="{flags}" {pip}'


# -- printing ------------------------------------------------------------------------------------


def summary(machine: Machine) -> list[tuple[str, str]]:
    """(label, value) lines that describe the machine to a person; labels may repeat."""
    limit, quota = machine.memory_limit_bytes, machine.cpu_quota
    cores = f"{machine.usable_cores} usable of {machine.physical_cores}"
    if machine.performance_cores != machine.physical_cores:
        cores += f", {machine.performance_cores} fast"
    if quota is not None:
        cores += f", quota {quota:g} CPUs"
    memory = f"{_gib(machine.ram_available_bytes)} available of {_gib(machine.ram_total_bytes)}"
    if limit is not None:
        memory += f", limited to {_gib(limit)}"
    if machine.unified_memory:
        memory += ", shared with the GPU"
    lines = [
        ("machine", f"{machine.name} ({machine.source})"),
        ("system", f"{machine.os}, {machine.arch}"),
        ("CPU", machine.cpu_model),
        ("CPU features", " ".join(machine.cpu_features) or "not told by the system"),
        ("cores", cores),
        ("memory", memory),
    ]
    for device in machine.devices:
        if device.kind != "cpu":
            free = f"{_gib(device.free_bytes)} free of {_gib(device.total_bytes)}"
            size = f", {free}" if device.total_bytes else ""
            kind = {"gpu": "GPU", "igpu": "integrated GPU", "accel": "accelerator"}[device.kind]
            lines.append((kind, f"{device.name}: {device.description}{size}"))
    if machine.store_free_bytes is not None:
        lines.append(("model store", f"{_gib(machine.store_free_bytes)} free"))
    lines.append(("llama.cpp", machine.build or "not told"))
    lines.append(("backends", ", ".join(machine.backends) or "none"))
    return lines + [("remark", remark) for remark in machine.remarks]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


# -- JSON ----------------------------------------------------------------------------------------


def machine_to_json(machine: Machine) -> str:
    """The machine as a JSON object that `machine_from_json` takes, on any machine."""
    return json.dumps({"format": FORMAT, **asdict(machine)}, indent=2, ensure_ascii=False) + "\n"


def machine_from_json(text: str) -> Machine:
    """The machine of `machine_to_json`'s text, every key checked; raises BadInput with the key."""
    try:
        raw: object = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise BadInput(f"machine description: not JSON: {error}; {_AGAIN}") from None
    if not isinstance(raw, dict):
        raise _refused("", "expected a JSON object", raw)
    record = cast("dict[str, object]", raw)
    if record.get("format") != FORMAT:
        raise _refused("format", f'expected "{FORMAT}"', record.get("format"))
    rest = {key: value for key, value in record.items() if key != "format"}
    machine = Machine(**_record(_MACHINE, rest, ""))
    for key, value, most, limit in (
        ("ram_available_bytes", machine.ram_available_bytes, machine.ram_total_bytes, "ram_total"),
        ("performance_cores", machine.performance_cores, machine.physical_cores, "physical_cores"),
        ("usable_cores", machine.usable_cores, machine.physical_cores, "physical_cores"),
        *(
            (f"devices[{index}].free_bytes", device.free_bytes, device.total_bytes, "total_bytes")
            for index, device in enumerate(machine.devices)
        ),
    ):
        if value > most:
            raise _refused(key, f"expected at most {limit}, {most}", value)
    return machine


_AGAIN = "make the file with `gguf-embed probe --json`, or correct it by hand"
_Reader: TypeAlias = Callable[[object, str], Any]  # (value, its key) -> the value, checked


def _refused(key: str, expected: str, got: object) -> BadInput:
    shown = json.dumps(got)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    where = f"machine description: {key}" if key else "machine description"
    return BadInput(f"{where}: {expected}, got {shown}; {_AGAIN}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number here")


def _record(readers: dict[str, _Reader], value: object, key: str) -> dict[str, Any]:
    """Exactly the keys of `readers`, each read by its reader."""
    if not isinstance(value, dict):
        raise _refused(key, "expected an object", value)
    given = cast("dict[str, object]", value)
    prefix = f"{key}." if key else ""
    for name in readers:
        if name not in given:
            raise BadInput(f"machine description: {prefix}{name} is missing; {_AGAIN}")
    for name in given:
        if name not in readers:
            raise BadInput(
                f"machine description: {prefix}{name} is not a known key "
                f"(known: {', '.join(readers)}); {_AGAIN}"
            )
    return {name: reader(given[name], f"{prefix}{name}") for name, reader in readers.items()}


def _read_text(value: object, key: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise _refused(key, "expected one line of printable text", value)
    return value


def _read_bool(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise _refused(key, "expected true or false", value)
    return value


def _read_bytes(value: object, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise _refused(key, "expected a whole number of bytes", value)
    return value


def _read_cores(value: object, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65536:
        raise _refused(key, "expected a number of cores, 1 or more", value)
    return value


def _read_quota(value: object, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 65536:
        raise _refused(key, "expected a number of CPUs above 0", value)
    return float(value)


def _read_device(value: object, key: str) -> Device:
    return Device(**_record(_DEVICE, value, key))


def _optional(reader: _Reader) -> _Reader:
    return lambda value, key: None if value is None else reader(value, key)


def _one_of(*choices: str) -> _Reader:
    def read(value: object, key: str) -> object:
        if value not in choices:
            raise _refused(key, f"expected one of {', '.join(choices)}", value)
        return value

    return read


def _tuple_of(reader: _Reader) -> _Reader:
    def read(value: object, key: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _refused(key, "expected a list", value)
        items = cast("list[object]", value)
        return tuple(reader(item, f"{key}[{index}]") for index, item in enumerate(items))

    return read


_DEVICE: dict[str, _Reader] = {
    "name": _read_text,
    "description": _read_text,
    "backend": _read_text,
    "kind": _one_of("cpu", "gpu", "igpu", "accel"),
    "free_bytes": _read_bytes,
    "total_bytes": _read_bytes,
    "device_id": _optional(_read_text),
}
_MACHINE: dict[str, _Reader] = {
    "name": _read_text,
    "source": _one_of("reading", "specification"),
    "os": _one_of("linux", "wsl", "macos", "windows"),
    "arch": _read_text,
    "cpu_model": _read_text,
    "cpu_features": _tuple_of(_one_of(*CPU_FEATURES)),
    "physical_cores": _read_cores,
    "performance_cores": _read_cores,
    "usable_cores": _read_cores,
    "cpu_quota": _optional(_read_quota),
    "ram_total_bytes": _read_bytes,
    "ram_available_bytes": _read_bytes,
    "memory_limit_bytes": _optional(_read_bytes),
    "unified_memory": _read_bool,
    "devices": _tuple_of(_read_device),
    "store_free_bytes": _optional(_read_bytes),
    "backends": _tuple_of(_read_text),
    "build": _optional(_read_text),
    "remarks": _tuple_of(_read_text),
}


# -- reading files and asking the system ---------------------------------------------------------


def _text(path: Path) -> str:
    """A small system file; "" where it is not there or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, str]:
    """{"MemTotal": "16384 kB"} of lines "MemTotal: 16384 kB" or "name value"; the first counts."""
    found: dict[str, str] = {}
    for line in _text(path).splitlines():
        key, _, value = line.partition(":") if ":" in line else line.partition(" ")
        found.setdefault(key.strip(), value.strip())
    return found


def _whole(text: str) -> int | None:
    """A whole number of 0 or more; None for anything else, such as "max" and "-1"."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _kib(field: str | None) -> int | None:
    """Bytes of a field like "16384 kB"."""
    n_kib = _whole((field or "").removesuffix("kB"))
    return None if n_kib is None else n_kib * 1024


def _cpu_list(text: str) -> frozenset[int]:
    """CPUs of a kernel list: "0-3,8" -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        low, high = _whole(first), _whole(last or first)
        if low is not None and high is not None:
            found.update(range(low, high + 1))
    return frozenset(found)


def _printable(text: str) -> str:
    """One line without what a terminal would interpret."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())


def _disk_free(folder: Path) -> int | None:
    """Free bytes on the disk of `folder` or, before it is made, of its nearest parent."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _psutil_memory() -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _psutil_cores() -> tuple[int, int]:
    import psutil

    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    process = psutil.Process()
    # macOS has no affinity, and psutil no such method there.
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else physical
    return physical, allowed
