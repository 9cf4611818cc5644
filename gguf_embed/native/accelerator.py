"""Our own ggml backend: whether it is here, fits, and runs. `native/build.py` compiles it.

It is loaded into llama.cpp before the first model is, and stays until the process ends. It is
off unless the environment variable GGUF_EMBED_ACCELERATOR is 1.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWITCH = "GGUF_EMBED_ACCELERATOR"

_log = logging.getLogger("gguf_embed.accelerator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """What became of the accelerator. `kernel` names the instruction set that runs, if one does."""

    kernel: str | None
    path: Path | None
    remark: str  # why it does not run; empty where it runs


def is_wanted() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get(SWITCH, "0") == "1"


def library_path(version: str) -> Path:
    """Where the library for this version of llama-cpp-python is, if it was compiled.

    ggml does not check the layout of its tensors, so the name holds the version it was made for.
    """
    return Path(__file__).parent / f"libgguf_embed_accelerator-{version}.so"


def identity(version: str) -> str:
    """What the build id must hold of the accelerator; empty where it will not be loaded."""
    path = library_path(version)
    if not is_wanted() or not path.exists():
        return ""
    stat = path.stat()
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"


@functools.cache
def load(version: str, ggml: Any) -> Accelerator:
    """Load it into ggml where it is wanted and fits; its remark says why not.

    `ggml` is the loaded library that has ggml's functions, `version` llama-cpp-python's. The first
    call must come before a model is loaded; later ones say again what became of it.
    """
    if not is_wanted():
        return Accelerator(kernel=None, path=None, remark=f"off; {SWITCH}=1 turns it on")
    path = library_path(version)
    if not path.exists():
        others = sorted(p.name for p in path.parent.glob(path.name.replace(version, "*")))
        remark = f"no accelerator was compiled for llama-cpp-python {version}"
        if others:
            remark += f" (only {', '.join(others)})"
        return _refused(path=None, remark=f"{remark}; run install.py")
    pointer = ctypes.c_void_p
    registered = _function(ggml, "ggml_backend_load", pointer, ctypes.c_char_p)(os.fsencode(path))
    if not registered:
        return _refused(path=path, remark=f"ggml refused {path.name}; this CPU may be too old")
    get = _function(ggml, "ggml_backend_reg_dev_get", pointer, pointer, ctypes.c_size_t)
    describe = _function(ggml, "ggml_backend_dev_description", ctypes.c_char_p, pointer)
    kernel = describe(get(registered, 0)).decode()
    _log.debug("%s runs with %s", path.name, kernel)
    return Accelerator(kernel=kernel, path=path, remark="")


def _function(ggml: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ggml, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def _refused(*, path: Path | None, remark: str) -> Accelerator:
    _log.warning("accelerator: %s", remark)
    return Accelerator(kernel=None, path=path, remark=remark)
