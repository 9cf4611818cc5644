"""The probe against trees of /proc and /sys, other systems' answers, and this machine itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.errors import BadInput, BadOption, NativeFailed
from gguf_embed.machine import linux as of_linux
from gguf_embed.machine.advice import REQUIREMENT, advised
from gguf_embed.machine.build import Native, read_native
from gguf_embed.machine.host import Host
from gguf_embed.machine.machine import (
    CPU_FEATURES,
    Device,
    Machine,
    machine_from_json,
    machine_to_json,
    summary,
)
from gguf_embed.machine.probe import check_threads, probe
from gguf_embed.native import library

MIB, GIB = 2**20, 2**30
MACHINES = Path(__file__).parent / "machines"
AVX2 = "fpu sse2 ssse3 avx avx2 fma f16c bmi2"
X86_INFO = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | OPENMP = 1 | "
V1_UNLIMITED = "9223372036854771712"
CGROUP2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"

CPU = Device(
    name="CPU",
    description="Some CPU",
    backend="CPU",
    kind="cpu",
    free_bytes=16 * GIB,
    total_bytes=16 * GIB,
    device_id=None,
)
CPU_ONLY = Native(devices=(CPU,), system_info=X86_INFO, build="llama-cpp-python 0.3.36 (abc)")


def gpu(name: str, backend: str, **changes: Any) -> Device:
    card = Device(
        name=name,
        description=f"{backend} card",
        backend=backend,
        kind="gpu",
        free_bytes=7 * GIB,
        total_bytes=8 * GIB,
        device_id=None,
    )
    return replace(card, **changes)


def with_gpu(*cards: Device) -> Native:
    return replace(CPU_ONLY, devices=(*cards, CPU))


def host(
    system: str = "Linux", arch: str = "x86_64", answers: Mapping[str, str] | None = None
) -> Host:
    """A system that answers these commands, has 16 GiB (10 free) and 8 cores (6 CPUs allowed)."""
    known = dict(answers or {})
    return Host(
        system=system,
        arch=arch,
        processor=lambda: "Some CPU",
        run=lambda command: known.get(" ".join(command)),
        memory=lambda: (16 * GIB, 10 * GIB),
        cores=lambda: (8, 6),
        cpus=lambda: (8, 6),
    )


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def linux(
    siblings: tuple[str, ...] = ("0", "1", "2", "3"),
    *,
    allowed: str = "0-63",
    flags: str = AVX2,
    available: int = 10 * GIB,
) -> dict[str, str]:
    """A bare Linux machine with 16 GiB; `siblings[cpu]` is that CPU's thread_siblings_list."""
    return {
        "proc/version": "Linux version 6.8.0 (gcc 13) #1 SMP",
        "proc/cpuinfo": f"processor\t: 0\nmodel name\t: Some  CPU @ 3GHz\nflags\t\t: {flags}\n",
        "proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {available // 1024} kB\n",
        "proc/self/status": f"Name:\tpython\nVmSize:\t  524288 kB\nCpus_allowed_list:\t{allowed}\n",
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": CGROUP2,
    } | {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{text}\n"
        for cpu, text in enumerate(siblings)
    }


def read(tmp_path: Path, files: Mapping[str, str], **keywords: Any) -> Machine:
    """That machine, with its remarks."""
    keywords = {"host": host(), "native": CPU_ONLY, "root": tree(tmp_path, files)} | keywords
    of_probe = {key: value for key, value in keywords.items() if key != "store"}
    return advised(probe(**keywords), **of_probe)


# -- cores ---------------------------------------------------------------------------------------

NEIGHBOURS = ("0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7")
HALVES = ("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")
P_AND_E = ("0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7")  # two P-cores with SMT, four E-cores


@pytest.mark.parametrize(
    ("siblings", "allowed", "expected"),
    [
        (("0", "1"), "0-1", (2, 2)),
        (NEIGHBOURS, "0-7", (4, 4)),
        (NEIGHBOURS, "0-3", (4, 2)),  # four logical CPUs, but two cores
        (NEIGHBOURS, "0,2,4", (4, 3)),
        (HALVES, "0-3", (4, 4)),
        (HALVES, "3,7", (4, 1)),
        (HALVES, "0-1023", (4, 4)),  # containers list CPUs that are not there
    ],
)
def test_cores_are_counted_once_whatever_their_threads(tmp_path, siblings, allowed, expected):
    machine = read(tmp_path, linux(siblings, allowed=allowed))
    assert (machine.physical_cores, machine.usable_cores) == expected
    assert machine.performance_cores == machine.physical_cores


@pytest.mark.parametrize(("allowed", "usable"), [("0-7", 2), ("0-1,4-7", 1), ("4-6,99", 3)])
def test_intel_hybrid_uses_fast_cores_unless_only_slow_ones_are_allowed(tmp_path, allowed, usable):
    files = linux(P_AND_E, allowed=allowed) | {"sys/devices/cpu_core/cpus": "0-3\n"}
    machine = read(tmp_path, files)
    assert (machine.physical_cores, machine.performance_cores) == (6, 2)
    assert machine.usable_cores == usable


