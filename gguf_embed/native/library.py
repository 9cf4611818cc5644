"""llama.cpp's libraries: loaded at the first call, with their log, their devices and their name.

They are reached through llama-cpp-python's low-level API. Nothing is loaded before the first call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gguf_embed.errors import NativeFailed
from gguf_embed.native import accelerator

DeviceType: TypeAlias = Literal["cpu", "gpu", "igpu", "accel", "meta"]

REQUIREMENT = "llama-cpp-python>=0.3.36,<0.4"  # as in pyproject.toml; a test compares them
LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"  # llama-cpp-python's: a folder with other libraries

_log = logging.getLogger("gguf_embed.llama")
# What llama.cpp said last, for our own error messages; it reports causes only in its log.
_last_lines: deque[str] = deque(maxlen=20)
_kept_alive: list[object] = []  # ctypes frees a callback that nothing refers to
_listeners: list[Callable[[str], None]] = []  # to the log as it comes, in pieces of lines


@functools.cache
def bindings() -> Any:
    """The llama_cpp bindings, initialised once, with their log routed to `logging`.

    Raises NativeFailed where the libraries cannot be loaded.
    """
    try:
        llama_cpp = _import_alone()
    # AttributeError: a library of another version, without a function that the bindings want.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise NativeFailed(_unloadable(error)) from error
    _kept_alive.append(llama_cpp.llama_log_callback(_on_log))
    llama_cpp.llama_log_set(_kept_alive[0], None)
    _load_backends(llama_cpp._lib)
    llama_cpp.llama_backend_init()
    return llama_cpp


def _load_backends(lib: Any) -> None:
    """Of a portable build: its libraries for kinds of CPU, of which ggml takes the best, and for
    GPUs. They lie beside libllama, where ggml does not look by itself.
    """
    folder = Path(lib._name).resolve().parent
    loader = getattr(lib, "ggml_backend_load_all_from_path", None)
    if loader is not None and any(folder.glob("*ggml-cpu-*")):
        loader.restype, loader.argtypes = None, [ctypes.c_char_p]
        loader(os.fsencode(folder))


def _import_alone() -> Any:
    """The module llama_cpp.llama_cpp, without the package around it.

    That brings chats, templates and a cache of answers along, which take longer than the first
    vector. Who imports the package later gets it whole, with bindings of its own.
    """
    name = "llama_cpp.llama_cpp"
    spec = None if "llama_cpp" in sys.modules else importlib.util.find_spec("llama_cpp")
    if spec is None:
        return importlib.import_module(name)
    before = {*sys.modules}
    sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)  # not run
    try:
        return importlib.import_module(name)
    finally:
        for new in {*sys.modules} - before:
            if new.partition(".")[0] == "llama_cpp":
                del sys.modules[new]


@functools.cache
def accelerated() -> accelerator.Accelerator:
    """Load our own ggml backend, if it is here and fits; says what became of it.

    A backend that is registered cannot be taken out again; only contexts that ask for it get it.
    """
    return accelerator.load(version(), bindings()._lib)


@contextmanager
def accelerating(*, whether: bool) -> Generator[None]:
    """Contexts that this thread makes meanwhile get the accelerator, or do not.

    Raises NativeFailed where it is asked for and does not run.
    """
    if not whether:
        yield
        return
    if accelerated().kernel is None:
        raise NativeFailed(f"the accelerator does not run: {accelerated().remark}")
    with accelerator.offered(accelerated()):
        yield


def why_not_accelerated() -> str:
    """Why the accelerator cannot be tried here, with the next step; "" where it can."""
    return accelerator.why_absent(version())


def _unloadable(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    step = f'reinstall it: pip install --force-reinstall --no-cache-dir "{REQUIREMENT}"'
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        step = (
            f"{LIBRARY_VARIABLE} is {chosen}: unset it, or let it name a folder that has the "
            "libraries of this llama-cpp-python"
        )
    return f"llama.cpp cannot be loaded ({reason}); {step}"


# ggml's warnings are mostly advice to developers; its errors come back in our exceptions as well.
_GGML_WARN, _GGML_ERROR = 3, 4
_LEVELS = {_GGML_WARN: logging.INFO, _GGML_ERROR: logging.WARNING}


def _on_log(level: int, text: bytes, _data: object) -> None:
    piece = text.decode("utf-8", "replace")
    for listener in _listeners:
        listener(piece)
    line = piece.rstrip()
    if line:
        if level in _LEVELS:
            _last_lines.append(line)
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


def reason() -> str:
    """llama.cpp's last complaints, on one line."""
    return "; ".join(list(_last_lines)[-3:]) or "llama.cpp gave no reason"


def forget_reason() -> None:
    """Called before a call that may fail, so that `reason` tells of that call alone."""
    _last_lines.clear()
    bindings().llama_log_set(_kept_alive[0], None)  # llama_cpp's package may have set its own


