"""What the installed llama.cpp says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from gguf_embed.errors import NativeFailed
from gguf_embed.machine.machine import Device, one_line
from gguf_embed.native import library


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """As llama.cpp tells it; `problem` says why it tells nothing, with the next step."""

    devices: tuple[Device, ...] = ()
    system_info: str = ""
    build: str | None = None
    problem: str | None = None


def read_native() -> Native:
    """Devices and features of the installed llama.cpp; a library that does not load is told."""
    try:
        native_devices = library.devices()
        system_info = library.system_info()
        build = f"llama-cpp-python {library.version()} ({library.build_id()})"
        if variant := library.cpu_variant():
            build += f", portable: {variant}"
    except NativeFailed as error:
        return Native(problem=one_line(str(error)))
    return Native(
        devices=tuple(
            Device(
                name=device.name,
                description=one_line(device.description),
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


def _backend_name(native_name: str) -> str:
    """The backend's usual name: ggml calls Metal "MTL"."""
    return {"MTL": "Metal"}.get(native_name, native_name)


def backends(native: Native) -> tuple[str, ...]:
    """Backends of the build: those with a device, and those that report features without one."""
    names = [device.backend for device in native.devices]
    for item in native.system_info.split("|"):
        name, colon, _ = item.partition(" : ")  # "CUDA : ARCHS = 890 | ... | CPU : SSE3 = 1 | ..."
        if colon:
            names.append(_backend_name(name.strip()))
    return tuple(dict.fromkeys(names))