def test_arm_big_little_by_capacity(tmp_path):
    files = linux(tuple("01234567")) | {
        f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": str(capacity)
        for cpu, capacity in enumerate((1024, 870, 870, 870, 320, 320, 320, 320))
    }
    machine = read(tmp_path, files)
    assert (machine.physical_cores, machine.performance_cores, machine.usable_cores) == (8, 4, 4)


def test_an_offline_cpu_is_no_core(tmp_path):
    files = linux(("0", "1")) | {"sys/devices/system/cpu/cpu2/online": "0\n"}
    assert read(tmp_path, files).physical_cores == 2


@pytest.mark.parametrize(("status", "usable"), [("Cpus_allowed_list:\t0,2,5\n", 3), ("", 6)])
def test_hidden_topology_counts_allowed_cpus(tmp_path, status, usable):
    machine = read(tmp_path, linux(()) | {"proc/self/status": status})
    assert machine.usable_cores == usable


@pytest.mark.parametrize(
    ("quota", "usable"),
    [("max 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("800000 100000", 4)],
)
def test_cpu_quota_v2(tmp_path, quota, usable):
    machine = read(tmp_path, linux() | {"sys/fs/cgroup/cpu.max": quota})
    assert machine.usable_cores == usable
    number, period = quota.split()
    assert machine.cpu_quota == (None if number == "max" else int(number) / int(period))


# -- memory --------------------------------------------------------------------------------------


def test_without_limits_memory_is_what_linux_says(tmp_path):
    machine = read(tmp_path, linux())
    assert machine.ram_total_bytes == 16 * GIB
    assert machine.ram_available_bytes == 10 * GIB
    assert machine.memory_limit_bytes is None


def test_v2_takes_the_tightest_of_nested_groups(tmp_path):
    group = "sys/fs/cgroup"
    files = linux() | {
        "proc/self/cgroup": "0::/pods/pod1/app\n",
        f"{group}/pods/memory.max": str(8 * GIB),
        f"{group}/pods/memory.current": str(7 * GIB),
        f"{group}/pods/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        f"{group}/pods/cpu.max": "150000 100000",
        f"{group}/pods/pod1/memory.max": str(4 * GIB),
        f"{group}/pods/pod1/memory.current": str(1 * GIB),
        f"{group}/pods/pod1/memory.stat": "inactive_file 0\n",
        f"{group}/pods/pod1/cpu.max": "400000 100000",
        f"{group}/pods/pod1/app/memory.max": "max\n",
        f"{group}/pods/pod1/app/memory.current": str(GIB // 4),
        f"{group}/pods/pod1/app/cpu.max": "max 100000",
    }
    machine = read(tmp_path, files)
    assert machine.memory_limit_bytes == 4 * GIB
    # The outer group has the higher limit and, with its neighbours' use, the less room.
    assert machine.ram_available_bytes == 8 * GIB - 7 * GIB + GIB // 2
    assert machine.cpu_quota == 1.5
    assert machine.usable_cores == 2


def test_v2_memory_high_is_a_limit_too(tmp_path):
    files = linux() | {
        "sys/fs/cgroup/memory.max": "max",
        "sys/fs/cgroup/memory.high": str(3 * GIB),
        "sys/fs/cgroup/memory.current": str(1 * GIB),
    }
    machine = read(tmp_path, files)
    assert (machine.memory_limit_bytes, machine.ram_available_bytes) == (3 * GIB, 2 * GIB)


V1_MOUNTS = (
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


def v1_group(path: str, *, limit: str, quota: str) -> dict[str, str]:
    memory, cpu = f"sys/fs/cgroup/memory{path}", f"sys/fs/cgroup/cpu,cpuacct{path}"
    return {
        f"{memory}/memory.limit_in_bytes": f"{limit}\n",
        f"{memory}/memory.usage_in_bytes": f"{GIB}\n",
        f"{memory}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}\n",
        f"{cpu}/cpu.cfs_quota_us": f"{quota}\n",
        f"{cpu}/cpu.cfs_period_us": "100000\n",
    }


@pytest.mark.parametrize(
    ("mount_root", "own_path", "seen_at"),
    [
        ("/", "/slice/app", "/slice/app"),  # on the host
        ("/", "/slice/app", "/slice"),  # the limit is an ancestor's
        ("/docker/abc", "/docker/abc", ""),  # in a container that shares the host's namespace
        ("/docker/abc", "/docker/abc/sub", "/sub"),
        ("/docker/abc", "/elsewhere", ""),  # a path that leads out of what is mounted
        ("/", "/../outside", ""),
    ],
)
def test_v1_limits_wherever_they_are_mounted(tmp_path, mount_root, own_path, seen_at):
    files = linux() | {
        "proc/self/mountinfo": V1_MOUNTS.format(root=mount_root),
        "proc/self/cgroup": f"5:memory:{own_path}\n1:cpu,cpuacct:{own_path}\n0::/\n",
    }
    files |= v1_group(seen_at, limit=str(4 * GIB), quota="150000")
    files |= v1_group("/../outside", limit=str(GIB), quota="10000")  # another container's
    machine = read(tmp_path, files)
    assert machine.memory_limit_bytes == 4 * GIB
    assert machine.ram_available_bytes == 4 * GIB - GIB + GIB // 4
    assert (machine.cpu_quota, machine.usable_cores) == (1.5, 2)


def test_v1_unlimited(tmp_path):
    files = linux() | {
        "proc/self/mountinfo": V1_MOUNTS.format(root="/"),
        "proc/self/cgroup": "5:memory:/\n1:cpu,cpuacct:/\n",
    }
    machine = read(tmp_path, files | v1_group("", limit=V1_UNLIMITED, quota="-1"))
    assert (machine.memory_limit_bytes, machine.cpu_quota) == (None, None)
    assert machine.ram_available_bytes == 10 * GIB


def test_a_limit_above_the_ram_limits_nothing(tmp_path):
    machine = read(tmp_path, linux() | {"sys/fs/cgroup/memory.max": str(64 * GIB)})
    assert machine.memory_limit_bytes is None


def test_address_space_limit(tmp_path):
    line = f"Max address space         {2 * GIB}           unlimited            bytes\n"
    machine = read(tmp_path, linux() | {"proc/self/limits": "Max cpu time unlimited\n" + line})
    assert machine.memory_limit_bytes == 2 * GIB
    assert machine.ram_available_bytes == 2 * GIB - 524288 * 1024
    free = read(tmp_path, {"proc/self/limits": line.replace(str(2 * GIB), "unlimited")})
    assert free.memory_limit_bytes is None


def test_a_full_group_leaves_nothing_rather_than_less(tmp_path):
    full = {"sys/fs/cgroup/memory.max": str(GIB), "sys/fs/cgroup/memory.current": str(2 * GIB)}
    assert read(tmp_path, linux() | full).ram_available_bytes == 0


sizes = st.integers(0, 20 * GIB)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(sizes, sizes, sizes), max_size=3), st.tuples(sizes, sizes, sizes))
def test_another_limit_never_gives_more(groups, added):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def at_depth(depth: int, numbers: tuple[int, int, int]) -> dict[str, str]:
            path = "/".join(("sys/fs/cgroup", *"abcd"[:depth]))
            limit, used, cache = numbers
            return {
                f"{path}/memory.max": str(limit),
                f"{path}/memory.current": str(used),
                f"{path}/memory.stat": f"inactive_file {cache}\n",
            }

        files = linux() | {"proc/self/cgroup": "0::/a/b/c/d\n"}
        for depth, numbers in enumerate(groups):
            files |= at_depth(depth, numbers)
        before = read(root, files)
        after = read(root, at_depth(4, added))
        for machine in (before, after):
            limit = machine.memory_limit_bytes
            assert 0 <= machine.ram_available_bytes <= machine.ram_total_bytes
            assert limit is None or machine.ram_available_bytes <= limit < 16 * GIB
            assert machine.devices[0].free_bytes == machine.ram_available_bytes
            assert machine_from_json(machine_to_json(machine)) == machine
        assert after.ram_available_bytes <= before.ram_available_bytes
        limits = [limit for limit, _, _ in (*groups, added) if limit < 16 * GIB]
        assert after.memory_limit_bytes == min(limits, default=None)


SYSTEM_FILES = [*linux(), "proc/self/limits", "sys/fs/cgroup/memory.max", "sys/fs/cgroup/cpu.max"]
system_text = st.text(st.sampled_from("0123456789 -:,/\n\tkBmax.\0ä"), max_size=40)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(SYSTEM_FILES), system_text))
def test_any_text_in_system_files_gives_a_machine(garbled):
    # CPU numbers of many digits would only make a huge set of CPUs that are not there.
    garbled = {name: re.sub(r"\d{4,}", "999", text) for name, text in garbled.items()}
    with tempfile.TemporaryDirectory() as folder:
        machine = read(Path(folder), linux() | garbled)
    assert 1 <= machine.usable_cores <= machine.physical_cores
    assert machine_from_json(machine_to_json(machine)) == machine