@contextmanager
def listening(listener: Callable[[str], None]) -> Generator[None]:
    """Meanwhile the listener gets llama.cpp's log as it comes, in pieces of lines."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@functools.cache
def ggml(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of the ggml libraries, which llama-cpp-python ships but does not bind."""
    native = bindings()
    handles = [native._lib]
    # On Windows a symbol is found only in its own DLL; elsewhere through libllama's dependencies.
    handles += [ctypes.CDLL(str(p)) for p in sorted(library_path().parent.glob("ggml*.dll"))]
    for handle in handles:
        function = getattr(handle, name, None)
        if function is not None:
            function.restype, function.argtypes = restype, list(argtypes)
            return function
    raise NativeFailed(
        f"the installed llama.cpp has no function {name}; reinstall llama-cpp-python"
    )


def version() -> str:
    """Version of llama-cpp-python."""
    package = Path(bindings().__file__).parent
    with suppress(OSError, UnicodeDecodeError):
        said = (package / "__init__.py").read_text("utf-8")
        if found := re.search(r"^__version__ = ['\"](.+?)['\"]", said, re.MULTILINE):
            return found[1]
    from importlib import metadata  # which takes longer

    return metadata.version("llama-cpp-python")


def system_info() -> str:
    """llama.cpp's own line on what the build was compiled with."""
    return bindings().llama_print_system_info().decode()


def library_path() -> Path:
    """The file of libllama that is loaded."""
    return Path(bindings()._lib._name).absolute()


@functools.cache
def build_id() -> str:
    """A short hash of the native libraries that are loaded.

    A new build gets a new self-test and tuning, and so does another library of a portable build,
    which another CPU loads. Sizes and modification times stand for the contents; hashing 30 MB at
    each start costs more.
    """
    digest = hashlib.sha256(f"{version()}{cpu_variant()}".encode())
    for folder in dict.fromkeys(_folders()):
        for path in sorted(folder.iterdir()):
            if "llama" in path.name or "ggml" in path.name:
                stat = path.stat()
                digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    digest.update(accelerator.identity(version()).encode())
    return digest.hexdigest()[:16]


@functools.cache
def cpu_variant() -> str:
    """The kind of CPU whose library ggml took of a portable build ("haswell"); "" of another."""
    get = ggml("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)
    registry = get(b"CPU")
    find = ggml(
        "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    )
    function = find(registry, b"ggml_backend_set_n_threads") if registry else None
    path = _file_of(function) if function else None
    return variant_in(path.name) if path is not None else ""


def variant_in(name: str) -> str:
    """The kind of CPU that a library's name tells: "haswell" of libggml-cpu-haswell.so."""
    found = re.fullmatch(r"(?:lib)?ggml-cpu-(\w+)\.(?:so|dylib|dll)", name)
    return found[1] if found else ""


class _DlInfo(ctypes.Structure):
    """Dl_info (man 3 dladdr)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _folders() -> Iterator[Path]:
    """Of libllama and of the ggml libraries, which LD_LIBRARY_PATH may have taken elsewhere."""
    yield library_path().resolve().parent
    for name in ("ggml_backend_dev_count", "ggml_quantize_chunk"):
        with suppress(AttributeError):
            if path := _file_of(getattr(bindings()._lib, name)):
                yield path.parent


def _file_of(function: Any) -> Path | None:
    """The library that a function is in; None where the system does not say."""
    if sys.platform == "win32":
        return None
    with suppress(AttributeError, OSError):
        info = _DlInfo()
        address = ctypes.cast(function, ctypes.c_void_p)
        if ctypes.CDLL(None).dladdr(address, ctypes.byref(info)) and info.file:
            return Path(os.fsdecode(info.file)).resolve()
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeDevice:
    """A device as ggml reports it. For the CPU `free_bytes` equals `total_bytes`: do not use it."""

    name: str
    description: str
    kind: DeviceType
    backend: str
    free_bytes: int
    total_bytes: int
    device_id: str | None


class _Props(ctypes.Structure):
    """ggml_backend_dev_props (ggml-backend.h)."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 8),
    )


def devices() -> tuple[NativeDevice, ...]:
    """Every device of the installed build, in ggml's order, but for our own."""
    pointer = ctypes.c_void_p
    get = ggml("ggml_backend_dev_get", pointer, ctypes.c_size_t)
    get_props = ggml("ggml_backend_dev_get_props", None, pointer, ctypes.POINTER(_Props))
    get_reg = ggml("ggml_backend_dev_backend_reg", pointer, pointer)
    reg_name = ggml("ggml_backend_reg_name", ctypes.c_char_p, pointer)
    kinds: tuple[DeviceType, ...] = ("cpu", "gpu", "igpu", "accel", "meta")
    found: list[NativeDevice] = []
    for index in range(ggml("ggml_backend_dev_count", ctypes.c_size_t)()):
        device = get(index)
        props = _Props()
        get_props(device, ctypes.byref(props))
        if props.name.decode() == accelerator.DEVICE:
            continue
        found.append(
            NativeDevice(
                name=props.name.decode(),
                description=props.description.decode().strip(),
                kind=kinds[int(props.type)],
                backend=reg_name(get_reg(device)).decode(),
                free_bytes=props.memory_free,
                total_bytes=props.memory_total,
                device_id=props.device_id.decode() if props.device_id else None,
            )
        )
    return tuple(found)
