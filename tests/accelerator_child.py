"""Runs single ggml operations on the accelerator and on ggml's CPU backend, in its own process.

    python tests/accelerator_child.py "AVX2"

The argument is the instruction set whose kernels run, not the fastest that the CPU has.
Cases come as JSON lines on standard input, results go back the same way: a backend that was loaded
cannot be taken out again, so no test does this in its own process.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_embed.gguf.quants import TYPE_NAMES
from gguf_embed.native import library
from gguf_embed.native.accelerator import library_path
from gguf_embed.native.quantizer import quantize_rows

Floats = NDArray[np.float32]
POINTER = ctypes.c_void_p
NUMBERS = {name: number for number, name in TYPE_NAMES.items()} | {"I32": 26, "I64": 27}


class InitParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", POINTER), ("no_alloc", ctypes.c_bool))


def ggml(name: str, *arguments: Any, result: Any = POINTER) -> Any:
    """Call a function of ggml; Python's ints are int64, floats float, pointers are CPointer."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_float, Pointer: POINTER}
    types = [kinds.get(type(a), type(a)) for a in arguments]
    values = [a.address if isinstance(a, Pointer) else a for a in arguments]
    found = library.ggml(name, result, *types)(*values)
    return Pointer(found) if result is POINTER else found


@dataclass(frozen=True, slots=True)
class Pointer:
    address: int | None


def integer(value: int) -> Any:
    return ctypes.c_int(value)


class Graph:
    """Tensors with data, and the operations over them."""

    def __init__(self) -> None:
        params = InitParams(1 << 20, None, True)
        self.context = ggml("ggml_init", params)
        self.data: list[tuple[Pointer, bytes]] = []
        self.buffer: Pointer | None = None

    def tensor(self, type_name: str, shape: Sequence[int], data: bytes | None = None) -> Pointer:
        """A tensor of up to four dimensions, the fastest first."""
        sizes = [*shape, 1, 1, 1][:4]
        made = ggml("ggml_new_tensor_4d", self.context, integer(NUMBERS[type_name]), *sizes)
        if data is not None:
            self.data.append((made, data))
        return made

    def floats(self, values: Floats) -> Pointer:
        return self.tensor("F32", values.shape[::-1], np.ascontiguousarray(values).tobytes())

    def halves(self, values: Floats) -> Pointer:
        return self.tensor("F16", values.shape[::-1], values.astype(np.float16).tobytes())

    def weights(self, values: Floats, type_name: str) -> tuple[Pointer, Floats]:
        """A matrix in a quantization, and the numbers that its bytes mean."""
        number, data = quantize_rows(values, type_name)
        if type_name == "F32":
            return self.floats(values), values
        traits = library.ggml("ggml_get_type_traits", POINTER, ctypes.c_int)(number)
        # ggml_type_traits: name, block size, interleaved, type size, quantized, to_float
        offset = 8 + 8 + 8 + 8 + 8
        address = ctypes.cast(traits + offset, ctypes.POINTER(POINTER)).contents.value
        to_float = ctypes.CFUNCTYPE(None, POINTER, POINTER, ctypes.c_int64)(address)
        exact = np.empty(values.shape, np.float32)
        source = ctypes.create_string_buffer(data, len(data))
        to_float(ctypes.addressof(source), exact.ctypes.data, values.size)
        return self.tensor(type_name, values.shape[::-1], data), exact

    def op(self, name: str, *arguments: Any) -> Pointer:
        return ggml(f"ggml_{name}", self.context, *arguments)

    def integers(self, values: NDArray[np.int32] | NDArray[np.int64]) -> Pointer:
        kind = "I32" if values.dtype == np.int32 else "I64"
        return self.tensor(kind, values.shape[::-1], values.tobytes())

    def run(
        self,
        backend: Backend,
        result: Pointer,
        dtype: Any = np.float32,
        first: Sequence[Pointer] = (),
    ) -> NDArray[Any]:
        """The flat result as this backend computes it; the tensors' memory serves all backends.

        `first` are computed before what else the result needs.
        """
        if self.buffer is None:
            self.buffer = ggml("ggml_backend_alloc_ctx_tensors", self.context, backend.pointer)
            for tensor, data in self.data:
                source = ctypes.create_string_buffer(data, len(data))
                start, size = ctypes.c_size_t(0), ctypes.c_size_t(len(data))
                address = Pointer(ctypes.addressof(source))
                ggml("ggml_backend_tensor_set", tensor, address, start, size, result=None)
        graph = ggml("ggml_new_graph", self.context)
        for tensor in (*first, result):
            ggml("ggml_build_forward_expand", graph, tensor, result=None)
        status = ggml("ggml_backend_graph_compute", backend.pointer, graph, result=ctypes.c_int)
        assert status == 0, status
        return self.read(result, dtype)

    def read(self, tensor: Pointer, dtype: Any = np.float32) -> NDArray[Any]:
        """The flat numbers of a tensor."""
        size = ggml("ggml_nbytes", tensor, result=ctypes.c_size_t)
        out = np.empty(size, np.uint8)
        start, target = ctypes.c_size_t(0), Pointer(out.ctypes.data)
        ggml("ggml_backend_tensor_get", tensor, target, start, ctypes.c_size_t(size), result=None)
        return out.view(dtype)

    def free(self) -> None:
        if self.buffer is not None:
            ggml("ggml_backend_buffer_free", self.buffer, result=None)
        ggml("ggml_free", self.context, result=None)