# -- what and where ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "cpuinfo", "model", "features"),
    [
        (
            "x86_64",
            "model name : Intel Xeon\nflags : amx_int8 avx512_vnni avx2 avx512vbmi fma avx f16c\n"
            "\nprocessor : 1\nmodel name : another\nflags : fpu\n",
            "Intel Xeon",
            ("avx", "avx2", "fma", "f16c", "avx512_vbmi", "avx512_vnni", "amx_int8"),
        ),
        (
            "aarch64",
            "processor : 0\nFeatures : fp asimd asimddp i8mm sve\nCPU part : 0xd40\n",
            "Raspberry Pi 5",
            ("neon", "dotprod", "i8mm", "sve"),
        ),
    ],
)
def test_cpu_model_and_features(tmp_path, arch, cpuinfo, model, features):
    board = {"sys/firmware/devicetree/base/model": "Raspberry Pi 5\0"} if arch == "aarch64" else {}
    files = linux() | {"proc/cpuinfo": cpuinfo} | board
    machine = read(tmp_path, files, host=host(arch=arch))
    assert (machine.cpu_model, machine.cpu_features) == (model, features)
    assert machine.arch == {"aarch64": "arm64"}.get(arch, arch)


@pytest.mark.parametrize(
    ("files", "container"),
    [
        ({".dockerenv": ""}, "docker"),
        ({"run/.containerenv": "engine=podman"}, "podman"),
        ({"proc/1/cgroup": "4:memory:/docker/0123\n"}, "docker"),
        ({"proc/self/cgroup": "0::/kubepods.slice/pod1\n", ".dockerenv": ""}, "kubernetes"),
        ({"run/systemd/container": "lxc\n"}, "lxc"),
    ],
)
def test_containers_are_named(tmp_path, files, container):
    (remark,) = read(tmp_path, linux() | files).remarks
    assert remark.startswith(f"in a container ({container})")


