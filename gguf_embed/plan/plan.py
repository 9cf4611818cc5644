"""Which file of a model to run, where and how: `(model, Machine, Limits) -> Plan`.

Nothing is opened or asked here; what was measured on the machine comes in as a value. Memory is
counted from the tensor table and from the contexts that the engine really makes (runner.py); the
compute buffer follows llama.cpp's graphs. Against what llama.cpp itself reports, every part is
within 5 % or 64 MiB (tests/test_plan.py). The parts on a GPU follow from llama.cpp's source
(src/llama-model.cpp, load_tensors; ggml/src/ggml-backend.cpp).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, Literal, TypeAlias

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard, ModelFile
from gguf_embed.errors import BadModelFile, BadOption, DoesNotFit
from gguf_embed.gguf import layout, quants
from gguf_embed.gguf.header import ENCODERS, Header
from gguf_embed.gguf.layout import Shape
from gguf_embed.gguf.tensors import TensorInfo
from gguf_embed.machine import measured
from gguf_embed.machine.machine import Device, Machine
from gguf_embed.machine.measured import LevelFigures, MeasuredRun
from gguf_embed.vectors import Pooling

Prefer: TypeAlias = Literal["quality", "speed", "memory"]
Verdict: TypeAlias = Literal["fits", "tight", "no"]
Tier: TypeAlias = Literal["gpu", "split", "cpu"]  # all layers on GPUs, some of them, none

PREFERENCES: Final[tuple[Prefer, ...]] = ("quality", "speed", "memory")
HOST: Final = "CPU"  # the key of RAM in `memory`
MIB: Final = 2**20

# What stays free: llama.cpp's own default per device (common/common.h, fit_params_target), on small
# devices an eighth of what is free. A tight plan leaves at least a quarter of that.
MARGIN_BYTES: Final = 1024 * MIB
MARGIN_SHARE: Final = 8
TIGHT_SHARE: Final = 4
# A context of the driver, where free memory was not read by a process that had one. 457 MiB is
# what ollama reserves (ml/device.go); reports are between 250 and 500.
DRIVER_BYTES: Final = {"CUDA": 457 * MIB, "ROCm": 457 * MIB}

# Context that a plan must have room for before it counts as roomy. Where a text is one microbatch
# (encoders, pooled paths) llama.cpp's buffers grow with n_ctx x vocabulary, so less is asked.
N_CTX: Final = 8192
N_CTX_WHOLE: Final = 2048
N_CTX_LEAST: Final = 512
# As tune.untuned, runner.RunSettings and runner.LONG_STEP have them; tests compare.
BATCH_TOKENS: Final = 512
BATCH_TOKENS_TIGHT: Final = 128
BATCH_SEQS: Final = 64
LONG_STEP: Final = 1024
SMALL_MODEL: Final = 1_000_000_000  # parameters; `auto` takes none larger without a GPU

AUTO: Final = "auto"
AUTO_FAMILY: Final = "qwen3-embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the caller decided; None leaves it to the plan."""

    quant: str | None = None
    n_ctx: int | None = None  # longest text, in tokens
    max_batch_tokens: int | None = None
    n_contexts: int | None = None
    n_threads: int | None = None  # cores to share out among the contexts
    n_gpu_layers: int | None = None  # llama.cpp's count: the output is one more; -1: all
    flash_attn: bool | None = None
    tap: bool | None = None  # False: with the language-model head, as llama.cpp itself pools
    pooling: Pooling | None = None  # None: as the card or the file says
    memory_bytes: int | None = None  # most to use of RAM, and of each GPU
    margin_bytes: int | None = None  # what stays free of each
    prefer: Prefer = "quality"
    allow_smaller: bool = False  # take a smaller model of the family where this one is cramped


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One GGUF of a model, here or not: all that its memory depends on."""

    model: str
    quant: str
    file: ModelFile | None  # None: a local file, or one that would have to be made
    shape: Shape
    pooling: Pooling
    causal: bool
    input_bytes: int  # tables that stay in RAM whatever the device
    layer_bytes: tuple[int, ...]
    output_bytes: int  # on a GPU, with the copy of the token table where that is the output
    output_copy_bytes: int  # that copy: RAM has none
    largest_bytes: int  # of one tensor in the layers
    gated: bool  # the feed-forward part has a gate
    n_masks: int
    here: bool = False  # its file is on this machine
    tap: bool = True  # the language-model head is left out where it can be

    @property
    def encoder(self) -> bool:
        """Runs without a KV cache, a microbatch whole."""
        return self.shape.architecture in ENCODERS

    @property
    def tapped(self) -> bool:
        """The engine leaves out the language-model head."""
        return self.tap and not self.encoder and self.pooling is not Pooling.RANK

    @property
    def splits(self) -> bool:
        """A text may be longer than a microbatch."""
        return self.tapped and self.causal


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a variant is run; names as in runner.RunSettings. `n_ctx` is the longest text."""

    n_ctx: int
    max_batch_tokens: int
    n_contexts: int = 1
    n_gpu_layers: int = 0
    flash_attn: bool = True


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
class Candidate:
    """One row of what was considered; needed and free bytes are those of the scarcest memory."""

    quant: str
    tier: Tier
    where: str
    verdict: Verdict
    needed_bytes: int  # without margin
    free_bytes: int
    reason: str
    run: Run
    memory: Mapping[str, Memory]  # by device, "CPU" for RAM
    measured: LevelFigures  # here, with as many layers on GPUs

    @property
    def fits(self) -> bool:
        """Comfortably or not."""
        return self.verdict != "no"

    @property
    def known(self) -> str:
        """What was measured of it: "612 tokens/s, 99.7 % of F16's nDCG@10", or ""."""
        speed, quality = self.measured.tokens_per_s, self.measured.quality
        shown = [f"{speed:,.0f} tokens/s"] if speed is not None else []
        if quality is not None and quality.reference != self.quant:
            shown.append(str(quality))
        return ", ".join(shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run and how, with every choice's reason."""

    model: str
    quant: str
    reason: str  # for the quantization
    file: ModelFile | None
    tier: Tier
    verdict: Verdict  # "fits" or "tight"
    devices: tuple[str, ...]  # that hold layers; "CPU" last
    n_gpu_layers: int
    n_ctx: int  # longest text that there is memory for
    max_batch_tokens: int
    n_contexts: int
    n_threads: int  # of each context
    memory: Mapping[str, Memory]
    considered: tuple[Candidate, ...]
    why: tuple[str, ...]
    suggestion: str | None = None  # a smaller model that would have room

    @property
    def rank(self) -> tuple[int, int]:
        """Larger is better: room and layers on GPUs first, then the quantization's quality."""
        tiers: tuple[Tier, ...] = ("cpu", "split", "gpu")
        place = 2 * tiers.index(self.tier) + (self.verdict == "fits")
        return place, -quants.rank(self.quant)

    @property
    def chosen(self) -> Candidate:
        """Its row in `considered`."""
        asked = (self.quant, self.tier)
        return next(row for row in self.considered if (row.quant, row.tier) == asked)

    @property
    def in_short(self) -> str:
        """ "qwen3-embedding-8b Q8_0 on CPU: asked for; leaves 9,260 MiB of RAM free; ..." """
        return (
            f"{self.model} {self.quant} on {self.chosen.where}: {self.reason}; "
            f"{self.chosen.reason}; texts of up to {self.n_ctx:,} tokens"
        )


# -- variants ------------------------------------------------------------------------------------


def variants(card: ModelCard, *, any_quant: bool = False) -> tuple[Variant, ...]:
    """One for each file of the card; with `any_quant` for each quantization that can be made.

    Raises BadOption where the architecture's tensor table is not known: use `variant` with the
    headers of its files.
    """
    if card.shape is None:
        raise BadOption(f"{card.id}: its shape is not known; read the header of one of its files")
    files = {file.quant: file for file in reversed(card.files)}
    names = layout.QUANTS if any_quant else sorted(files, key=quants.rank)
    return tuple(
        _variant(
            model=card.id,
            quant=quant,
            file=files.get(quant),
            shape=card.shape,
            pooling=card.pooling,
            causal=card.causal,
            tensors=layout.tensors(card.shape, quant),
            n_masks=1,
        )
        for quant in names
    )


def variant(
    header: Header, *, card: ModelCard | None = None, file: ModelFile | None = None
) -> Variant:
    """The variant that a GGUF's header describes. Raises BadModelFile."""
    n_window = header.metadata.get(f"{header.architecture}.attention.sliding_window")
    return _variant(
        model=card.id if card else header.name or header.source,
        quant=header.quant,
        file=file,
        shape=layout.shape_of(header),
        pooling=card.pooling if card else header.pooling or Pooling.MEAN,
        causal=card.causal if card else header.causal,
        tensors=header.tensors,
        n_masks=2 if n_window else 1,
    )


# Looked up by token: llama.cpp keeps them in RAM (LLM_TENSOR_LAYER_INPUT in src/llama-arch.cpp).
_INPUTS: Final = ("token_embd", "position_embd", "token_types")
# Encoders that load the token table a second time as an output, like decoders.
_ENCODERS_WITH_OUTPUT: Final = frozenset({"dream", "gemma-embedding", "llada"})


def _variant(
    *,
    model: str,
    quant: str,
    file: ModelFile | None,
    shape: Shape,
    pooling: Pooling,
    causal: bool,
    tensors: Sequence[TensorInfo],
    n_masks: int,
) -> Variant:
    input_bytes = output_bytes = token_embd_bytes = largest_bytes = 0
    layer_bytes = [0] * shape.n_layer
    names: set[str] = set()
    for tensor in tensors:
        part, _, rest = tensor.name.partition(".")
        names.add(rest.partition(".")[2] if part == "blk" else tensor.name)
        if part == "blk":
            number = rest.partition(".")[0]
            if not number.isdecimal() or int(number) >= shape.n_layer:
                raise BadModelFile(f"{model}: {tensor.name} is beyond its {shape.n_layer} layers")
            layer_bytes[int(number)] += tensor.n_bytes
            largest_bytes = max(largest_bytes, tensor.n_bytes)
        elif part.startswith(_INPUTS):
            input_bytes += tensor.n_bytes
            token_embd_bytes += tensor.n_bytes if tensor.name == "token_embd.weight" else 0
        else:
            output_bytes += tensor.n_bytes
    encoder = shape.architecture in ENCODERS
    has_output = not encoder or shape.architecture in _ENCODERS_WITH_OUTPUT
    copy_bytes = token_embd_bytes if has_output and "output.weight" not in names else 0
    return Variant(
        model=model,
        quant=quant,
        file=file,
        shape=shape,
        pooling=pooling,
        causal=causal and not encoder,
        input_bytes=input_bytes,
        layer_bytes=tuple(layer_bytes),
        output_bytes=output_bytes + copy_bytes,
        output_copy_bytes=copy_bytes,
        largest_bytes=largest_bytes,
        # ModernBERT and others have gate and up in one tensor.
        gated="ffn_gate.weight" in names or shape.architecture in ("modern-bert", "neo-bert"),
        n_masks=n_masks,
    )


# -- memory --------------------------------------------------------------------------------------


def predict(variant: Variant, machine: Machine, run: Run) -> dict[str, Memory]:
    """What each device will hold, by device name and "CPU" for RAM; margins are 0.

    Weights are counted once: what is repacked replaces pages of the file that can be dropped.
    Not counted: one-off contexts (token_vectors, the path after NaN) and the Python process.
    """
    gpus = gpus_of(machine)
    contexts = _contexts(variant, run)
    places = _places(variant.shape.n_layer, run.n_gpu_layers, gpus)
    whole = HOST not in places
    helper = None if whole or not gpus else gpus[0].name
    weights = dict.fromkeys((HOST, *(gpu.name for gpu in gpus)), 0)
    cache = dict(weights)
    weights[HOST] = variant.input_bytes
    per_cell = 0 if variant.encoder else 4 * variant.shape.n_head_kv * variant.shape.head_dim
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
    row = variant.shape.n_vocab + (0 if variant.tapped else variant.shape.n_embd)
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


def _places(n_layer: int, n_gpu_layers: int, gpus: Sequence[Device]) -> list[str]:
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
class _Context:
    """What llama.cpp makes of a context's parameters."""

    n_ctx: int  # cells of the cache
    n_ubatch: int
    n_outputs: int  # rows of the graph that reach its end
    n_rows: int  # rows of the output buffer, once in use


def _contexts(variant: Variant, run: Run) -> list[_Context]:
    """The contexts of runner.Runner: ordinary ones, and one for a text that they cannot take."""
    room = run.max_batch_tokens * (2 if variant.splits else 1)
    contexts = [_context(variant, run, run.max_batch_tokens, room)] * run.n_contexts
    if run.n_ctx > room:
        contexts.append(_context(variant, run, _round_up(run.n_ctx, LONG_STEP), run.n_ctx))
    return contexts


def _context(variant: Variant, run: Run, n_tokens: int, longest: int) -> _Context:
    """A context of `n_tokens` (Runner._params) for batches of up to `longest` tokens."""
    n_seq_max = min(BATCH_SEQS, n_tokens) + variant.splits
    n_ubatch = _round_up(run.max_batch_tokens if variant.splits else n_tokens, n_seq_max)
    n_ctx = _round_up(max(n_tokens, longest, n_ubatch), 256)
    n_outputs, n_rows = n_ubatch, longest
    if variant.tapped and variant.pooling in (Pooling.LAST, Pooling.CLS):
        n_outputs = n_rows = n_seq_max
    # llama.cpp starts with a row for each sequence.
    n_rows = max(n_rows, n_seq_max)
    return _Context(n_ctx=n_ctx, n_ubatch=n_ubatch, n_outputs=n_outputs, n_rows=n_rows)


def _input_bytes(variant: Variant, context: _Context, *, flash_attn: bool) -> int:
    """Attention masks, positions, indices."""
    n_kv = context.n_ubatch if variant.encoder else context.n_ctx
    masks = n_kv * (2 if flash_attn else 4) * variant.n_masks
    return context.n_ubatch * (masks + 24)


def _graph_bytes(variant: Variant, context: _Context, *, flash_attn: bool) -> int:
    """The compute buffer: inputs, and the most that lives at one time while a layer is computed.

    Read off src/models/qwen3.cpp, qwen2.cpp and bert.cpp in units of one float per token, and
    checked against ggml's allocator over shapes, contexts and microbatches.
    """
    shape = variant.shape
    n_kv = context.n_ubatch if variant.encoder else context.n_ctx
    q_width = shape.n_head * shape.head_dim
    scores = 0 if flash_attn else shape.n_head * n_kv
    feed_forward = (3 if variant.gated else 1) * shape.n_ff + 3 * shape.n_embd
    if variant.encoder:
        attention, head = 3 * (shape.n_embd + q_width) + scores, 0
    else:
        attention, head = 3 * shape.n_embd + 2 * q_width + scores, shape.n_vocab + 2 * shape.n_embd
        feed_forward += q_width if flash_attn else 0  # the allocator leaves a hole
    widest = max(context.n_ubatch * max(attention, feed_forward), context.n_outputs * head)
    return 4 * widest + _input_bytes(variant, context, flash_attn=flash_attn)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


# -- choosing ------------------------------------------------------------------------------------


def plan_for(
    card: ModelCard,
    machine: Machine,
    limits: Limits | None = None,
    *,
    known: Sequence[MeasuredRun] = (),
    any_quant: bool = False,
    offered: Sequence[Variant] = (),
) -> Plan:
    """The plan for a known model; suggests, or with `allow_smaller` takes, a smaller one of its
    family where it would be cramped.

    `known` is what was measured on this machine (measured.load), of any model; `offered` is what
    to choose from instead of the catalog's files. Raises DoesNotFit, BadOption.
    """
    limits = limits or Limits()
    offered = offered or variants(card, any_quant=any_quant)
    found = _best(offered, machine, limits, known)
    if isinstance(found, Plan) and _runs_well(found, machine):
        return found
    smaller = _first_that_runs_well(_smaller(card), machine, limits, known, any_quant=any_quant)
    if smaller is not None and limits.allow_smaller:
        problem = _in_words(found.chosen if isinstance(found, Plan) else found.nearest)
        return replace(smaller, why=(f"{smaller.model}: {card.id} {problem}", *smaller.why))
    hint = f"{smaller.model} ({_in_words(smaller.chosen)})" if smaller else None
    if isinstance(found, Plan):
        return replace(found, suggestion=hint)
    raise _does_not_fit(found, machine, limits, hint)


def auto_family() -> list[ModelCard]:
    """What `auto` can mean, the largest first."""
    family = [card for card in catalog.cards() if card.family == AUTO_FAMILY]
    return sorted((card for card in family if card.kind == "embedder"), key=_size, reverse=True)


def plan_auto(
    machine: Machine,
    limits: Limits | None = None,
    *,
    known: Sequence[MeasuredRun] = (),
    offered: Mapping[str, Sequence[Variant]] | None = None,
) -> Plan:
    """The best Qwen3-Embedding that the machine runs well: all of it on GPUs, or a small one.

    `offered` are the files to choose from, by the id of the card; by default all of the
    catalog's. Raises DoesNotFit where not even the smallest fits.
    """
    limits = limits or Limits()
    if offered is None:
        offered = {card.id: variants(card) for card in auto_family()}
    family = [card for card in auto_family() if offered.get(card.id)]
    why: list[str] = []
    for card in family:
        last = card is family[-1]
        found = _best(offered[card.id], machine, limits, known)
        if not isinstance(found, Plan):
            if last:
                raise _does_not_fit(
                    found, machine, limits, f"{catalog.BUILTIN}, the built-in model"
                )
            why.append(f"not {card.id}: {_in_words(found.nearest)}")
            continue
        well = _runs_well(found, machine)
        fast = found.tier == "gpu" or _size(card) <= SMALL_MODEL
        if (well and fast) or last:
            reason = "the best of its family that runs well here" if well else "the smallest"
            return replace(found, why=(f"{card.id}: {reason}", *why, *found.why))
        slow = f"{_size(card) / 1e9:.1f} billion parameters are slow without a GPU"
        why.append(f"not {card.id}: {slow if well else _in_words(found.chosen)}")
    asked = f" as {limits.quant}" if limits.quant else ""
    raise BadOption(f"no {AUTO_FAMILY} is offered{asked}; see gguf-embed models")


def make_plan(
    variants: Sequence[Variant],
    machine: Machine,
    limits: Limits | None = None,
    *,
    known: Sequence[MeasuredRun] = (),
) -> Plan:
    """The best of a model's variants for a machine of which `known` was measured.

    All layers on GPUs come before a better quantization. Of variants that run in the same place
    with as much room, those that are `here` come first. Among those left that leave the margin
    free, `prefer` decides. "quality" takes the best quantization. "speed" takes the fastest
    measured here of those that are as good as the best, or from Q5_K_M up where quality was not
    measured (speed not measured: a K-quant from Q5_K_M up on a CPU, the smallest on a GPU). Neither
    takes what was measured here to lose quality while there is another. "memory" takes the
    smallest. None is below Q4_K_M unless asked for. Where nothing leaves the margin free, the
    smallest is taken with a small microbatch and the plan is tight; split between GPU and CPU it is
    the smallest too,
    because each layer on the GPU counts most. Raises DoesNotFit, BadOption.
    """
    limits = limits or Limits()
    found = _best(variants, machine, limits, known)
    if isinstance(found, Plan):
        return found
    raise _does_not_fit(found, machine, limits, None)


def has_room(plan: Plan, variant: Variant, machine: Machine, limits: Limits, run: Run) -> bool:
    """Whether another run than the planned one leaves as much memory free as the plan promises.

    For settings that were measured to be fast and need not fit. A tight plan is not exceeded.
    """
    tight = plan.verdict == "tight"
    larger = run.max_batch_tokens > plan.max_batch_tokens or run.n_contexts > plan.n_contexts
    share = TIGHT_SHARE if tight else 1
    room = _Room(machine, limits, {})
    return not (tight and larger) and room.spare_bytes(variant, run, share) >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Misfit:
    """Nothing fits: the row that came nearest, and a quantization that was not acceptable."""

    model: str
    nearest: Candidate
    lower: str | None


def _best(
    variants: Sequence[Variant], machine: Machine, limits: Limits, known: Sequence[MeasuredRun]
) -> Plan | _Misfit:
    offered = _offered(variants, limits)
    acceptable = _acceptable(offered, limits)
    if limits.n_threads:
        machine = replace(machine, usable_cores=limits.n_threads)
    one = variants[0]
    shape = measured.shape_key(one.shape, one.pooling, causal=one.causal)
    room = _Room(machine, limits, measured.figures(known, shape, one.model))
    rows: list[Candidate] = []
    for tier in _tiers(machine, limits, next(iter(offered.values()))):
        found = {quant: room.candidate(variant, tier) for quant, variant in offered.items()}
        rows += found.values()
        for verdict in ("fits", "tight"):
            open_to = [found[quant] for quant in acceptable if found[quant].verdict == verdict]
            if open_to:
                held = [row for row in open_to if offered[row.quant].here]
                chosen, reason = _choose(held or open_to, limits)
                if held and len(held) < len(open_to):
                    others = " ".join(row.quant for row in open_to if row not in held)
                    reason = f"it is here; --quant fetches another that would run too: {others}"
                return _plan(offered[chosen.quant], chosen, reason, rows, room)
    return _Misfit(
        model=variants[0].model,
        nearest=min(
            (row for row in rows if row.quant in acceptable),
            key=lambda row: row.needed_bytes - row.free_bytes,
        ),
        lower=next((row.quant for row in rows if row.fits), None),
    )


def _offered(variants: Sequence[Variant], limits: Limits) -> dict[str, Variant]:
    """Those that were asked for by quantization, best quality first."""
    if limits.prefer not in PREFERENCES:
        raise BadOption(f"prefer={limits.prefer!r}: choose {', '.join(PREFERENCES)}")
    if not variants:
        raise BadOption("no file of this model is known; pass the path of a GGUF")
    longest = variants[0].shape.n_ctx_train
    if limits.n_ctx and limits.n_ctx > longest:
        raise BadOption(
            f"n_ctx={limits.n_ctx}: {variants[0].model} was trained on {longest} tokens"
        )
    offered: dict[str, Variant] = {}
    for variant in sorted(variants, key=lambda v: quants.rank(v.quant)):
        offered.setdefault(variant.quant, as_limited(variant, limits))
    if limits.quant is None:
        return offered
    quant = quants.parse(limits.quant)
    if quant not in offered:
        raise BadOption(
            f"{variants[0].model} is not offered as {quant}; choose {', '.join(offered)}"
        )
    return {quant: offered[quant]}


def as_limited(variant: Variant, limits: Limits) -> Variant:
    """The variant pooled and run as the caller wants it."""
    pooling = variant.pooling if limits.pooling is None else limits.pooling
    return replace(variant, pooling=pooling, tap=limits.tap is not False)


def _acceptable(offered: Mapping[str, Variant], limits: Limits) -> list[str]:
    """Quantizations from Q4_K_M up, and those that are here: somebody asked for them once.

    All, where the caller named one or there are no better ones.
    """
    good = [
        quant
        for quant, variant in offered.items()
        if variant.here or quants.rank(quant) <= quants.rank(quants.FLOOR)
    ]
    return list(offered) if limits.quant or not good else good


def _tiers(machine: Machine, limits: Limits, variant: Variant) -> tuple[Tier, ...]:
    """Where to try, best first."""
    asked = limits.n_gpu_layers
    if not gpus_of(machine):
        if asked:
            raise BadOption(
                f"n_gpu_layers={asked}: llama.cpp has no GPU here (backends: "
                f"{', '.join(machine.backends)}); leave the option out, or see gguf-embed probe"
            )
        return ("cpu",)
    if asked is None:
        return ("gpu", "split", "cpu")
    if asked == 0:
        return ("cpu",)
    return ("gpu",) if asked < 0 or asked > variant.shape.n_layer else ("split",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """One physical memory: what of it would be used, what is free, what of that should stay so."""

    name: str
    used_bytes: int
    free_bytes: int
    margin_bytes: int

    def spare_bytes(self, share: int = 1) -> int:
        return self.free_bytes - self.used_bytes - self.margin_bytes // share


@dataclass(frozen=True, slots=True)
class _Room:
    """A machine under the caller's limits: what fits into it, and how."""

    machine: Machine
    limits: Limits
    figures: Mapping[str, LevelFigures]  # by quantization

    def candidate(self, variant: Variant, tier: Tier) -> Candidate:
        """The variant on one tier, with as much room as there is."""
        counts = self._layer_counts(variant, tier)
        for count in counts:
            for run in self._roomy(variant, tier):
                run = replace(run, n_gpu_layers=count)
                if self.spare_bytes(variant, run) >= 0:
                    return self._row(variant, self._grown(variant, run), tier, "fits")
        # Where layers may move to the CPU instead, nothing needs to be tight.
        count, search = counts[-1], tier != "split" or len(counts) == 1
        cramped = [replace(run, n_gpu_layers=count) for run in self._cramped(variant)]
        for run in cramped if search else ():
            if self.spare_bytes(variant, run, TIGHT_SHARE) >= 0:
                return self._row(variant, run, tier, "tight")
        return self._row(variant, cramped[-1], tier, "no")

    def _layer_counts(self, variant: Variant, tier: Tier) -> Sequence[int]:
        """Values of n_gpu_layers to try, the best first."""
        n_layer = variant.shape.n_layer
        if tier != "split":
            return (n_layer + 1,) if tier == "gpu" else (0,)
        if self.limits.n_gpu_layers:
            return (self.limits.n_gpu_layers,)
        return range(n_layer, max(1, n_layer // 4) - 1, -1)  # fewer are not worth the copying

    def _roomy(self, variant: Variant, tier: Tier) -> Iterator[Run]:
        """Runs without a compromise, the best first."""
        limits = self.limits
        run = self._run(limits.n_ctx or _n_ctx_wanted(variant), BATCH_TOKENS)
        if tier != "cpu" or not variant.encoder:
            yield run
            return
        # Small models are fastest with a context per core, each with buffers of its own.
        n_tokens = limits.max_batch_tokens or BATCH_TOKENS
        n_contexts = limits.n_contexts or self.machine.usable_cores
        while n_contexts:
            yield replace(run, max_batch_tokens=n_tokens, n_contexts=n_contexts)
            n_contexts = 0 if limits.n_contexts else n_contexts // 2

    def _run(self, n_ctx: int, n_tokens: int) -> Run:
        """One context, unless the caller wants more."""
        limits = self.limits
        return Run(
            n_ctx=n_ctx,
            max_batch_tokens=limits.max_batch_tokens or n_tokens,
            n_contexts=limits.n_contexts or 1,
            flash_attn=limits.flash_attn is not False,
        )

    def _cramped(self, variant: Variant) -> Iterator[Run]:
        """Runs for tight memory, the longest context first."""
        n_ctx = self.limits.n_ctx or _n_ctx_wanted(variant)
        yield self._run(n_ctx, BATCH_TOKENS_TIGHT)
        while self.limits.n_ctx is None and n_ctx > N_CTX_LEAST:
            n_ctx = max(n_ctx // 2, N_CTX_LEAST)
            yield self._run(n_ctx, BATCH_TOKENS_TIGHT)

    def _grown(self, variant: Variant, run: Run) -> Run:
        """The longest context that leaves the margin free, by doubling; none to save memory."""
        longest = variant.shape.n_ctx_train
        if self.limits.n_ctx or self.limits.prefer == "memory":
            return run
        while run.n_ctx < longest:
            longer = replace(run, n_ctx=min(2 * run.n_ctx, longest))
            if self.spare_bytes(variant, longer) < 0:
                break
            run = longer
        return run

    def spare_bytes(self, variant: Variant, run: Run, share: int = 1) -> int:
        """Bytes left in the scarcest memory beyond 1/share of the margin; below 0: too much."""
        pools = self._pools(predict(variant, self.machine, run))
        return min(pool.spare_bytes(share) for pool in pools)

    def _pools(self, memory: Mapping[str, Memory]) -> list[_Pool]:
        """Each GPU that is used, then RAM, which holds what is on GPUs without their own memory."""
        machine, gpus = self.machine, gpus_of(self.machine)
        in_ram = [gpu.name for gpu in gpus if machine.unified_memory or gpu.kind == "igpu"]
        ram_bytes = sum(memory[name].used_bytes for name in (HOST, *in_ram))
        sizes = [(gpu.name, memory[gpu.name].used_bytes, gpu.free_bytes) for gpu in gpus]
        sizes.append(("+".join(("RAM", *in_ram)), ram_bytes, machine.ram_available_bytes))
        pools: list[_Pool] = []
        for name, used_bytes, free_bytes in sizes:
            margin_bytes = self.limits.margin_bytes
            if margin_bytes is None:
                margin_bytes = min(MARGIN_BYTES, free_bytes // MARGIN_SHARE)
            if self.limits.memory_bytes is not None:
                # What the caller keeps for others counts as left free.
                kept_bytes = max(0, free_bytes - self.limits.memory_bytes)
                free_bytes, margin_bytes = (
                    free_bytes - kept_bytes,
                    max(0, margin_bytes - kept_bytes),
                )
            if used_bytes:  # a GPU that nothing is put on has no say, full as it may be
                pools.append(
                    _Pool(
                        name=name,
                        used_bytes=used_bytes,
                        free_bytes=free_bytes,
                        margin_bytes=margin_bytes,
                    )
                )
        return pools

    def _row(self, variant: Variant, run: Run, tier: Tier, verdict: Verdict) -> Candidate:
        """The candidate with its numbers and its reason."""
        memory = predict(variant, self.machine, run)
        pools = self._pools(memory)
        pool = min(pools, key=_Pool.spare_bytes)
        left = f"{mib(pool.free_bytes - pool.used_bytes)} of {pool.name} free"
        if verdict == "no":
            reason = (
                f"needs {mib(pool.used_bytes)} of {pool.name}, {mib(pool.free_bytes)} are free, "
                f"with a context of {run.n_ctx} tokens"
            )
        elif verdict == "tight":
            reason = f"leaves only {left}, with microbatches of {run.max_batch_tokens} tokens"
        else:
            reason = f"leaves {left}"
        low = quants.rank(variant.quant) > quants.rank(quants.FLOOR)
        if low and not self.limits.quant and not variant.here:
            reason += f"; below {quants.FLOOR}: only if asked for"
        margins = {pool.name: pool.margin_bytes for pool in pools} | {HOST: pools[-1].margin_bytes}
        return Candidate(
            quant=variant.quant,
            tier=tier,
            where=_where(variant, self.machine, run),
            verdict=verdict,
            needed_bytes=pool.used_bytes,
            free_bytes=pool.free_bytes,
            reason=reason,
            run=run,
            memory={
                name: replace(part, margin_bytes=margins.get(name, 0))
                for name, part in memory.items()
            },
            measured=self._figures(variant, run),
        )

    def _figures(self, variant: Variant, run: Run) -> LevelFigures:
        """What was measured of the variant; its speed only with as many layers on GPUs."""
        found = self.figures.get(variant.quant, LevelFigures())
        n_places = variant.shape.n_layer + 1
        there, here = (
            n_places if n < 0 else min(n, n_places) for n in (found.n_gpu_layers, run.n_gpu_layers)
        )
        return found if there == here else replace(found, tokens_per_s=None)


def _n_ctx_wanted(variant: Variant) -> int:
    return min(N_CTX if variant.splits else N_CTX_WHOLE, variant.shape.n_ctx_train)


def _where(variant: Variant, machine: Machine, run: Run) -> str:
    """ "CUDA0", "CUDA0 20/37 + CPU" (layers, the output counted), "CPU"."""
    places = _places(variant.shape.n_layer, run.n_gpu_layers, gpus_of(machine))
    names = "+".join(dict.fromkeys(place for place in places if place != HOST))
    if not names:
        return HOST
    n_on_gpu = sum(place != HOST for place in places)
    return names if n_on_gpu == len(places) else f"{names} {n_on_gpu}/{len(places)} + {HOST}"


def _choose(rows: Sequence[Candidate], limits: Limits) -> tuple[Candidate, str]:
    """The one to take of rows with the same verdict, best quality first, and why."""
    smallest = min(rows, key=lambda row: sum(m.weights_bytes for m in row.memory.values()))
    first = rows[0]
    if len(rows) == 1:
        return first, "asked for" if limits.quant else "the only one that fits"
    if first.verdict == "tight":
        return smallest, "the smallest: memory is tight"
    if first.tier == "split" and limits.n_gpu_layers is None:
        most = max(rows, key=lambda row: row.run.n_gpu_layers)
        return most, "puts the most layers on the GPU"
    if limits.prefer == "memory":
        return smallest, f"the smallest of {len(rows)} that fit, from {quants.FLOOR} up"
    sound = _sound(rows)
    if limits.prefer == "quality":
        passed_over = rows[: rows.index(sound[0])]
        lost = f"; measured here to lose more: {_names(passed_over)}" if passed_over else ""
        return sound[0], f"the best quality of {len(rows)} that fit{lost}"
    return _fastest(sound)


def _fastest(rows: Sequence[Candidate]) -> tuple[Candidate, str]:
    """By measurement where two can be compared, else by what is usual."""
    good = [row for row in rows if _good_enough(row)]
    timed = [row for row in good if row.measured.tokens_per_s is not None]
    if len(timed) > 1:
        fastest = max(timed, key=lambda row: row.measured.tokens_per_s or 0.0)
        others = [row for row in good if row not in timed]
        untimed = f"; not measured: {_names(others)}" if others else ""
        speed = f"{fastest.measured.tokens_per_s:,.0f} tokens/s"
        return fastest, f"{speed}, the fastest of {len(timed)} measured here{untimed}"
    smallest = min(rows, key=lambda row: sum(m.weights_bytes for m in row.memory.values()))
    if rows[0].tier == "gpu":
        return smallest, "the smallest is the fastest on a GPU; not measured here"
    k_quants = [row for row in rows if "_K" in row.quant]
    if k_quants:
        chosen = ([row for row in k_quants if row in good] or k_quants)[-1]
        return chosen, "K-quants are the fastest on most CPUs; not measured here"
    return smallest, "the smallest; not measured here"


def _sound(rows: Sequence[Candidate]) -> Sequence[Candidate]:
    """Those not measured here to lose quality, nor, not measured, ranked below one that does.

    All, where none is left. Best quality first, as `rows` are.
    """
    found: list[Candidate] = []
    lost = False
    for row in rows:
        lost = lost or _as_good(row) is False
        if _as_good(row) is not False and (row.measured.quality is not None or not lost):
            found.append(row)
    return found or rows


def _as_good(row: Candidate) -> bool | None:
    """As the best level that was measured beside it; None where that is not known."""
    return None if row.measured.quality is None else row.measured.quality.as_good


def _good_enough(row: Candidate) -> bool:
    """For speed: measured to be as good as the best, or no worse than Q5_K_M by what is known."""
    as_good = _as_good(row)
    known = quants.rank(row.quant) <= quants.rank(quants.SPEED_FLOOR)
    return known if as_good is None else as_good


def _names(rows: Iterable[Candidate]) -> str:
    return ", ".join(row.quant for row in rows)


def _plan(
    variant: Variant, chosen: Candidate, reason: str, rows: Sequence[Candidate], room: _Room
) -> Plan:
    machine, limits = room.machine, room.limits
    run, n_places = chosen.run, variant.shape.n_layer + 1
    used = set(_places(variant.shape.n_layer, run.n_gpu_layers, gpus_of(machine)))
    n_threads = max(1, machine.usable_cores // run.n_contexts)
    return Plan(
        model=variant.model,
        quant=variant.quant,
        reason=reason,
        file=variant.file,
        tier=chosen.tier,
        verdict=chosen.verdict,
        devices=tuple(name for name in (*(g.name for g in gpus_of(machine)), HOST) if name in used),
        n_gpu_layers=run.n_gpu_layers,
        n_ctx=run.n_ctx,
        max_batch_tokens=run.max_batch_tokens,
        n_contexts=run.n_contexts,
        n_threads=n_threads,
        memory=chosen.memory,
        considered=tuple(rows),
        why=(
            f"quant {variant.quant}: {reason}{_kept(chosen)}",
            f"n_gpu_layers {run.n_gpu_layers} of {n_places}: {_why_there(chosen, machine, limits)}",
            f"n_ctx {run.n_ctx}: {_why_n_ctx(variant, chosen, limits)}",
            f"max_batch_tokens {run.max_batch_tokens}: {_why_batch(chosen, limits)}",
            f"n_contexts {run.n_contexts} x n_threads {n_threads}: "
            f"{machine.usable_cores} usable cores",
        ),
    )


def _kept(chosen: Candidate) -> str:
    """What is known of its quality, measured here or published."""
    quality = chosen.measured.quality
    if quality is not None and quality.reference != chosen.quant:
        return f"; keeps {quality}, measured here ({quality.texts})"
    percent = quants.percent(chosen.quant)
    return f"; keeps {percent:g} % of F32's retrieval ({quants.PERCENT_SOURCE})" if percent else ""


def _why_there(chosen: Candidate, machine: Machine, limits: Limits) -> str:
    if limits.n_gpu_layers is not None:
        return f"asked for; {chosen.reason}"
    if not gpus_of(machine):
        return f"llama.cpp has no GPU here; {chosen.reason}"
    if chosen.tier == "gpu":
        return f"all fit; {chosen.reason}"
    return f"more do not fit; {chosen.reason}"


def _why_n_ctx(variant: Variant, chosen: Candidate, limits: Limits) -> str:
    if limits.n_ctx:
        return "asked for"
    if chosen.run.n_ctx == variant.shape.n_ctx_train:
        return "the longest that the model takes"
    if limits.prefer == "memory":
        return "no longer, to save memory; --n-ctx gives more"
    return "twice as much does not fit"


def _why_batch(chosen: Candidate, limits: Limits) -> str:
    if limits.max_batch_tokens:
        return "asked for"
    if chosen.verdict == "tight":
        return "small, because memory is tight"
    return "larger ones gain little: attention is computed over all of it"


def _does_not_fit(
    misfit: _Misfit, machine: Machine, limits: Limits, smaller: str | None
) -> DoesNotFit:
    row = misfit.nearest
    steps = [f"--quant {misfit.lower}, at a loss of quality"] if misfit.lower else []
    steps += ["a smaller --n-ctx"] if (limits.n_ctx or 0) > N_CTX_LEAST else []
    steps += ["a larger --memory"] if limits.memory_bytes is not None else []
    steps.append(smaller or "a smaller model or quantization")
    what = f"{misfit.model} does not fit on {machine.name}: {_in_words(row)}"
    return DoesNotFit(
        f"{what}; try {', or '.join(steps)}",
        needed_bytes=row.needed_bytes,
        free_bytes=row.free_bytes,
    )


# -- smaller models ------------------------------------------------------------------------------


def _size(card: ModelCard) -> int:
    return card.parameters or 0


def _smaller(card: ModelCard) -> list[ModelCard]:
    """Smaller models of the same family, the largest first."""
    if card.family is None:
        return []
    same = [c for c in catalog.cards() if c.family == card.family and c.kind == card.kind]
    return sorted((c for c in same if _size(c) < _size(card)), key=_size, reverse=True)


def _runs_well(plan: Plan, machine: Machine) -> bool:
    """With room to spare, and on the GPU where there is one."""
    return plan.verdict == "fits" and (plan.tier == "gpu" or not gpus_of(machine))


def _first_that_runs_well(
    cards: Iterable[ModelCard],
    machine: Machine,
    limits: Limits,
    known: Sequence[MeasuredRun],
    *,
    any_quant: bool,
) -> Plan | None:
    for card in cards:
        try:
            found = _best(variants(card, any_quant=any_quant), machine, limits, known)
        except BadOption:  # it has no file in the quantization asked for, or a shorter context
            continue
        if isinstance(found, Plan) and _runs_well(found, machine):
            return found
    return None


def _in_words(row: Candidate) -> str:
    return f"{row.quant} on {row.where} {row.reason}"


def mib(n_bytes: int) -> str:
    """ "1,234 MiB"."""
    return f"{n_bytes / MIB:,.0f} MiB"
