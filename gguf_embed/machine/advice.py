"""What a person should know about a machine, with the next step.

Only `doctor` and `probe` ask: to find a GPU that is not used, other programs are started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gguf_embed.machine import linux, macos
from gguf_embed.machine.build import Native, read_native
from gguf_embed.machine.host import Host, this_host
from gguf_embed.machine.machine import CPU_FEATURES, Machine, System, gib, one_line
from gguf_embed.native.library import REQUIREMENT

# A build without these, on a CPU that has them, is several times slower than it could be.
_EXPECTED = ("avx2", "fma", "f16c", "dotprod", "i8mm")


def advised(
    machine: Machine,
    *,
    root: Path = Path("/"),
    host: Host | None = None,
    native: Native | None = None,
) -> Machine:
    """The machine with its remarks; the other arguments are those of `probe`."""
    remarks = _all(machine, root, host or this_host(), native or read_native())
    return replace(machine, remarks=tuple(remarks))


def _all(machine: Machine, root: Path, host: Host, native: Native) -> Iterator[str]:
    """What a person should know about this machine, with the next step."""
    os = machine.os
    if native.problem is not None:
        yield native.problem
    else:
        yield from _build_against_cpu(machine, native)
        yield from _unused_gpus(machine, root, host)
    for device in machine.devices:
        if device.kind == "igpu" or (device.kind == "gpu" and machine.unified_memory):
            yield (
                f"{device.name} has no memory of its own: its {gib(device.free_bytes)} free are "
                f"part of the {gib(machine.ram_available_bytes)} of RAM, not in addition"
            )
    if os == "wsl":
        yield (
            "WSL: when the GPU is full, Windows lends it RAM instead of failing, and everything "
            "becomes very slow; keep some GPU memory free"
        )
    if container := linux.container(root):
        yield f"in a container ({container}): cores, memory and GPUs are those it was given"


def _build_against_cpu(machine: Machine, native: Native) -> Iterator[str]:
    """The build's instructions against the CPU's, where the system tells us the latter."""
    _, _, cpu_part = native.system_info.partition("CPU : ")
    built = set(linux.features(item.split("=")[0].strip().lower() for item in cpu_part.split("|")))
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
        elif macos.sysctl(host, "sysctl.proc_translated"):
            yield (
                "Python runs as x86_64 under Rosetta, without the GPU and at a fraction of the "
                "CPU's speed; install an arm64 Python"
            )
        return

    cards = linux.display_controllers(root)
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
    names = "; ".join(one_line(line) for line in (listed or "").splitlines() if line.strip())
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
    elif linux.container(root) is not None:
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


def _reinstall(os: System, flags: str) -> str:
    pip = f'pip install --force-reinstall --no-cache-dir "{REQUIREMENT}"'
    if os == "windows":
        return f'$env:CMAKE_ARGS="{flags}"; {pip}'
    return f'CMAKE_ARGS="{flags}" {pip}'