def test_wsl(tmp_path):
    version = "Linux version 5.15.167.4-microsoft-standard-WSL2 (gcc 11.2)"
    machine = read(tmp_path, linux() | {"proc/version": version}, native=with_gpu(CUDA0))
    assert machine.os == "wsl"
    assert "keep some GPU memory free" in machine.remarks[0]


def test_store_need_not_exist_yet(tmp_path):
    machine = read(tmp_path / "root", linux(), store=tmp_path / "not" / "yet")
    assert machine.store_free_bytes is not None
    # Others write to the disk meanwhile.
    assert abs(machine.store_free_bytes - psutil.disk_usage(str(tmp_path)).free) < GIB
    assert read(tmp_path / "root", {}).store_free_bytes is None


MAC = {
    "sysctl -n machdep.cpu.brand_string": "Apple M4 Max\n",
    "sysctl -n hw.physicalcpu": "16\n",
    "sysctl -n hw.perflevel0.physicalcpu": "12\n",
    "sysctl -n hw.optional.arm.FEAT_DotProd": "1\n",
    "sysctl -n hw.optional.arm.FEAT_I8MM": "0\n",
    "sysctl -n sysctl.proc_translated": "0\n",
}


def test_macos(tmp_path):
    metal = gpu("MTL0", "Metal", free_bytes=12 * GIB, total_bytes=12 * GIB)
    machine = read(tmp_path, {}, host=host("Darwin", "arm64", MAC), native=with_gpu(metal))
    assert (machine.os, machine.cpu_model, machine.unified_memory) == (
        "macos",
        "Apple M4 Max",
        True,
    )
    assert (machine.physical_cores, machine.performance_cores, machine.usable_cores) == (16, 12, 12)
    assert machine.cpu_features == ("neon", "dotprod")
    assert machine.ram_available_bytes == 10 * GIB
    assert machine.devices[0].free_bytes == 10 * GIB  # Metal does not see what others hold
    assert machine.devices[0].total_bytes == 12 * GIB
    assert any("part of the 10.0 GiB of RAM" in remark for remark in machine.remarks)


def test_macos_without_metal_and_under_rosetta(tmp_path):
    apple = replace(CPU_ONLY, system_info="CPU : NEON = 1 | DOTPROD = 1 | ")
    machine = read(tmp_path, {}, host=host("Darwin", "arm64", MAC), native=apple)
    (remark,) = machine.remarks
    assert 'CMAKE_ARGS="-DGGML_METAL=on" pip install --force-reinstall' in remark
    translated = MAC | {"sysctl -n sysctl.proc_translated": "1\n"}
    machine = read(tmp_path, {}, host=host("Darwin", "x86_64", translated))
    assert "Rosetta" in machine.remarks[0]
    assert machine.cpu_features == ()  # not told, so the build is not judged by them
    assert len(machine.remarks) == 1
    old_mac = {"sysctl -n hw.physicalcpu": "4\n"}
    machine = read(tmp_path, {}, host=host("Darwin", "x86_64", old_mac))
    assert (machine.usable_cores, machine.unified_memory, machine.remarks) == (4, False, ())


def test_windows(tmp_path):
    machine = read(tmp_path, {}, host=host("Windows", "AMD64"))
    assert (machine.os, machine.arch, machine.cpu_model) == ("windows", "x86_64", "Some CPU")
    assert (machine.physical_cores, machine.usable_cores) == (8, 6)
    assert (machine.ram_total_bytes, machine.ram_available_bytes) == (16 * GIB, 10 * GIB)


# -- devices and remarks -------------------------------------------------------------------------

CUDA0 = gpu("CUDA0", "CUDA", device_id="0000:01:00.0")
SMI = "nvidia-smi --query-gpu=name,memory.total --format=csv,noheader"
RTX = {SMI: "NVIDIA GeForce RTX 4090, 24564 MiB\n"}
NVIDIA_PCI = {
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
}
AMD_PCI = {name: text.replace("0x10de", "0x1002") for name, text in NVIDIA_PCI.items()}
INTEL_PCI = {name: text.replace("0x10de", "0x8086") for name, text in NVIDIA_PCI.items()}
DRI = {"dev/dri/renderD128": ""}
CUDA_BUILD = replace(CPU_ONLY, system_info="CUDA : ARCHS = 890 | USE_GRAPHS = 1 | " + X86_INFO)
CUDA_COMMAND = (
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir '
    '"llama-cpp-python>=0.3.36,<0.4"'
)


