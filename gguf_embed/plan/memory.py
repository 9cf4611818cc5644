"""The memory that a run takes, by device, before anything is loaded.

It is counted from the tensor table and from the contexts that the engine makes (contexts.py). The
compute buffer follows llama.cpp's graphs. Every part is within 5 % or 64 MiB of what llama.cpp
itself reports (tests/test_plan.py). The parts on a GPU follow from llama.cpp's source
(src/llama-model.cpp, load_tensors; ggml/src/ggml-backend.cpp).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from gguf_embed.machine.machine import Device, Machine
from gguf_embed.native.context import ContextParams
from gguf_embed.plan.contexts import long_context, longest_ordinary, ordinary_context, tapped
from gguf_embed.plan.settings import RunSettings
from gguf_embed.plan.variants import Variant
from gguf_embed.vectors import Pooling

HOST: Final = "CPU"  # the key of RAM in what `predict` returns
MIB: Final = 2**20
# A context of the driver, where free memory was not read by a process that had one. 457 MiB is
# what ollama reserves (ml/device.go); reports are between 250 and 500.
DRIVER_BYTES: Final = {"CUDA": 457 * MIB, "ROCm": 457 * MIB}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device, by what they are for."""

    weights_bytes: int = 0
    cache_bytes: int = 0  # KV cache
    compute_bytes: int = 0  # graph, inputs included
    host_bytes: int = 0  # llama.cpp's output buffers, RAM only
    overhead_bytes: int = 0  # the driver's
    margin_bytes: int = 0  # to be left free

    @property
    def used_bytes(self) -> int:
        """All but the margin."""
        parts = (self.weights_bytes, self.cache_bytes, self.compute_bytes, self.host_bytes)
        return sum(parts) + self.overhead_bytes

    @property
    def total_bytes(self) -> int:
        """The margin too."""
        return self.used_bytes + self.margin_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One physical memory: what of it would be used, what is free, what of that should stay so."""

    name: str
    used_bytes: int
    free_bytes: int
    margin_bytes: int

    def spare_bytes(self, share: int = 1) -> int:
        """What is left beyond 1/share of the margin; below 0: too much is used."""
        return self.free_bytes - self.used_bytes - self.margin_bytes // share


def mib(n_bytes: int) -> str:
    """ "1,234 MiB"."""
    return f"{n_bytes / MIB:,.0f} MiB"


def predict(variant: Variant, machine: Machine, run: RunSettings) -> dict[str, Memory]:
    """What each device will hold, by device name and "CPU" for RAM; margins are 0.

    Weights are counted once: what is repacked replaces pages of the file that can be dropped.
    Not counted: contexts that live for one call, and the Python process.
    """
    gpus = gpus_of(machine)
    contexts = _contexts(variant, run)
    places = places_of_layers(variant.shape.n_layer, run.n_gpu_layers, gpus)
    whole = HOST not in places
    helper = None if whole or not gpus else gpus[0].name
    weights = dict.fromkeys((HOST, *(gpu.name for gpu in gpus)), 0)
    cache = dict(weights)
    weights[HOST] = variant.input_bytes
    per_cell = 0 if variant.mode.encoder else 4 * variant.shape.n_head_kv * variant.shape.head_dim
    n_cells = sum(context.n_ctx for context in contexts)
    for n_bytes, place in zip(variant.layer_bytes, places, strict=False):  # the output comes last
        weights[place] += n_bytes
        cache[place] += per_cell * n_cells
    on_gpu = places[-1] != HOST
    weights[places[-1]] += variant.output_bytes - (0 if on_gpu else variant.output_copy_bytes)

    compute = dict.fromkeys(weights, 0)
    for context in contexts:
        graph = _graph_bytes(variant, context, flash_attn=run.flash_attn)
        inputs = _input_bytes(variant, context, flash_attn=run.flash_attn)
        carried = 4 * context.n_ubatch * variant.shape.n_embd  # the hidden state
        # With every layer on GPUs the CPU makes inputs and token vectors only.
        compute[HOST] += inputs + carried if whole else graph
        for gpu in gpus:
            compute[gpu.name] += graph if gpu.name in (*places, helper) else 0
            # Large batches are computed on the first GPU even where the weights are not: they are
            # copied there one by one (ggml_backend_sched, op_offload).
            visitor = max(variant.largest_bytes, 0 if on_gpu else variant.output_bytes)
            compute[gpu.name] += visitor if gpu.name == helper else 0
            if whole and len(gpus) > 1:  # a pipeline keeps four copies of what is handed on
                compute[gpu.name] += 3 * (inputs + carried)
    row = variant.shape.n_vocab + (0 if tapped(run, variant.mode) else variant.shape.n_embd)
    driver = DRIVER_BYTES if machine.source == "specification" else {}
    backends = {gpu.name: gpu.backend for gpu in gpus}
    return {
        name: Memory(
            weights_bytes=weights[name],
            cache_bytes=cache[name],
            compute_bytes=compute[name],
            host_bytes=4 * row * sum(c.n_rows for c in contexts) if name == HOST else 0,
            overhead_bytes=driver.get(backends.get(name, ""), 0),
        )
        for name in weights
    }


def gpus_of(machine: Machine) -> tuple[Device, ...]:
    """The GPUs that llama.cpp spreads a model over: integrated ones only where there are no others.

    (src/llama.cpp, llama_prepare_model_devices.)
    """
    usable = [device for device in machine.devices if device.total_bytes]
    own = [device for device in usable if device.kind == "gpu"]
    shared = [device for device in usable if device.kind == "igpu"]
    return tuple(own or [gpu for gpu in shared if gpu.backend == shared[0].backend])


def places_of_layers(n_layer: int, n_gpu_layers: int, gpus: Sequence[Device]) -> list[str]:
    """The device of each layer, and of the output after them.

    The last ones are on GPUs, the output first of all, in shares of free memory
    (src/llama-model.cpp, load_tensors).
    """
    n_on_gpu = n_layer + 1 if n_gpu_layers < 0 else min(n_gpu_layers, n_layer + 1)
    n_on_gpu = n_on_gpu if gpus else 0
    free = list(accumulate(max(gpu.free_bytes, 1) for gpu in gpus))
    places = [HOST] * (n_layer + 1 - n_on_gpu)
    for index in range(n_on_gpu):
        share = index / n_on_gpu * free[-1]
        places.append(gpus[min(bisect_right(free, share), len(gpus) - 1)].name)
    return places


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    """What llama.cpp makes of a context's parameters."""

    n_ctx: int  # cells of the cache
    n_ubatch: int
    n_outputs: int  # rows of the graph that reach its end
    n_rows: int  # rows of the output buffer, once in use