@dataclass(slots=True)
class Backend:
    """A device of ggml's, ready to compute."""

    name: str
    device: Pointer = field(init=False)
    pointer: Pointer = field(init=False)

    def __post_init__(self) -> None:
        self.device = ggml("ggml_backend_dev_by_name", ctypes.c_char_p(self.name.encode()))
        self.pointer = ggml("ggml_backend_dev_init", self.device, Pointer(None))

    def supports(self, tensor: Pointer) -> bool:
        return ggml("ggml_backend_dev_supports_op", self.device, tensor, result=ctypes.c_bool)

    def set_threads(self, n: int) -> None:
        plugin = ggml("ggml_backend_dev_backend_reg", self.device)
        name = ctypes.c_char_p(b"ggml_backend_set_n_threads")
        address = ggml("ggml_backend_reg_get_proc_address", plugin, name).address
        ctypes.CFUNCTYPE(None, POINTER, ctypes.c_int)(address)(self.pointer.address, n)


@functools.cache
def accelerator() -> Backend:
    return Backend("GGUF_EMBED")


@functools.cache
def cpu() -> Backend:
    return Backend("CPU")


def normal(rng: np.random.Generator, *shape: int, size: float = 1) -> Floats:
    return (rng.standard_normal(shape) * size).astype(np.float32)


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def product(case: dict[str, Any]) -> dict[str, Any]:
    """Error against float64 as a share of the vectors' lengths, and rows computed alone."""
    rng = np.random.default_rng(case["seed"])
    rows, columns, inner = case["rows"], case["columns"], case["inner"]
    x = normal(rng, rows, inner + case.get("padding", 0))
    x[:, 0] *= case.get("outlier", 1)
    values = normal(rng, columns, inner, size=0.05)
    bias, residual = normal(rng, 1, columns), normal(rng, rows, columns)

    def make(chosen: slice) -> tuple[Graph, Pointer, Pointer, Floats]:
        graph = Graph()
        weights, exact = graph.weights(values, case["type"])
        whole = graph.floats(x[chosen])
        n = len(x[chosen])
        seen = graph.op(
            "view_2d", whole, inner, n, ctypes.c_size_t(x.shape[1] * 4), ctypes.c_size_t(0)
        )
        first = last = graph.op("mul_mat", weights, seen)
        if case.get("bias"):
            last = graph.op("add", last, graph.floats(bias))
        if case.get("gelu"):
            last = graph.op("gelu", last)
        if case.get("residual"):
            last = graph.op("add", last, graph.floats(residual[chosen]))
        return graph, first, last, exact

    graph, first, last, weights = make(slice(None))
    supported = accelerator().supports(first)
    accelerator().set_threads(case.get("threads", 1))
    ours = graph.run(accelerator(), last).reshape(rows, columns)
    theirs = graph.run(cpu(), last).reshape(rows, columns)
    graph.free()
    exact = x[:, :inner].astype(np.float64) @ weights.astype(np.float64).T
    if case.get("bias"):
        exact += bias
    if case.get("gelu"):
        exact = gelu(exact)
    if case.get("residual"):
        exact += residual
    lengths = np.linalg.norm(x[:, :inner], axis=1)[:, None] * np.linalg.norm(weights, axis=1)
    same = True
    accelerator().set_threads(1)
    for start, stop in ((0, 1), (rows // 2, rows // 2 + 1), (rows // 3, rows)):
        graph, _, last, _ = make(slice(start, stop))
        part = graph.run(accelerator(), last).reshape(-1, columns)
        graph.free()
        same = same and np.array_equal(part, ours[start:stop])
    return {
        "supported": supported,
        "error": float((np.abs(ours - exact) / lengths).max()),
        "theirs": float((np.abs(theirs - exact) / lengths).max()),
        "same": same,
    }


def gate(case: dict[str, Any]) -> dict[str, Any]:
    """Two products of the same rows and the SwiGLU of both: the error as a share of what the
    products' may be, whether it is the same as in three steps, which are there where somebody
    wants to see them, and rows computed alone.
    """
    rng = np.random.default_rng(case["seed"])
    rows, columns, inner = case["rows"], case["columns"], case["inner"]
    x = normal(rng, rows, inner)
    values = [normal(rng, columns, inner, size=0.05) for _ in range(2)]
    kinds = [case["type"], case.get("other_type", case["type"])]

    products_there: list[Floats] = []

    def run(chosen: slice, *, apart: bool) -> tuple[Floats, list[Floats]]:
        graph = Graph()
        seen = graph.floats(x[chosen])
        made = [graph.weights(v, kind) for v, kind in zip(values, kinds, strict=True)]
        products = [graph.op("mul_mat", weights, seen) for weights, _ in made]
        result = graph.op("swiglu_split", *products)
        if apart:  # somebody wants to see the products
            for product in products:
                ggml("ggml_set_output", product, result=None)
        out = graph.run(accelerator(), result, first=[products[case.get("first", 0)]])
        if apart:
            products_there.extend(graph.read(product).reshape(-1, columns) for product in products)
        graph.free()
        return out.reshape(-1, columns), [exact for _, exact in made]

    accelerator().set_threads(case.get("threads", 1))
    ours, weights = run(slice(None), apart=False)
    apart, _ = run(slice(None), apart=True)
    alone = [run(slice(i, i + 1), apart=False)[0] for i in {0, rows // 2, rows - 1}]
    wide = x.astype(np.float64)
    g, u = (wide @ w.astype(np.float64).T for w in weights)
    silu = g / (1 + np.exp(-g))
    of_gate, of_up = (
        np.linalg.norm(wide, axis=1)[:, None] * np.linalg.norm(w, axis=1) for w in weights
    )
    # The gate's slope is 1.1 at most.
    error = np.abs(ours - silu * u) / (1.1 * of_gate * np.abs(u) + np.abs(silu) * of_up + 1e-3)
    there = [
        np.abs(product - exact) / lengths
        for product, exact, lengths in zip(products_there, (g, u), (of_gate, of_up), strict=True)
    ]
    return {
        "error": float(error.max()),
        "of_products": float(np.max(there)),
        "as_three": np.array_equal(ours, apart),
        "same": all(
            np.array_equal(part[0], ours[i])
            for part, i in zip(alone, {0, rows // 2, rows - 1}, strict=True)
        ),
    }


def products_in_turn(case: dict[str, Any]) -> dict[str, Any]:
    """Products one after the other, of the same rows or others: whether each is as alone."""
    rng = np.random.default_rng(case["seed"])
    columns, of = case["columns"], case["of"]
    x = [normal(rng, case["rows"], 64) for _ in range(2)]
    values = [normal(rng, columns, 64, size=0.05) for _ in of]
    bias = normal(rng, 1, columns)

    def run(chosen: Sequence[int]) -> Floats:
        graph = Graph()
        rows, sums = [graph.floats(some) for some in x], list[Pointer]()
        for i in chosen:
            weights, _ = graph.weights(values[i], case["type"])
            product = graph.op("mul_mat", weights, rows[of[i]])
            sums.append(graph.op("add", product, graph.floats(bias)))
        total = functools.reduce(lambda a, b: graph.op("add", a, b), sums)
        out = graph.run(accelerator(), total, first=sums)
        graph.free()
        return out

    accelerator().set_threads(case["threads"])
    alone = [run([i]) for i in range(len(of))]
    return {"same": np.array_equal(run(range(len(of))), functools.reduce(np.add, alone))}


def rotation(case: dict[str, Any]) -> dict[str, Any]:
    """Error of pairs that are rotated by their positions, against ggml and float64."""
    rng = np.random.default_rng(case["seed"])
    n_tokens, n_heads, dim, rotated = (case[name] for name in ("tokens", "heads", "dim", "rotated"))
    x = normal(rng, n_tokens, n_heads, dim)
    positions = rng.integers(0, case["longest"], n_tokens, dtype=np.int32)
    factors = rng.uniform(1, 8, rotated // 2).astype(np.float32)
    graph = Graph()
    a = graph.floats(x)
    if case["inner"]:  # a result of ours, whose memory the rotation may take
        a = graph.op("mul", a, graph.floats(np.ones(dim, np.float32)))
    side_by_side, scale, magnitude = case["side_by_side"], case["scale"], case["magnitude"]
    divided_by = graph.floats(factors) if case["factors"] else Pointer(None)
    result = graph.op(
        "rope_ext",
        *(a, graph.integers(positions), divided_by),
        *map(integer, (rotated, 0 if side_by_side else 2, 4096)),
        *(case["base"], scale, 0.0, magnitude, 32.0, 1.0),
    )
    supported = accelerator().supports(result)
    accelerator().set_threads(case.get("threads", 1))
    ours = graph.run(accelerator(), result).reshape(x.shape)
    theirs = graph.run(cpu(), result).reshape(x.shape)
    graph.free()
    angles = positions[:, None] * case["base"] ** (-2.0 / rotated * np.arange(rotated // 2)) * scale
    if case["factors"]:
        angles = angles / factors
    c, s = np.cos(angles)[:, None] * magnitude, np.sin(angles)[:, None] * magnitude
    first = slice(0, rotated, 2) if side_by_side else slice(0, rotated // 2)
    second = slice(1, rotated, 2) if side_by_side else slice(rotated // 2, rotated)
    exact = x.astype(np.float64)
    exact[..., first], exact[..., second] = (
        x[..., first] * c - x[..., second] * s,
        x[..., first] * s + x[..., second] * c,
    )
    return {
        "supported": supported,
        "to_ggml": float(np.abs(ours - theirs).max()),
        "error": float(np.abs(ours - exact).max()),
    }


def rotations(case: dict[str, Any]) -> dict[str, Any]:
    """Rotations by other angles in one graph: whether each is the same as alone."""
    rng = np.random.default_rng(case["seed"])
    x = normal(rng, 20, 2, 32)
    positions = [rng.integers(0, 500, 20, dtype=np.int32) for _ in range(2)]

    def run(chosen: Sequence[tuple[int, int, float]]) -> Floats:
        graph = Graph()
        a, made = graph.floats(x), [graph.integers(p) for p in positions]
        total = None
        for which, rotated, base in chosen:
            kinds = map(integer, (rotated, 2, 4096))
            params = (base, 1.0, 0.0, 1.0, 32.0, 1.0)
            one = graph.op("rope_ext", a, made[which], Pointer(None), *kinds, *params)
            total = one if total is None else graph.op("add", total, one)
        assert total is not None
        out = graph.run(accelerator(), total)
        graph.free()
        return out

    accelerator().set_threads(case["threads"])
    chosen = [(0, 32, 1e4), (1, 32, 1e4), (1, 16, 1e4), (1, 16, 1e6), (0, 32, 1e4)]
    alone = [run([one]) for one in chosen]
    return {"same": np.array_equal(run(chosen), functools.reduce(np.add, alone))}


def set_rows(case: dict[str, Any]) -> dict[str, Any]:
    """Rows that go to rows of a cache: whether exactly those are there and the others stayed."""
    rng = np.random.default_rng(case["seed"])
    cells, n, dtype = case["cells"], case["n"], np.float16 if case["half"] else np.float32
    cache = normal(rng, cells, n).astype(dtype)
    numbers = rng.permutation(cells)[: case["rows"]].astype(np.int64)
    rows = normal(rng, len(numbers), n)
    graph = Graph()
    held = (graph.halves if case["half"] else graph.floats)(cache.astype(np.float32))
    result = graph.op("set_rows", held, graph.floats(rows), graph.integers(numbers))
    supported = accelerator().supports(result)
    accelerator().set_threads(case.get("threads", 1))
    out = graph.run(accelerator(), result, dtype).reshape(cells, n)
    graph.free()
    cache[numbers] = rows.astype(dtype)
    return {"supported": supported, "same": np.array_equal(out, cache)}


def attention(case: dict[str, Any]) -> dict[str, Any]:
    """Error against float64, what halves of keys and values differ by, distance to ggml's result,
    and whether each sequence alone gives the same bits.
    """
    rng = np.random.default_rng(case["seed"])
    n_head, n_kv_head, dim = case["n_head"], case["n_kv_head"], case["dim"]
    value_dim = case.get("value_dim", dim)
    visible = np.array(case["visible"], bool)  # (row, cell)
    n, n_cells = visible.shape
    q = normal(rng, n_head, n, dim)
    k, v = normal(rng, n_kv_head, n_cells, dim), normal(rng, n_kv_head, n_cells, value_dim)
    added = normal(rng, n, n_cells) if case.get("added") else np.zeros((n, n_cells), np.float32)
    added = added.astype(np.float16).astype(np.float32)
    scale = 1 / np.sqrt(dim)
    half = case.get("half", True)
    floats, halves = (k, v), tuple(x.astype(np.float16).astype(np.float32) for x in (k, v))
    k, v = halves if half else floats

    def attended(k: Floats, v: Floats) -> Any:
        result = np.zeros((n, n_head, value_dim))
        for head in range(n_head):
            kv = head // (n_head // n_kv_head)
            scores = q[head].astype(np.float64) @ k[kv].astype(np.float64).T * scale + added
            scores[~visible] = -np.inf
            with np.errstate(invalid="ignore"):
                p = np.exp(scores - scores.max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
            result[:, head] = np.where(np.isnan(p), 0, p) @ v[kv].astype(np.float64)
        return result

    def compute(backend: Backend, rows: Any, cells: Any) -> Floats:
        graph = Graph()
        store = graph.halves if half else graph.floats
        mask = np.where(visible, added, -np.inf)[rows][:, cells].astype(np.float32)
        result = graph.op(
            "flash_attn_ext",
            graph.floats(q[:, rows]),
            store(k[:, cells]),
            store(v[:, cells]),
            graph.halves(mask),
            *(float(scale), 0.0, 0.0),
        )
        assert backend.supports(result)
        out = graph.run(backend, result).reshape(-1, n_head, value_dim)
        graph.free()
        return out

    accelerator().set_threads(case.get("threads", 1))
    ours = compute(accelerator(), slice(None), slice(None))
    same = True
    for rows, cells in case.get("alone", []):
        part = compute(accelerator(), rows, cells)
        same = same and np.array_equal(part, ours[rows])
    return {
        "error": float(np.abs(ours - attended(k, v)).max()),
        "halves": float(np.abs(attended(*halves) - attended(*floats)).max()),
        "to_ggml": float(np.abs(ours - compute(cpu(), slice(None), slice(None))).max()),
        "same": same,
    }


def small(case: dict[str, Any]) -> dict[str, Any]:
    """Error of an operation over rows against float64, and its distance to ggml's result."""
    rng = np.random.default_rng(case["seed"])
    shape = tuple(case["shape"])  # the slowest first
    x, y = normal(rng, *shape), normal(rng, *shape)
    row, row2 = normal(rng, shape[-1]), normal(rng, shape[-1])
    graph = Graph()
    a, dtype, allowed = graph.floats(x), np.float32, np.zeros(1)
    match case["op"]:
        case "add":
            result, exact = graph.op("add", a, graph.floats(y)), x + y
        case "add_row":
            result, exact = graph.op("add", a, graph.floats(row)), x + row
        case "mul":
            result, exact = graph.op("mul", a, graph.floats(row)), x * row
        case "gelu":
            result, exact = graph.op("gelu", a), gelu(x.astype(np.float64))
        case "swiglu":
            result = graph.op("swiglu_split", a, graph.floats(y))
            exact = x / (1 + np.exp(-x.astype(np.float64))) * y
        case "cast":
            swapped = graph.op("permute", a, *map(integer, (0, 2, 1, 3)))
            result, dtype = graph.op("cast", swapped, integer(NUMBERS["F16"])), np.float16
            exact = np.swapaxes(x, -2, -3).astype(np.float16)
        case "norm" | "rms_norm" as name:
            result = graph.op(name, a, 1e-6)
            result = graph.op("mul", result, graph.floats(row))
            wide = x.astype(np.float64)
            mean = wide.mean(axis=-1, keepdims=True) if name == "norm" else np.zeros(1)
            wide = wide - mean
            scale = row / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6)
            exact = wide * scale
            # A mean is rounded, which counts where the numbers of a row are nearly the same.
            allowed = 2.0**-23 * np.abs(mean * scale)
            if name == "norm":
                result = graph.op("add", result, graph.floats(row2))
                exact = exact + row2
        case other:
            raise ValueError(other)
    supported = accelerator().supports(result)
    accelerator().set_threads(case.get("threads", 1))
    ours, theirs = (
        graph.run(backend, result, dtype).astype(np.float64).reshape(exact.shape)
        for backend in (accelerator(), cpu())
    )
    graph.free()
    return {
        "supported": supported,
        "error": float((np.abs(ours - exact) - allowed).max()),
        "to_ggml": float((np.abs(ours - theirs) - 2 * allowed).max()),
    }


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """Whether the accelerator takes an operation that it does not cover."""
    graph = Graph()
    tensor = graph.tensor
    attention_of = lambda *params, dim=32, mask=True: graph.op(  # noqa: E731
        "flash_attn_ext",
        tensor("F32", (dim, 8, 4)),
        tensor("F16", (dim, 8, 2)),
        tensor("F16", (dim, 8, 2)),
        tensor("F16", (8, 8)) if mask else Pointer(None),
        *params,
    )
    x, w, x2 = tensor("F32", (64, 8)), tensor("Q8_0", (64, 16)), tensor("F32", (64, 2))

    def rotated(*, mode: int = 2, extrapolation: float = 0.0, kind: str = "F32") -> Pointer:
        positions = tensor("I32", (32 if mode == 8 else 8,))
        of, params = tensor(kind, (64, 2, 8)), (1e4, 1.0, extrapolation, 1.0, 32.0, 1.0)
        if mode != 8:
            return graph.op(
                "rope_ext", of, positions, Pointer(None), *map(integer, (64, mode, 4096)), *params
            )
        sections = (ctypes.c_int * 4)(8, 12, 12, 0)
        address = Pointer(ctypes.addressof(sections))
        kinds = (integer(64), address, *map(integer, (mode, 4096)))
        return graph.op("rope_multi", of, positions, Pointer(None), *kinds, *params)

    def with_precision(made: Pointer, precision: int, hint: int = 0) -> Pointer:
        if hint:
            ggml("ggml_mul_mat_set_hint", made, integer(hint), result=None)
        elif precision:
            ggml("ggml_prec_set_acc", made, integer(precision), result=ctypes.c_bool)
        return made

    def with_sinks(made: Pointer) -> Pointer:
        ggml("ggml_flash_attn_ext_add_sinks", made, tensor("F32", (4,)), result=None)
        return made

    def strided(kind: str, row: int, rows: int, bytes_apart: int) -> Pointer:
        whole = tensor(kind, (4 * row, rows))
        apart = ctypes.c_size_t(bytes_apart)
        return graph.op("view_2d", whole, row, rows, apart, ctypes.c_size_t(0))

    cases: dict[str, Callable[[], Pointer]] = {
        "a product, plain": lambda: graph.op("mul_mat", w, x),
        "a product with a precision": lambda: with_precision(graph.op("mul_mat", w, x), 10),
        "a product with a hint": lambda: with_precision(graph.op("mul_mat", w, x), 0, 1),
        "a batch of products": lambda: graph.op(
            "mul_mat", tensor("F16", (64, 16, 2)), tensor("F32", (64, 8, 2))
        ),
        "one matrix for a batch": lambda: graph.op("mul_mat", w, tensor("F32", (64, 8, 2))),
        "weights with gaps": lambda: graph.op("mul_mat", strided("Q8_0", 64, 16, 4 * 68), x),
        "a product of halves": lambda: graph.op("mul_mat", w, tensor("F16", (64, 8))),
        "a type without a kernel": lambda: graph.op(
            "mul_mat", tensor("IQ2_XXS", (256, 16)), tensor("F32", (256, 8))
        ),
        "attention, plain": lambda: attention_of(1.0, 0.0, 0.0),
        "attention, float32 sums": lambda: with_precision(attention_of(1.0, 0.0, 0.0), 10),
        "attention with ALiBi": lambda: attention_of(1.0, 8.0, 0.0),
        "attention with a soft cap": lambda: attention_of(1.0, 0.0, 50.0),
        "attention with sinks": lambda: with_sinks(attention_of(1.0, 0.0, 0.0)),
        "attention in half precision": lambda: with_precision(attention_of(1.0, 0.0, 0.0), 20),
        "attention without a mask": lambda: attention_of(1.0, 0.0, 0.0, mask=False),
        "attention of odd heads": lambda: attention_of(1.0, 0.0, 0.0, dim=40),
        "attention over quantized cells": lambda: graph.op(
            "flash_attn_ext",
            *(tensor("F32", (32, 8, 4)), tensor("Q8_0", (32, 8, 2)), tensor("Q8_0", (32, 8, 2))),
            *(tensor("F16", (8, 8)), 1.0, 0.0, 0.0),
        ),
        "attention of two streams": lambda: graph.op(
            "flash_attn_ext",
            *(tensor("F32", (32, 8, 4, 2)), tensor("F16", (32, 8, 2, 2))),
            *(tensor("F16", (32, 8, 2, 2)), tensor("F16", (8, 8, 1, 2)), 1.0, 0.0, 0.0),
        ),
        "a sum, plain": lambda: graph.op("add", x, tensor("F32", (64,))),
        "a sum that repeats values": lambda: graph.op("add", x, tensor("F32", (1, 8))),
        "a sum of halves": lambda: graph.op("add", tensor("F16", (64, 8)), tensor("F16", (64, 8))),
        "another activation": lambda: graph.op("relu", x),
        "GELU by the error function": lambda: graph.op("gelu_erf", x),
        "a gated GELU": lambda: graph.op("geglu_split", x, tensor("F32", (64, 8))),
        "SwiGLU in one tensor": lambda: graph.op("swiglu", x),
        "a cast to another type": lambda: graph.op("cast", x, integer(NUMBERS["BF16"])),
        "a norm of columns": lambda: graph.op("norm", graph.op("transpose", x), 1e-6),
        "a rotation, plain": lambda: rotated(),
        "a rotation that is interpolated": lambda: rotated(extrapolation=1.0),
        "a rotation by several positions": lambda: rotated(mode=8),
        "a rotation of halves": lambda: rotated(kind="F16"),
        "rows of halves to a cache": lambda: graph.op(
            "set_rows", tensor("F16", (64, 8)), tensor("F16", (64, 2)), tensor("I64", (2,))
        ),
        "rows to a cache, plain": lambda: graph.op(
            "set_rows", tensor("F16", (64, 8)), x2, tensor("I64", (2,))
        ),
        "rows to a cache by short numbers": lambda: graph.op(
            "set_rows", tensor("F16", (64, 8)), x2, tensor("I32", (2,))
        ),
        "rows to a quantized cache": lambda: graph.op(
            "set_rows", tensor("Q8_0", (64, 8)), x2, tensor("I64", (2,))
        ),
        "a transposed row": lambda: graph.op(
            "mul_mat", w, graph.op("transpose", tensor("F32", (8, 64)))
        ),
    }
    taken = accelerator().supports(cases[case["what"]]())
    graph.free()
    return {"taken": taken}


RUN = {
    "product": product,
    "gate": gate,
    "products_in_turn": products_in_turn,
    "attention": attention,
    "rotation": rotation,
    "rotations": rotations,
    "set_rows": set_rows,
    "small": small,
    "refused": refused,
}


def choose(kernel: str) -> None:
    """The accelerator takes the kernels of this name, which the CPU must run, before it is loaded.

    After that it has said once and for all which run.
    """
    library.bindings()  # ggml's libraries, which it is linked with
    path = library_path(library.version())
    if path.exists() and not ctypes.CDLL(str(path)).gguf_embed_choose(kernel.encode()):
        sys.exit(f"there are no kernels for {kernel} in {path.name}, or not for this CPU")


def main() -> None:
    choose(sys.argv[1])
    accelerated = library.accelerated()
    print(json.dumps({"kernel": accelerated.kernel, "remark": accelerated.remark}), flush=True)
    if accelerated.kernel is None:
        return
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(RUN[case.pop("run")](case)), flush=True)


if __name__ == "__main__":
    main()