@pytest.mark.parametrize(
    ("answers", "files", "native", "parts"),
    [
        (RTX, NVIDIA_PCI, CPU_ONLY, ["RTX 4090", "(backends: CPU)", CUDA_COMMAND]),
        ({f"/usr/lib/wsl/lib/{SMI}": "RTX 4070"}, {}, CPU_ONLY, ["RTX 4070", CUDA_COMMAND]),
        (RTX, {}, CUDA_BUILD, ["RTX 4090", "CUDA_VISIBLE_DEVICES"]),
        ({}, NVIDIA_PCI, CPU_ONLY, ["install or load its driver", CUDA_COMMAND]),
        ({}, {"proc/driver/nvidia/version": "550"}, CUDA_BUILD, ["install or load its driver"]),
        ({}, AMD_PCI | DRI, CPU_ONLY, ["an AMD GPU", "-DGGML_VULKAN=on", "-DGGML_HIP=on"]),
        ({}, INTEL_PCI | DRI, CPU_ONLY, ["an Intel GPU", '"-DGGML_VULKAN=on" pip install']),
    ],
)
def test_a_gpu_that_the_build_does_not_use_is_told(tmp_path, answers, files, native, parts):
    machine = read(tmp_path, linux() | files, host=host(answers=answers), native=native)
    (remark,) = machine.remarks
    for part in parts:
        assert part in remark
    assert ("pip install" in remark) == (native is CPU_ONLY)


def test_a_gpu_outside_the_container_is_told(tmp_path):
    remark, _ = read(tmp_path, linux() | NVIDIA_PCI | {".dockerenv": ""}).remarks
    assert "docker run --gpus all" in remark
    assert CUDA_COMMAND in remark


@pytest.mark.parametrize(
    ("answers", "files", "native"),
    [
        (RTX, NVIDIA_PCI, with_gpu(CUDA0)),
        (RTX, NVIDIA_PCI, with_gpu(gpu("Vulkan0", "Vulkan", description="NVIDIA RTX 4090"))),
        ({}, AMD_PCI | DRI, with_gpu(gpu("ROCm0", "ROCm"))),
        ({}, AMD_PCI | DRI, with_gpu(gpu("Vulkan0", "Vulkan"))),
        ({}, AMD_PCI, CPU_ONLY),  # no driver: nothing could use it
        ({}, {"sys/bus/pci/devices/1/vendor": "0x10de", "sys/bus/pci/devices/1/class": "0x04"}, {}),
        ({SMI: "\n"}, {}, CPU_ONLY),
    ],
)
def test_no_remark_without_cause(tmp_path, answers, files, native):
    machine = read(tmp_path, linux() | files, host=host(answers=answers), native=native or CPU_ONLY)
    assert machine.remarks == ()


def test_windows_gets_a_powershell_command(tmp_path):
    machine = read(tmp_path, {}, host=host("Windows", "AMD64", RTX))
    assert '$env:CMAKE_ARGS="-DGGML_CUDA=on"; pip install' in machine.remarks[0]


@pytest.mark.parametrize(
    ("flags", "system_info", "parts"),
    [
        (AVX2, X86_INFO + "AMX_INT8 = 1 | AVX512 = 1 | ", ["for avx512f, amx_int8,", "lacks"]),
        (AVX2, "CPU : SSE3 = 1 | AVX = 1 | ", ["without avx2, fma, f16c,", "-DGGML_NATIVE=on"]),
        (AVX2 + " avx512f amx_int8", X86_INFO, []),  # a deliberate, portable build
        ("", X86_INFO + "AMX_INT8 = 1 | ", []),  # the system tells nothing
        (AVX2, "", []),
    ],
)
def test_build_against_cpu(tmp_path, flags, system_info, parts):
    native = replace(CPU_ONLY, system_info=system_info)
    machine = read(tmp_path, linux(flags=flags), native=native)
    assert len(machine.remarks) == (1 if parts else 0)
    for part in parts:
        assert part in machine.remarks[0]


def test_the_cpus_memory_is_what_the_limits_leave(tmp_path):
    files = linux() | {
        "sys/fs/cgroup/memory.max": str(4 * GIB),
        "sys/fs/cgroup/memory.current": str(GIB),
    }
    (cpu,) = read(tmp_path, files).devices  # ggml said 16 GiB of 16
    assert (cpu.free_bytes, cpu.total_bytes) == (3 * GIB, 4 * GIB)


def test_an_integrated_gpu_shares_the_ram(tmp_path):
    shared = gpu("Vulkan0", "Vulkan", kind="igpu", free_bytes=15 * GIB, total_bytes=15 * GIB)
    machine = read(tmp_path, linux(), native=with_gpu(shared))
    assert machine.unified_memory
    assert machine.devices[0].free_bytes == 10 * GIB
    assert "not in addition" in machine.remarks[0]
    both = read(tmp_path, {}, native=with_gpu(CUDA0, shared))
    assert not both.unified_memory
    assert [device.free_bytes for device in both.devices] == [7 * GIB, 10 * GIB, 10 * GIB]


def test_a_card_seen_by_two_backends_is_listed_once(tmp_path):
    again = gpu("Vulkan0", "Vulkan", device_id="0000:01:00.0")
    other = gpu("Vulkan1", "Vulkan", device_id="0000:02:00.0")
    machine = read(tmp_path, linux(), native=with_gpu(CUDA0, again, other))
    assert [device.name for device in machine.devices] == ["CUDA0", "Vulkan1", "CPU"]
    assert machine.backends == ("CUDA", "Vulkan", "CPU")