def _contexts(variant: Variant, run: RunSettings) -> list[_Buffers]:
    """Those of all ordinary contexts, and of one for a text that they cannot take."""
    mode = variant.mode
    longest = longest_ordinary(run, mode)
    contexts = [_buffers(ordinary_context(run, mode), longest)] * run.n_contexts
    if run.n_ctx > longest:
        contexts.append(_buffers(long_context(run, mode, run.n_ctx), run.n_ctx))
    return contexts


def _buffers(params: ContextParams, longest: int) -> _Buffers:
    """Those of a context for batches of up to `longest` tokens."""
    n_ubatch = _round_up(params.n_ubatch, params.n_seq_max)  # as native's Context has it
    n_ctx = _round_up(max(params.n_ctx, n_ubatch), 256)
    n_outputs, n_rows = n_ubatch, longest
    if params.tap and params.pooling in (Pooling.LAST, Pooling.CLS):
        n_outputs = n_rows = params.n_seq_max
    # llama.cpp starts with a row for each sequence.
    n_rows = max(n_rows, params.n_seq_max)
    return _Buffers(n_ctx=n_ctx, n_ubatch=n_ubatch, n_outputs=n_outputs, n_rows=n_rows)


def _input_bytes(variant: Variant, context: _Buffers, *, flash_attn: bool) -> int:
    """Attention masks, positions, indices."""
    n_kv = context.n_ubatch if variant.mode.encoder else context.n_ctx
    masks = n_kv * (2 if flash_attn else 4) * variant.n_masks
    return context.n_ubatch * (masks + 24)


def _graph_bytes(variant: Variant, context: _Buffers, *, flash_attn: bool) -> int:
    """The compute buffer: inputs, and the most that lives at one time while a layer is computed.

    Read off src/models/qwen3.cpp, qwen2.cpp and bert.cpp in units of one float per token, and
    checked against ggml's allocator over shapes, contexts and microbatches.
    """
    shape, encoder = variant.shape, variant.mode.encoder
    n_kv = context.n_ubatch if encoder else context.n_ctx
    q_width = shape.n_head * shape.head_dim
    scores = 0 if flash_attn else shape.n_head * n_kv
    feed_forward = (3 if variant.gated else 1) * shape.n_ff + 3 * shape.n_embd
    if encoder:
        attention, head = 3 * (shape.n_embd + q_width) + scores, 0
    else:
        attention, head = 3 * shape.n_embd + 2 * q_width + scores, shape.n_vocab + 2 * shape.n_embd
        feed_forward += q_width if flash_attn else 0  # the allocator leaves a hole
    widest = max(context.n_ubatch * max(attention, feed_forward), context.n_outputs * head)
    return 4 * widest + _input_bytes(variant, context, flash_attn=flash_attn)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
