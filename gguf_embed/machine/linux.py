"""What Linux tells in /proc and /sys: the CPU, its cores, and the limits on this process.

Neither ggml nor psutil knows of containers, so cgroup limits, CPU quota and affinity are read here.
`root` is the folder that holds /proc and /sys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from gguf_embed.machine.host import Cores, Cpu, Host, Ram, whole_number
from gguf_embed.machine.machine import CPU_FEATURES

# Other names of theirs: three of /proc/cpuinfo, two of llama_print_system_info (in lower case).
_ALIASES = {
    "asimd": "neon",
    "asimddp": "dotprod",
    "avx512vbmi": "avx512_vbmi",
    "avx512": "avx512f",
    "matmul_int8": "i8mm",
}


def read_cpu(root: Path, host: Host) -> Cpu:
    """The CPU of /proc/cpuinfo."""
    info = _fields(root / "proc/cpuinfo")
    flags = (info.get("flags") or info.get("Features") or "").split()  # x86, ARM
    board = read_text(root / "sys/firmware/devicetree/base/model")  # ARM names no model
    model = info.get("model name") or board or host.processor()
    return Cpu(model=model, features=features(flags))


def features(names: Iterable[str]) -> tuple[str, ...]:
    """Those of CPU_FEATURES that are among the names."""
    found = {_ALIASES.get(name, name) for name in names}
    return tuple(feature for feature in CPU_FEATURES if feature in found)


def read_cores(root: Path, host: Host) -> Cores:
    """Cores by sibling sets; `usable` counts whole cores that affinity allows, fast ones first."""
    cpus = root / "sys/devices/system/cpu"
    siblings: dict[int, frozenset[int]] = {}  # an offline CPU has no topology
    capacity: dict[int, int] = {}
    for folder in cpus.glob("cpu[0-9]*"):
        cpu = int(folder.name.removeprefix("cpu"))
        if threads := _cpu_list(read_text(folder / "topology/thread_siblings_list")):
            siblings[cpu] = threads
            capacity[cpu] = whole_number(read_text(folder / "cpu_capacity")) or 0
    allowed = _cpu_list(_fields(root / "proc/self/status").get("Cpus_allowed_list", ""))
    if not siblings:  # some sandboxes hide /sys: count each CPU as a core
        n_physical, n_allowed = host.cores()
        siblings = {cpu: frozenset({cpu}) for cpu in allowed or range(min(n_physical, n_allowed))}

    fast = _cpu_list(read_text(root / "sys/devices/cpu_core/cpus"))  # Intel hybrid
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
    return Cores(
        physical=n_cores(frozenset(siblings)),
        performance=n_cores(fast),
        usable=usable if quota is None else min(usable, math.ceil(quota)),
        quota=quota,
    )


def read_ram(root: Path, host: Host) -> Ram:
    """RAM, and the tightest limit on this process that is below it."""
    info = _fields(root / "proc/meminfo")
    total, available = _kib(info.get("MemTotal")), _kib(info.get("MemAvailable"))
    if total is None or available is None:
        total, available = host.memory()
    limits = [*_cgroup_memory(root), *_address_space(root)]
    # A limit above the RAM limits nothing; cgroup v1 writes "unlimited" as 2**63 less a page.
    binding = [(limit, left) for limit, left in limits if limit < total]
    return Ram(
        total=total,
        available=max(0, min([available, total, *(left for _, left in binding)])),
        limit=min((limit for limit, _ in binding), default=None),
    )


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left under it) of this process's cgroup and of each ancestor that has one."""
    groups, is_v1 = cgroups(root, "memory")
    for group in groups:
        if is_v1:
            limits = [whole_number(read_text(group / "memory.limit_in_bytes"))]
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:  # above memory.high the kernel throttles: as good as a limit for us
            limits = [
                whole_number(read_text(group / name)) for name in ("memory.max", "memory.high")
            ]
            used, cache = "memory.current", "inactive_file"
        set_limits = [limit for limit in limits if limit is not None]
        if set_limits:
            # File pages not in use are counted as used, and given back before the limit bites.
            reclaimable = whole_number(_fields(group / "memory.stat").get(cache, "")) or 0
            usage = whole_number(read_text(group / used)) or 0
            yield min(set_limits), min(set_limits) - max(0, usage - reclaimable)


def _address_space(root: Path) -> Iterator[tuple[int, int]]:
    """`ulimit -v`, if set, and what is left of it; mapped weights count against it."""
    for line in read_text(root / "proc/self/limits").splitlines():
        if line.startswith("Max address space"):
            limit = whole_number(line.removeprefix("Max address space").split()[0])
            if limit is not None:
                used = _kib(_fields(root / "proc/self/status").get("VmSize")) or 0
                yield limit, limit - used


def _cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that the tightest cgroup allows; None: no quota."""
    groups, is_v1 = cgroups(root, "cpu")
    quotas: list[float] = []
    for group in groups:
        if is_v1:
            parts = [read_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        else:
            parts = read_text(group / "cpu.max").split()  # "max 100000" or "50000 100000"
        quota, period = (whole_number(part) for part in parts) if len(parts) == 2 else (None, None)
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def cgroups(root: Path, controller: str) -> tuple[list[Path], bool]:
    """Folders of this process's cgroup and its ancestors, innermost first; True for cgroup v1."""
    entries = [line.split(":", 2) for line in read_text(root / "proc/self/cgroup").splitlines()]
    v1 = [entry[2] for entry in entries if len(entry) == 3 and controller in entry[1].split(",")]
    v2 = [entry[2] for entry in entries if len(entry) == 3 and not entry[1]]
    for line in read_text(root / "proc/self/mountinfo").splitlines():
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


def is_wsl(root: Path) -> bool:
    """Whether this Linux runs inside Windows."""
    return "microsoft" in read_text(root / "proc/version").lower()


def container(root: Path) -> str | None:
    """The container system that this process runs in, if any."""
    groups = read_text(root / "proc/self/cgroup") + read_text(root / "proc/1/cgroup")
    if "kubepods" in groups or (root / "var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists() or "/docker" in groups:
        return "docker"
    return read_text(root / "run/systemd/container").strip() or None


def display_controllers(root: Path) -> set[str]:
    """PCI vendors ("0x10de") of the display controllers (class 0x03....)."""
    return {
        read_text(device / "vendor").strip()
        for device in (root / "sys/bus/pci/devices").glob("*")
        if read_text(device / "class").startswith("0x03")
    }


def read_text(path: Path) -> str:
    """A small system file; "" where it is not there or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, str]:
    """{"MemTotal": "16384 kB"} of lines "MemTotal: 16384 kB" or "name value"; the first counts."""
    found: dict[str, str] = {}
    for line in read_text(path).splitlines():
        key, _, value = line.partition(":") if ":" in line else line.partition(" ")
        found.setdefault(key.strip(), value.strip())
    return found


def _kib(field: str | None) -> int | None:
    """Bytes of a field like "16384 kB"."""
    n_kib = whole_number((field or "").removesuffix("kB"))
    return None if n_kib is None else n_kib * 1024


def _cpu_list(text: str) -> frozenset[int]:
    """CPUs of a kernel list: "0-3,8" -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        low, high = whole_number(first), whole_number(last or first)
        if low is not None and high is not None:
            found.update(range(low, high + 1))
    return frozenset(found)