def test_a_backend_without_a_device_is_still_in_the_build(tmp_path):
    assert read(tmp_path, linux(), native=CUDA_BUILD).backends == ("CPU", "CUDA")
    metal = replace(CPU_ONLY, system_info="MTL : EMBED_LIBRARY = 1 | " + X86_INFO)
    assert read(tmp_path, linux(), native=metal).backends == ("CPU", "Metal")


def test_a_library_that_does_not_load_is_a_remark(tmp_path, monkeypatch):
    def broken():
        raise NativeFailed("llama.cpp cannot be loaded (libcudart.so.12);\n reinstall it")

    monkeypatch.setattr(library, "devices", broken)
    machine = read(tmp_path, linux(), native=None)
    assert (machine.build, machine.devices) == (None, ())
    assert machine.remarks[0] == "llama.cpp cannot be loaded (libcudart.so.12); reinstall it"


def test_native_devices_are_translated(monkeypatch):
    def seen(name: str, kind: library.DeviceType, free: int) -> library.NativeDevice:
        return library.NativeDevice(
            name=name,
            description="Apple\x1b[31m M4  Max",
            kind=kind,
            backend="MTL",
            free_bytes=free,
            total_bytes=8,
            device_id=None,
        )

    monkeypatch.setattr(library, "devices", lambda: (seen("MTL0", "gpu", 9), seen("M", "meta", 1)))
    (device,) = read_native().devices  # the wrapper around other devices is left out
    assert (device.backend, device.free_bytes) == ("Metal", 8)
    assert device.description == "Apple[31m M4 Max"


# -- this machine --------------------------------------------------------------------------------


def test_probe_of_this_machine():
    machine = probe(store=Path.home())
    memory = psutil.virtual_memory()
    assert machine.source == "reading"
    assert machine.ram_total_bytes == memory.total
    assert 0 < machine.ram_available_bytes <= memory.available + 2 * GIB  # others come and go
    assert 1 <= machine.usable_cores <= (psutil.cpu_count() or 1)
    assert "CPU" in machine.backends
    (cpu,) = (device for device in machine.devices if device.kind == "cpu")
    assert cpu.free_bytes == machine.ram_available_bytes
    assert machine.build is not None
    assert machine.build.startswith("llama-cpp-python ")
    assert library.build_id() in machine.build
    assert machine_from_json(machine_to_json(machine)) == machine


