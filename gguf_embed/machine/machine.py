"""A machine as a value: what one process sees of it, in words and as JSON.

It travels as JSON, so that a plan can be made for hardware that is elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, cast

from gguf_embed.errors import BadInput

DeviceKind: TypeAlias = Literal["cpu", "gpu", "igpu", "accel"]
System: TypeAlias = Literal["linux", "wsl", "macos", "windows"]

FORMAT = "gguf-embed-machine/1"

# CPU features that llama.cpp has kernels for, in the order of printing.
CPU_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "bmi2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni", "avx512_bf16"),
    *("amx_int8", "amx_bf16"),
    *("neon", "dotprod", "i8mm", "sve", "sme"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of the llama.cpp build, memory in bytes as this process may use it.

    A CPU's memory is the RAM that is left to this process (ggml would say: all of it), and so is
    the upper bound for a GPU that has no memory of its own.
    """

    name: str  # as llama.cpp calls it: "CUDA0"
    description: str
    backend: str  # "CUDA", "Metal", "Vulkan", "ROCm", "SYCL", "CPU", ...
    kind: DeviceKind
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

    @property
    def origin(self) -> str:
        """What stands after the name of a machine that nobody has asked itself."""
        return " (from public specifications)" if self.source == "specification" else ""


def summary(machine: Machine) -> list[tuple[str, str]]:
    """(label, value) lines that describe the machine to a person; labels may repeat."""
    limit, quota = machine.memory_limit_bytes, machine.cpu_quota
    cores = f"{machine.usable_cores} usable of {machine.physical_cores}"
    if machine.performance_cores != machine.physical_cores:
        cores += f", {machine.performance_cores} fast"
    if quota is not None:
        cores += f", quota {quota:g} CPUs"
    memory = f"{gib(machine.ram_available_bytes)} available of {gib(machine.ram_total_bytes)}"
    if limit is not None:
        memory += f", limited to {gib(limit)}"
    if machine.unified_memory:
        memory += ", shared with the GPU"
    lines = [
        ("machine", machine.name + machine.origin),
        ("system", f"{machine.os}, {machine.arch}"),
        ("CPU", machine.cpu_model),
        ("CPU features", " ".join(machine.cpu_features) or "not told by the system"),
        ("cores", cores),
        ("memory", memory),
    ]
    for device in machine.devices:
        if device.kind != "cpu":
            free = f"{gib(device.free_bytes)} free of {gib(device.total_bytes)}"
            size = f", {free}" if device.total_bytes else ""
            kind = {"gpu": "GPU", "igpu": "integrated GPU", "accel": "accelerator"}[device.kind]
            lines.append((kind, f"{device.name}: {device.description}{size}"))
    if machine.store_free_bytes is not None:
        lines.append(("model store", f"{gib(machine.store_free_bytes)} free"))
    lines.append(("llama.cpp", machine.build or "not told"))
    lines.append(("backends", ", ".join(machine.backends) or "none"))
    return lines + [("remark", remark) for remark in machine.remarks]


def gib(n_bytes: int) -> str:
    """Bytes as a person reads them: "15.6 GiB"."""
    return f"{n_bytes / 2**30:.1f} GiB"


def one_line(text: str) -> str:
    """One line without what a terminal would interpret."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())


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
