"""Our own ggml backend: whether it is here, fits, and runs. `native/build.py` compiles it.

It is loaded into llama.cpp once, before the first context that is to have it, and stays until the
process ends. Only contexts that are made within `offered` get it. The environment variable
GGUF_EMBED_ACCELERATOR=0 keeps it out altogether.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWITCH = "GGUF_EMBED_ACCELERATOR"
DEVICE = "GGUF_EMBED"  # as ggml calls it

_log = logging.getLogger("gguf_embed.accelerator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """What became of the accelerator. `kernel` names the instruction set that runs, if one does."""

    kernel: str | None
    path: Path | None
    remark: str  # why it does not run; empty where it runs


def is_off() -> bool:
    """Whether the environment keeps it out."""
    return os.environ.get(SWITCH) == "0"


def has_platform() -> bool:
    """Whether there is one for such machines at all."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def library_path(version: str) -> Path:
    """Where the library for this version of llama-cpp-python is, if it was compiled.

    ggml does not check the layout of its tensors, so the name holds the version it was made for.
    It came with the portable wheel, beside the libraries that it was linked with, or it is here.
    """
    name = f"libgguf_embed_accelerator-{version}.so"
    with suppress(ImportError, ValueError):  # what is no package has no place
        spec = importlib.util.find_spec("llama_cpp")
        if spec is not None and spec.origin is not None:
            beside = Path(spec.origin).parent / "lib" / name
            if beside.exists():
                return beside
    return Path(__file__).parent / name


def why_absent(version: str) -> str:
    """Why none can be loaded beside this llama-cpp-python, with the next step; "" where one can."""
    if is_off():
        return f"{SWITCH}=0 keeps it out"
    path = library_path(version)
    if path.exists():
        return ""
    if not has_platform():
        return f"there is none for {sys.platform} on {platform.machine()}"
    remark = f"none was compiled for llama-cpp-python {version}"
    if others := others_than(version):
        remark += f" (only {', '.join(others)})"
    return f"{remark}; run install.py"


def cpu_flags() -> frozenset[str]:
    """Names of this CPU's instruction sets, as Linux has them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.split())
    return frozenset()


def others_than(version: str) -> list[str]:
    """Libraries that are here, for other versions of llama-cpp-python."""
    path = library_path(version)
    return sorted(p.name for p in path.parent.glob(path.name.replace(version, "*")) if p != path)


def identity(version: str) -> str:
    """What the build id must hold of the accelerator; empty where none can be loaded."""
    if why_absent(version):
        return ""
    path = library_path(version)
    stat = path.stat()
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"


@functools.cache
def load(version: str, ggml: Any) -> Accelerator:
    """Load it into ggml where it is here and fits; its remark says why not.

    `ggml` is the loaded library that has ggml's functions, `version` llama-cpp-python's. Later
    calls say again what became of it.
    """
    if remark := why_absent(version):
        return _refused(path=None, remark=remark)
    path = library_path(version)
    pointer = ctypes.c_void_p
    registered = _function(ggml, "ggml_backend_load", pointer, ctypes.c_char_p)(os.fsencode(path))
    if not registered:
        return _refused(path=path, remark=f"ggml refused {path.name}; this CPU may be too old")
    get = _function(ggml, "ggml_backend_reg_dev_get", pointer, pointer, ctypes.c_size_t)
    describe = _function(ggml, "ggml_backend_dev_description", ctypes.c_char_p, pointer)
    kernel = describe(get(registered, 0)).decode()
    _log.debug("%s runs with %s", path.name, kernel)
    return Accelerator(kernel=kernel, path=path, remark="")


@contextmanager
def offered(accelerator: Accelerator) -> Generator[None]:
    """Meanwhile the contexts that this thread makes get the accelerator, which is loaded."""
    offer = ctypes.CDLL(str(accelerator.path)).gguf_embed_offer
    offer.restype, offer.argtypes = None, [ctypes.c_int]
    offer(1)
    try:
        yield
    finally:
        offer(0)


def _function(ggml: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ggml, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def _refused(*, path: Path | None, remark: str) -> Accelerator:
    _log.info("no accelerator: %s", remark)
    return Accelerator(kernel=None, path=path, remark=remark)