def probe_in_child(prepare: str) -> Machine:
    """What a process sees of this machine after running `prepare`."""
    script = (
        f"import os\n{prepare}\n"
        "from gguf_embed.machine.build import Native\n"
        "from gguf_embed.machine.machine import machine_to_json\n"
        "from gguf_embed.machine.probe import probe\n"
        "print(machine_to_json(probe(native=Native())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return machine_from_json(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="affinity and ulimit -v are Linux's")
def test_real_affinity_and_address_space():
    cpu = min(os.sched_getaffinity(0))
    limit = 3 * GIB + 4096
    machine = probe_in_child(
        f"import resource\nos.sched_setaffinity(0, {{{cpu}}})\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))"
    )
    assert machine.usable_cores == 1
    assert machine.memory_limit_bytes == limit
    assert 0 < machine.ram_available_bytes < limit


@contextmanager
def cpu_cgroup(quota: float) -> Iterator[Path]:
    """A new child of this process's own cgroup; OSError where that is not allowed."""
    groups, is_v1 = of_linux.cgroups(Path("/"), "cpu")
    if not groups:
        raise OSError("no cgroup")
    group = groups[0] / f"gguf-embed-test-{os.getpid()}"
    group.mkdir()
    try:
        number = str(round(quota * 100_000))
        name, text = ("cpu.cfs_quota_us", number) if is_v1 else ("cpu.max", f"{number} 100000")
        if not (group / name).exists():
            raise OSError("the cpu controller is not delegated to this process")
        (group / name).write_text(text)
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_real_cpu_limit():
    """In a real cgroup with a quota; where none may be made, the real affinity must do."""
    try:
        with cpu_cgroup(quota=0.75) as group:
            machine = probe_in_child(f"open('{group}/cgroup.procs', 'w').write(str(os.getpid()))")
        assert machine.cpu_quota == 0.75
    except OSError:
        cpu = min(os.sched_getaffinity(0))
        machine = probe_in_child(f"os.sched_setaffinity(0, {{{cpu}}})")
    assert machine.usable_cores == 1


@pytest.mark.parametrize(
    ("n_threads", "quota", "said"),
    [
        (1, "max", None),
        (6, "max", None),
        (7, "max", "6 CPUs"),
        (8, "max", "6 CPUs"),
        (3, "250000", None),
        (4, "250000", "3 CPUs that this process may use of 8"),
    ],
)
def test_threads_that_share_cpus_are_told(tmp_path, n_threads, quota, said):
    files = tree(tmp_path, linux() | {"sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    remark = check_threads(n_threads, root=files, host=host())
    assert (remark is None) == (said is None)
    assert said is None or said in str(remark)


def test_more_threads_than_cpus_are_refused(tmp_path):
    with pytest.raises(BadOption, match=r"9 threads .* the 8 CPUs .* at most 8"):
        check_threads(9, root=tree(tmp_path, linux()), host=host())


# -- JSON ----------------------------------------------------------------------------------------

EXAMPLE = machine_from_json((MACHINES / "rtx-4090-24gb.json").read_text())

line = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=20)
n_bytes = st.integers(0, 2**63 - 1)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    def devices() -> Device:
        free, total = sorted((draw(n_bytes), draw(n_bytes)))
        return Device(
            name=draw(line),
            description=draw(line),
            backend=draw(line),
            kind=draw(st.sampled_from(("cpu", "gpu", "igpu", "accel"))),
            free_bytes=free,
            total_bytes=total,
            device_id=draw(st.none() | line),
        )

    fast, physical = sorted((draw(st.integers(1, 99)), draw(st.integers(1, 99))))
    available, total = sorted((draw(n_bytes), draw(n_bytes)))
    lines = st.lists(line, max_size=2).map(tuple)
    return Machine(
        name=draw(line),
        source=draw(st.sampled_from(("reading", "specification"))),
        os=draw(st.sampled_from(("linux", "wsl", "macos", "windows"))),
        arch=draw(line),
        cpu_model=draw(line),
        cpu_features=draw(st.lists(st.sampled_from(CPU_FEATURES)).map(tuple)),
        physical_cores=physical,
        performance_cores=fast,
        usable_cores=draw(st.integers(1, physical)),
        cpu_quota=draw(st.none() | st.floats(0.01, 512)),
        ram_total_bytes=total,
        ram_available_bytes=available,
        memory_limit_bytes=draw(st.none() | n_bytes),
        unified_memory=draw(st.booleans()),
        devices=tuple(devices() for _ in range(draw(st.integers(0, 3)))),
        store_free_bytes=draw(st.none() | n_bytes),
        backends=draw(lines),
        build=draw(st.none() | line),
        remarks=draw(lines),
    )


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(machines())
def test_json_round_trip(machine):
    assert machine_from_json(machine_to_json(machine)) == machine
    labels = [label for label, _ in summary(machine)]
    assert labels.count("remark") == len(machine.remarks)


def edited(path: str, value: Any) -> str:
    """The example's JSON with the value at "devices.0.kind" replaced."""
    record = json.loads(machine_to_json(EXAMPLE))
    *parents, last = path.split(".")
    place = record
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[int(last) if last.isdigit() else last] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "gguf-embed-machine/2", 'format: expected "gguf-embed-machine/1", got'),
        ("source", "guess", "source: expected one of reading, specification, got"),
        ("name", 3, "name: expected one line of printable text, got 3"),
        ("arch", "x86\n64", "arch: expected one line of printable text"),
        ("cpu_model", "\ud800", "cpu_model: expected one line"),
        ("cpu_features", "avx2", "cpu_features: expected a list"),
        ("cpu_features.0", "avx3", r"cpu_features\[0\]: expected one of avx, .*, got \"avx3\""),
        ("physical_cores", 0, "physical_cores: expected a number of cores, 1 or more, got 0"),
        ("physical_cores", True, "physical_cores: expected a number of cores"),
        ("usable_cores", 17, "usable_cores: expected at most physical_cores, 16, got 17"),
        ("performance_cores", 17, "performance_cores: expected at most physical_cores, 16"),
        ("cpu_quota", 0, "cpu_quota: expected a number of CPUs above 0, got 0"),
        ("ram_total_bytes", 64.5, "ram_total_bytes: expected a whole number of bytes, got 64.5"),
        ("ram_total_bytes", -1, "ram_total_bytes: expected a whole number of bytes, got -1"),
        ("ram_total_bytes", 64, "ram_available_bytes: expected at most ram_total, 64, got"),
        ("memory_limit_bytes", "4G", "memory_limit_bytes: expected a whole number of bytes"),
        ("unified_memory", 0, "unified_memory: expected true or false, got 0"),
        ("devices", {}, "devices: expected a list, got {}"),
        ("devices.0", None, r"devices\[0\]: expected an object, got null"),
        ("devices.0.kind", "tpu", r"devices\[0\]\.kind: expected one of cpu, gpu, igpu, accel"),
        ("devices.0.vram", 24, r"devices\[0\]\.vram is not a known key \(known: name, "),
        ("devices.0.free_bytes", 2**50, r"devices\[0\]\.free_bytes: expected at most total_bytes"),
        ("ram", 64, "ram is not a known key"),
    ],
)
def test_json_errors_name_the_key(path, value, message):
    with pytest.raises(BadInput, match=f"^machine description: {message}") as raised:
        machine_from_json(edited(path, value))
    assert "gguf-embed probe --json" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", r"expected a JSON object, got \[\]"),
        ("{}", "format: expected"),
        ('{"name": 1, "name": 2}', "'name' is given twice"),
        ('{"format": NaN}', "NaN is not a number here"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
    ],
)
def test_text_that_is_no_description(text, message):
    with pytest.raises(BadInput, match=message):
        machine_from_json(text)


