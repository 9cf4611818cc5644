"""Takes the last hidden state out of llama.cpp's graph, which ends there: no language-model head.

ggml's scheduler asks of each node, some thousand times for a text. The library beside our backend
answers without Python, where it is there; else each answer waits for the interpreter, which another
thread may hold for milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol

import numpy as np

from gguf_embed.native import accelerator
from gguf_embed.native.library import bindings, ggml, version
from gguf_embed.vectors import Vectors

TAPPED_TENSOR = b"result_norm"  # the last hidden state, before the language-model head


class Tap(Protocol):
    """What a context hands to llama.cpp, and what it took. It does not refer to the context, so
    that one is freed as soon as it is dropped; the context refers to it.
    """

    callback: Any  # ggml_backend_sched_eval_callback
    data: int | None  # its address of user data

    def begin(self, n_rows: int) -> None:
        """Before a decode that is to give so many rows."""
        ...

    def take(self) -> Vectors:
        """Its rows, in order, shape (n_rows, dim); another shape where the graph gave others.

        Raises what was raised inside.
        """
        ...


def tap_of(dim: int) -> Tap:
    """A tap for rows of so many numbers."""
    function = _function_of_library()
    return _InPython(dim) if function is None else _InLibrary(dim, function)


@functools.cache
def _function_of_library() -> Any:
    """None where there is no library for this llama.cpp."""
    if accelerator.why_absent(version()):
        return None
    try:
        library = ctypes.CDLL(str(accelerator.library_path(version())))
        return ctypes.cast(library.gguf_embed_tap, bindings().ggml_backend_sched_eval_callback)
    except (OSError, AttributeError):  # it does not fit; an older one has no tap
        return None


class _Taken(ctypes.Structure):
    """gguf_embed_taken (native/tap.cpp)."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("rows", ctypes.c_void_p),
        ("dim", ctypes.c_int64),
        ("n_rows_max", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
    )


class _InLibrary:
    def __init__(self, dim: int, function: Any) -> None:
        self._taken = _Taken(name=TAPPED_TENSOR, dim=dim)
        self._rows = np.empty((0, dim), np.float32)
        self.callback = function
        self.data: int | None = ctypes.addressof(self._taken)

    def begin(self, n_rows: int) -> None:
        self._rows = np.empty((n_rows, self._rows.shape[1]), np.float32)
        self._taken.rows = self._rows.ctypes.data
        self._taken.n_rows_max, self._taken.n_rows = n_rows, 0

    def take(self) -> Vectors:
        n_rows = self._taken.n_rows
        return self._rows[:n_rows] if n_rows <= len(self._rows) else np.empty((0, 0), np.float32)


class _InPython:
    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._taken: list[Vectors] = []
        self._error: BaseException | None = None
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._get_name = ggml("ggml_get_name", ctypes.c_char_p, pointer)
        self._get_rows = ggml("ggml_nrows", ctypes.c_int64, pointer)
        self._get_data = ggml("ggml_backend_tensor_get", None, pointer, pointer, size, size)
        # Kept: ctypes frees a callback that nothing refers to.
        self.callback = bindings().ggml_backend_sched_eval_callback(self.on_tensor)
        self.data: int | None = None

    def begin(self, n_rows: int) -> None:
        self._taken = []

    def take(self) -> Vectors:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return np.concatenate(self._taken) if self._taken else np.empty((0, 0), np.float32)

    def on_tensor(self, tensor: int, ask: bool, _data: object) -> bool:
        """Called for each node; True to `ask` stops after that node, False then ends the graph."""
        try:
            if ask:
                return self._get_name(tensor) == TAPPED_TENSOR
            rows = np.empty((self._get_rows(tensor), self._dim), np.float32)
            if rows.size:
                self._get_data(tensor, rows.ctypes.data, 0, rows.nbytes)
            self._taken.append(rows)
        except BaseException as error:  # an exception must not unwind through C
            self._error = error
        return False
