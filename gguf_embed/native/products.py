"""Products of a matrix in ggml's Q8_0 with a vector, by ggml's own kernel and on one thread.

A row of it is 34 bytes for 32 values, and the kernel is as fast as they come from memory: a quarter
of the time of numpy's float32. ggml makes Q8_0 of the vector too.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import NativeFailed
from gguf_embed.native.library import ggml
from gguf_embed.vectors import Vectors

BLOCK: Final = 32  # values that share a scale
BLOCK_BYTES: Final = 34  # of the scale, a float16, and 32 int8
_CPU, _F32, _Q8_0 = 0, 0, 8  # ggml's numbers
_ALIGNED: Final = 64
_SCRATCH: Final = 1 << 20  # for the descriptions of three tensors and a graph
_POINTER: Final = ctypes.c_void_p


class _Parameters(ctypes.Structure):
    """ggml_init_params (ggml.h)."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Products:
    """Of one matrix; one thread at a time."""

    def __init__(self, rows: npt.NDArray[np.uint8]) -> None:
        """`rows` in Q8_0, shape (n, bytes of a row), from an address that 32 divides, not copied.

        Raises NativeFailed where the installed llama.cpp cannot do it.
        """
        n, n_bytes = rows.shape
        dim = n_bytes // BLOCK_BYTES * BLOCK
        assert n
        assert n_bytes % BLOCK_BYTES == 0
        assert rows.flags.c_contiguous
        assert rows.ctypes.data % 32 == 0
        self._rows = rows  # stays where it is as long as this does
        self._question = _aligned(dim)
        self._products = _aligned(n)
        native = _ggml()
        self._native = native
        self._backend = native.backend()
        owned: list[tuple[Any, Any]] = [(native.free_backend, self._backend)]
        weakref.finalize(self, _free, owned)
        context = _made(native.context(_Parameters(_SCRATCH, None, True)))
        owned.append((native.free_context, context))
        matrix = _made(native.tensor(context, _Q8_0, dim, n))
        question = _made(native.tensor(context, _F32, dim, 1))
        products = _made(native.product(context, matrix, question))
        places = ((matrix, rows), (question, self._question), (products, self._products))
        for tensor, array in places:
            buffer = _made(native.buffer(array.ctypes.data, array.nbytes))
            owned.append((native.free_buffer, buffer))
            if native.place(buffer, tensor, array.ctypes.data):
                raise NativeFailed("ggml does not take the memory of a matrix")
        self._graph = _made(native.graph(context))
        native.expand(self._graph, products)

    def of(self, question: Vectors) -> Vectors:
        """A product for each row, shape (n,); it is overwritten by the next call."""
        self._question[:] = question
        if self._native.compute(self._backend, self._graph):
            raise NativeFailed("ggml could not multiply a matrix with a vector")
        return self._products


class _Ggml:
    """What of ggml is needed. Raises NativeFailed where it is not all there."""

    def __init__(self) -> None:
        pointer, integer, size = _POINTER, ctypes.c_int, ctypes.c_int64
        self.context = ggml("ggml_init", pointer, _Parameters)
        self.free_context = ggml("ggml_free", None, pointer)
        self.tensor = ggml("ggml_new_tensor_2d", pointer, pointer, integer, size, size)
        self.product = ggml("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.graph = ggml("ggml_new_graph", pointer, pointer)
        self.expand = ggml("ggml_build_forward_expand", None, pointer, pointer)
        self.buffer = ggml("ggml_backend_cpu_buffer_from_ptr", pointer, pointer, ctypes.c_size_t)
        self.free_buffer = ggml("ggml_backend_buffer_free", None, pointer)
        self.place = ggml("ggml_backend_tensor_alloc", integer, pointer, pointer, pointer)
        self.free_backend = ggml("ggml_backend_free", None, pointer)
        self.compute = ggml("ggml_backend_graph_compute", integer, pointer, pointer)

    def backend(self) -> Any:
        """ggml's CPU, on one thread: memory is the limit, and more threads would wait for it."""
        cpu = _made(ggml("ggml_backend_dev_by_type", _POINTER, ctypes.c_int)(_CPU))
        registry = ggml("ggml_backend_dev_backend_reg", _POINTER, _POINTER)(cpu)
        # Some builds load their kinds of CPU at run time: their functions are known by name only.
        find = ggml("ggml_backend_reg_get_proc_address", _POINTER, _POINTER, ctypes.c_char_p)
        address = _made(find(registry, b"ggml_backend_set_n_threads"))
        backend = _made(
            ggml("ggml_backend_dev_init", _POINTER, _POINTER, ctypes.c_char_p)(cpu, None)
        )
        ctypes.CFUNCTYPE(None, _POINTER, ctypes.c_int)(address)(backend, 1)
        return backend


_ggml = functools.cache(_Ggml)


def _made(pointer: Any) -> Any:
    if not pointer:
        raise NativeFailed("the installed llama.cpp cannot multiply a matrix outside of a model")
    return pointer


def _aligned(n: int) -> Vectors:
    """Room for `n` values at an address that ggml takes."""
    raw = np.empty(n * 4 + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + n * 4].view(np.float32)


def _free(owned: list[tuple[Any, Any]]) -> None:
    """What was made last goes first."""
    while owned:
        free, pointer = owned.pop()
        free(pointer)