@pytest.mark.parametrize("key", [field.name for field in fields(Machine)])
def test_every_key_is_required(key):
    record = json.loads(machine_to_json(EXAMPLE))
    del record[key]
    with pytest.raises(BadInput, match=f"^machine description: {key} is missing"):
        machine_from_json(json.dumps(record))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
paths = [*asdict(EXAMPLE), *(f"devices.0.{field.name}" for field in fields(Device))]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(paths), json_values)
def test_any_value_is_read_or_refused_by_name(path, value):
    refusal = None
    try:
        machine = machine_from_json(edited(path, value))
    except BadInput as error:
        refusal = str(error)
    if refusal is None:
        assert machine_from_json(machine_to_json(machine)) == machine
    else:
        assert path.removeprefix("devices.0.").split("_")[0] in refusal


# -- descriptions and printing -------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(MACHINES.glob("*.json")), ids=lambda path: path.stem)
def test_machine_descriptions(path):
    text = path.read_text(encoding="utf-8")
    machine = machine_from_json(text)
    assert machine.name == path.stem
    assert machine_to_json(machine) == text
    assert any(device.kind == "cpu" for device in machine.devices)
    assert set(machine.backends) == {device.backend for device in machine.devices}
    if machine.source == "specification":
        assert machine.remarks, "a made description says from what"
        assert machine.build is None
    if machine.unified_memory:
        assert all(device.free_bytes <= machine.ram_available_bytes for device in machine.devices)
    assert "/home" not in text
    assert "/root" not in text


def test_the_machines_that_plans_are_tested_for():
    found = {path.stem: machine_from_json(path.read_text()) for path in MACHINES.glob("*.json")}
    assert set(found) == {
        *("rtx-4090-24gb", "rtx-3090-24gb", "rtx-4070ti-12gb", "gpu-8gb", "two-gpus", "wsl"),
        *("m4-max-48gb", "m4-max-64gb", "m2-air-8gb"),
        *("laptop-16gb-no-gpu", "container-4gb", "cpu-2core-24gb"),
    }
    assert [name for name, m in found.items() if m.source == "reading"] == ["cpu-2core-24gb"]
    for name, total_gib in {"m4-max-48gb": 36, "m4-max-64gb": 48, "m2-air-8gb": 5}.items():
        assert found[name].devices[0].total_bytes // GIB == total_gib
    assert found["container-4gb"].usable_cores == 2


def test_summary():
    lines = summary(EXAMPLE)
    assert lines[:3] == [
        ("machine", "rtx-4090-24gb (from public specifications)"),
        ("system", "linux, x86_64"),
        ("CPU", "AMD Ryzen 9 7950X 16-Core Processor"),
    ]
    assert ("cores", "16 usable of 16") in lines
    assert ("memory", "57.0 GiB available of 62.6 GiB") in lines
    card = "CUDA0: NVIDIA GeForce RTX 4090, 23.2 GiB free of 23.6 GiB"
    assert ("GPU", card) in lines
    assert ("model store", "200.0 GiB free") in lines
    assert ("backends", "CUDA, CPU") in lines
    assert [value for label, value in lines if label == "remark"] == list(EXAMPLE.remarks)


def test_summary_of_limits():
    container = machine_from_json((MACHINES / "container-4gb.json").read_text())
    lines = dict(summary(container))
    assert lines["cores"] == "2 usable of 16, quota 2 CPUs"
    assert lines["memory"] == "3.8 GiB available of 61.8 GiB, limited to 4.0 GiB"
    mac = dict(summary(machine_from_json((MACHINES / "m4-max-64gb.json").read_text())))
    assert mac["cores"] == "12 usable of 16, 12 fast"
    assert mac["memory"].endswith(", shared with the GPU")
    assert mac["accelerator"] == "BLAS: Accelerate"


def test_the_reinstall_command_asks_for_what_we_depend_on():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert REQUIREMENT in project["project"]["dependencies"]


# -- on the way to a model -----------------------------------------------------------------------


@pytest.mark.native
def test_opening_the_builtin_model_starts_no_tool_and_loads_no_hub_client(tmp_path):
    """A machine without network or GPU tools opens it as fast as any other."""
    script = (
        "import sys\n"
        "started = []\n"
        "def watch(event, details):\n"
        "    if event in ('subprocess.Popen', 'os.posix_spawn', 'os.system'):\n"
        "        started.append(str(details[0]))\n"
        "sys.addaudithook(watch)\n"
        "from gguf_embed import Embedder, Settings\n"
        "with Embedder.open(settings=Settings(tune=False)) as embedder:\n"
        "    embedder.encode('a text')\n"
        "print(sorted({name for name in started if name != sys.executable}))\n"
        "print('huggingface_hub' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GGUF_EMBED_HOME": str(tmp_path)},
    )
    assert done.stdout == "[]\nFalse\n", done.stdout + done.stderr


def test_a_machine_is_probed_without_a_remark(tmp_path):
    bare = {"sys/bus/pci/devices/0/class": "0x030000", "sys/bus/pci/devices/0/vendor": "0x10de"}

    def refuse(command: object) -> str:
        pytest.fail(f"started {command}")

    files = tree(tmp_path, linux() | bare)
    assert probe(root=files, host=replace(host(), run=refuse), native=CPU_ONLY).remarks == ()
