"""Plans: predicted memory against llama.cpp's own numbers, the choices, their properties."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed import cli
from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.cli.options import size
from gguf_embed.engine.runner import Runner
from gguf_embed.errors import BadOption, DoesNotFit
from gguf_embed.gguf import layout, quants
from gguf_embed.gguf.header import read_header
from gguf_embed.lab.metrics import as_good
from gguf_embed.machine import measured
from gguf_embed.machine import probe as hardware
from gguf_embed.machine.machine import Device, Machine, machine_from_json
from gguf_embed.machine.measured import LevelFigures, LevelQuality, Loss, MeasuredRun
from gguf_embed.native.context import Context
from gguf_embed.native.model import Model
from gguf_embed.plan import rules
from gguf_embed.plan.candidate import Candidate
from gguf_embed.plan.contexts import longest_ordinary
from gguf_embed.plan.fitter import MARGIN_BYTES, N_CTX
from gguf_embed.plan.memory import MIB, Memory, gpus_of, mib, predict
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.plan import Plan, also_fits, make_plan, plan_auto, plan_for
from gguf_embed.plan.settings import (
    BATCH_TOKENS,
    PREFERENCES,
    Prefer,
    RunSettings,
    Settings,
    keep_asked,
)
from gguf_embed.plan.variants import Variant, variant_of, variants_of
from gguf_embed.vectors import Pooling

MACHINES = Path(__file__).parent / "machines"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
GIB = 2**30
QWEN = "qwen3-embedding"
NOT_ENOUGH = r"does not fit on"
Losses = tuple[float, float, float]


def card_of(name: str) -> ModelCard:
    card = catalog.find(name)
    assert card is not None
    return card


def machine_of(name: str) -> Machine:
    return machine_from_json((MACHINES / f"{name}.json").read_text())


def file_of(name: str, quant: str) -> Variant:
    return next(v for v in variants_of(card_of(name), any_quant=True) if v.quant == quant)


ALL_MACHINES = tuple(sorted(path.stem for path in MACHINES.glob("*.json")))
CPU_ONLY = machine_of("laptop-16gb-no-gpu")
ONE_GPU = machine_of("rtx-4090-24gb")


def with_ram(machine: Machine, n_bytes: int) -> Machine:
    return replace(machine, ram_total_bytes=max(n_bytes, 1), ram_available_bytes=n_bytes)


def with_gpus(machine: Machine, *free_bytes: int) -> Machine:
    """The same machine with other GPU memory, read by a process that had its driver's context."""
    gpus = (d for d in machine.devices if d.kind != "cpu")
    changed = tuple(
        replace(gpu, free_bytes=free, total_bytes=max(free, 1))
        for gpu, free in zip(gpus, free_bytes, strict=True)
    )
    cpus = tuple(d for d in machine.devices if d.kind == "cpu")
    return replace(machine, source="reading", devices=changed + cpus)


# -- predicted against llama.cpp -----------------------------------------------------------------


def write_shape(path: Path, card: ModelCard, quant: str) -> None:
    """A GGUF of the card's shape: header only, its tensor data a hole in the file."""
    shape = card.shape
    assert shape is not None
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name("sparse")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_eps(1e-12)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_pooling_type(gguf.PoolingType(card.pooling))
    writer.add_causal_attention(card.causal)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(shape.n_vocab)
    writer.add_token_type_count(shape.n_token_types)
    n_bytes = 0
    for tensor in layout.tensors(shape, quant):
        kind = gguf.GGMLQuantizationType[tensor.type]
        dims = gguf.quant_shape_to_byte_shape(tensor.shape[::-1], kind)
        writer.add_tensor_info(tensor.name, dims, np.dtype(np.uint8), tensor.n_bytes, kind)
        n_bytes += -(-tensor.n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + n_bytes)


REPORTED = (
    ("weights", re.compile(r"load_tensors: +\S+ model buffer size = +([\d.]+) MiB")),
    ("cache", re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")),
    ("compute", re.compile(r"sched_reserve: +\S+ compute buffer size = +([\d.]+) MiB")),
    ("host", re.compile(r"llama_context: +\S+ +output buffer size = +([\d.]+) MiB")),
)


@contextmanager
def reported() -> Iterator[dict[str, float]]:
    """MiB that llama.cpp reports meanwhile, by part."""
    sums: dict[str, float] = defaultdict(float)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for part, pattern in REPORTED:
                if found := pattern.search(record.getMessage()):
                    sums[part] += float(found[1])

    handler, log = Handler(), logging.getLogger("gguf_embed.llama")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield sums
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def assert_near(part: str, predicted_bytes: int, reported_mib: float) -> None:
    """5 % or 64 MiB; what is exact by construction is held to the rounding of the report."""
    off = predicted_bytes / MIB - reported_mib
    allowed = max(0.05 * reported_mib, 64) if part == "compute" else 0.1
    assert abs(off) <= allowed, f"{part}: {predicted_bytes / MIB:.1f} MiB, reported {reported_mib}"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Model]]:
    """Models loaded without memory for their weights, made on first use."""
    folder = tmp_path_factory.mktemp("shapes")

    class Models(dict[tuple[str, str], Model]):
        def __missing__(self, key: tuple[str, str]) -> Model:
            path = folder / f"{key[0]}-{key[1]}.gguf"
            write_shape(path, card_of(key[0]), key[1])
            self[key] = Model(path, no_alloc=True)
            return self[key]

    models = Models()
    yield models
    for model in models.values():
        model.close()


@pytest.mark.native
@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize(
    ("n_ctx", "n_tokens", "n_contexts"), [(1024, 512, 2), (8192, 128, 1), (300, 16, 1)]
)
@pytest.mark.parametrize(
    ("name", "quant"),
    [
        (f"{QWEN}-0.6b", "Q8_0"),
        (f"{QWEN}-0.6b", "Q4_K_M"),
        (f"{QWEN}-4b", "Q4_K_M"),
        (f"{QWEN}-4b", "F16"),
        ("gte-qwen2-1.5b-instruct", "Q8_0"),  # bidirectional with a cache
        ("bge-m3", "Q8_0"),
    ],
)
def test_contexts_take_the_memory_that_is_predicted(
    shapes: dict[tuple[str, str], Model],
    name: str,
    quant: str,
    n_ctx: int,
    n_tokens: int,
    n_contexts: int,
    flash_attn: bool,
):
    """The engine's own contexts, among them the one for a long text."""
    variant = file_of(name, quant)
    mode = variant.mode
    run = RunSettings(
        n_ctx=n_ctx,
        max_batch_tokens=n_tokens,
        n_contexts=n_contexts,
        flash_attn=flash_attn,
        tap=not mode.encoder,
    )
    with reported() as mib, Runner(shapes[name, quant], mode, run) as runs:
        if n_ctx > longest_ordinary(run, mode):
            runs.long_context(n_ctx)
    memory = predict(variant, CPU_ONLY, run)
    assert memory.keys() == {"CPU"}
    assert_near("compute", memory["CPU"].compute_bytes, mib["compute"])
    assert_near("cache", memory["CPU"].cache_bytes, mib["cache"])
    if run.tap:  # an encoder's grows at the first text: see the built-in model below
        assert_near("host", memory["CPU"].host_bytes, mib["host"])


@pytest.mark.parametrize("n_tokens", [512, 2048])
def test_the_head_of_the_pooled_path_is_counted(
    shapes: dict[tuple[str, str], Model], n_tokens: int
):
    """A reranker is pooled by llama.cpp, which computes the whole vocabulary for every token."""
    variant = file_of(f"{QWEN}-0.6b", "Q8_0")
    model, mode = shapes[f"{QWEN}-0.6b", "Q8_0"], variant.mode
    run = RunSettings(n_ctx=n_tokens, max_batch_tokens=n_tokens)
    with reported() as mib, Runner(model, mode, replace(run, tap=False)):
        pass
    reranker = replace(variant, mode=replace(mode, pooling=Pooling.RANK))
    memory = predict(reranker, CPU_ONLY, run)
    assert memory == predict(variant, CPU_ONLY, replace(run, tap=False))
    assert mib["compute"] > n_tokens * variant.shape.n_vocab * 4 / MIB
    assert_near("compute", memory["CPU"].compute_bytes, mib["compute"])
    # And copies the lot to the host, with the vectors (output_reserve in src/llama-context.cpp).
    assert memory["CPU"].host_bytes == n_tokens * (151_669 + 1024) * 4


@pytest.mark.native
def test_the_built_in_model_really_loaded():
    """In a process of its own: what llama.cpp reports, and how much the process grows."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    predicted = predict(file_of(catalog.BUILTIN, "Q8_0"), CPU_ONLY, BUILTIN_RUN)["CPU"]
    assert_near("weights", predicted.weights_bytes, seen["reported"]["weights"])
    assert_near("compute", predicted.compute_bytes, seen["reported"]["compute"])
    assert predicted.cache_bytes == 0
    # llama.cpp makes room for the vocabulary of every token, also in an encoder that has no use
    # for it: most of what the process grows by.
    assert predicted.host_bytes > predicted.used_bytes / 2
    # Beside it: the vocabulary, threads and their scratch, what malloc holds back.
    assert -8 * MIB < seen["rss_grown_bytes"] - predicted.used_bytes < 48 * MIB


BUILTIN_RUN = RunSettings(n_ctx=512, max_batch_tokens=256, n_contexts=2, tap=False)


def _run_builtin() -> None:
    """What the test above runs: every context filled once."""
    import psutil

    mode = EmbedMode(pooling=Pooling.MEAN, causal=False, encoder=True)
    rng = np.random.default_rng(0)

    def text(n_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return rng.integers(1000, 30000, n_tokens).astype(np.int32)

    with reported() as mib:
        # A first small context loads the libraries and what the process needs whatever the plan.
        model = Model(catalog.builtin_path())
        with Runner(model, mode, RunSettings(max_batch_tokens=8, tap=False)) as small:
            small.run([text(8)])
        model.close()
        mib.clear()
        process = psutil.Process()
        before = process.memory_info().rss
        # A copy in a layout of ggml's own, as on CPUs with AMX, would be reported beside the file.
        model = Model(catalog.builtin_path(), repack=False)
        with Runner(model, mode, BUILTIN_RUN) as runs:
            contexts: list[Context] = [*runs.contexts, runs.long_context(BUILTIN_RUN.n_ctx)]
            for context in contexts:
                context.run([text(min(context.n_batch, BUILTIN_RUN.n_ctx))])
            grown = process.memory_info().rss - before
        model.close()
    print(json.dumps({"reported": mib, "rss_grown_bytes": grown}))


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("name", [f"{QWEN}-0.6b", f"{QWEN}-4b", f"{QWEN}-8b"])
def test_weights_are_those_of_the_tensor_table(name: str, quant: str):
    """On a CPU each tensor once; on a GPU the token table a second time, as the output."""
    variant, card = file_of(name, quant), card_of(name)
    assert card.shape is not None
    tensors = layout.tensors(card.shape, quant)
    table = next(t.n_bytes for t in tensors if t.name == "token_embd.weight")
    run = RunSettings(n_ctx=512, max_batch_tokens=512)
    on_cpu = predict(variant, CPU_ONLY, run)
    assert on_cpu["CPU"].weights_bytes == sum(t.n_bytes for t in tensors)
    on_gpu = predict(variant, ONE_GPU, replace(run, n_gpu_layers=-1))
    assert on_gpu["CPU"].weights_bytes == table
    assert on_gpu["CUDA0"].weights_bytes == sum(t.n_bytes for t in tensors)


@pytest.mark.parametrize(
    ("quant", "weights_mib", "total_mib"), [("F16", 14434, 15888), ("Q8_0", 7669, 9123)]
)
def test_a_whole_model_on_a_gpu(quant: str, weights_mib: int, total_mib: int):
    """The 8B with 8,192 tokens of cache, counted by hand from the formulas in llama.cpp's source.

    `total_mib` is with the pooled path's logits of 512 tokens; the tapped path needs no such thing.
    """
    run = RunSettings(n_ctx=8192, max_batch_tokens=512, n_gpu_layers=37)
    memory = predict(file_of(f"{QWEN}-8b", quant), ONE_GPU, run)["CUDA0"]
    assert memory.weights_bytes / MIB == pytest.approx(weights_mib, abs=2)
    assert memory.cache_bytes / MIB == 36 * 8 * 128 * 4 * (8192 + 1024) / MIB
    tapped = memory.used_bytes - memory.overhead_bytes
    assert 0.98 * total_mib < tapped / MIB < 1.03 * total_mib


def test_layers_go_to_the_gpu_from_the_last_one():
    """The output first, then layer by layer (i_gpu_start = n_layer + 1 - n_gpu_layers)."""
    variant = file_of(f"{QWEN}-0.6b", "Q4_K_M")
    run = RunSettings(n_ctx=1024, max_batch_tokens=512)
    steps = [predict(variant, ONE_GPU, replace(run, n_gpu_layers=n)) for n in range(30)]
    assert steps[0]["CUDA0"].weights_bytes == steps[0]["CUDA0"].cache_bytes == 0
    moved = [b["CUDA0"].weights_bytes - a["CUDA0"].weights_bytes for a, b in pairwise(steps)]
    assert moved == [variant.output_bytes, *reversed(variant.layer_bytes)]
    left = [a["CPU"].weights_bytes - b["CPU"].weights_bytes for a, b in pairwise(steps)]
    # The token table stays in RAM, where it was the output as well.
    assert left == [variant.output_bytes - variant.output_copy_bytes, *moved[1:]]
    assert [step["CUDA0"].cache_bytes for step in steps[1:]] == [
        n * 8 * 128 * 4 * 1024 for n in range(29)
    ]
    # Until the last one the GPU holds one weight at a time that it computes with but does not keep.
    helped = steps[28]["CUDA0"].compute_bytes - steps[29]["CUDA0"].compute_bytes
    assert helped == variant.largest_bytes


def test_gpus_share_the_layers_by_free_memory():
    machine = with_gpus(machine_of("two-gpus"), 8 * GIB, 24 * GIB)
    run = RunSettings(n_ctx=1024, max_batch_tokens=512, n_gpu_layers=29)
    variant = file_of(f"{QWEN}-0.6b", "F16")
    memory = predict(variant, machine, run)
    per_layer = variant.layer_bytes[0]
    # llama.cpp: layer i is on the first GPU whose share of free memory, summed up, exceeds i / 29.
    assert memory["CUDA0"].weights_bytes == 8 * per_layer
    assert memory["CUDA1"].weights_bytes == 20 * per_layer + variant.output_bytes


def test_gpus_in_a_row_keep_copies_of_what_they_hand_on():
    """Four of the inputs and the hidden state (GGML_SCHED_MAX_COPIES), with no layer on the CPU."""
    variant = file_of(f"{QWEN}-0.6b", "F16")
    run = RunSettings(n_ctx=1024, max_batch_tokens=512, n_gpu_layers=29)
    one, two = (predict(variant, m, run) for m in (ONE_GPU, machine_of("two-gpus")))
    n_tokens = 520  # whole multiples of 65 sequences
    handed_on = n_tokens * (2 * 1024 + 24) + n_tokens * 1024 * 4
    for name in ("CUDA0", "CUDA1"):
        assert two[name].compute_bytes == one["CUDA0"].compute_bytes + 3 * handed_on


def test_a_gpu_that_holds_nothing_has_no_say():
    machine = with_gpus(machine_of("two-gpus"), 8 * GIB, 0)
    limits = Settings(n_gpu_layers=0, margin_bytes=GIB)
    found = plan_for(card_of(f"{QWEN}-0.6b"), machine, limits)
    assert (found.devices, found.fit) == (("CPU",), "fits")
    assert found.memory["CUDA1"].used_bytes == 0
    assert found.chosen.needed_bytes > 0


def test_a_header_gives_the_same_numbers_as_the_card():
    header = read_header(catalog.builtin_path())
    card = card_of(catalog.BUILTIN)
    of_card = file_of(catalog.BUILTIN, "Q8_0")
    of_header = variant_of(header, card=card, file=of_card.file)
    assert card.shape is not None
    assert replace(of_header, shape=card.shape) == of_card
    assert of_header.model == catalog.BUILTIN
    assert variant_of(header).model == header.name


def test_what_runs_where_nothing_was_measured():
    """All that the plan decides; test_tune starts from it."""
    four_cores = replace(CPU_ONLY, usable_cores=4)
    encoder = plan_for(card_of(catalog.BUILTIN), four_cores).run
    # A small model gains little from large microbatches: a context per core.
    assert encoder == RunSettings(
        n_ctx=512, max_batch_tokens=512, batch_tokens=256, n_contexts=4, n_threads=1, tap=False
    )
    on_gpu = plan_for(card_of(catalog.BUILTIN), replace(ONE_GPU, usable_cores=4)).run
    assert (on_gpu.batch_tokens, on_gpu.n_contexts, on_gpu.n_threads) == (512, 1, 4)
    decoder = plan_for(card_of(f"{QWEN}-0.6b"), four_cores, Settings(quant="Q8_0")).run
    assert decoder == RunSettings(n_ctx=32768, n_threads=4)
    pays = {}
    for quant in ("Q4_0", "Q8_0", "F16", "Q4_K_M", "Q6_K"):
        (made,) = (
            v for v in variants_of(card_of(f"{QWEN}-0.6b"), any_quant=True) if v.quant == quant
        )
        pays[quant] = make_plan([made], four_cores).run.repack
    assert pays == {"Q4_0": True, "Q8_0": True, "F16": True, "Q4_K_M": False, "Q6_K": False}


def test_what_the_user_said_runs():
    said = Settings(
        n_ctx=100,
        max_batch_tokens=300,
        max_batch_seqs=7,
        n_contexts=3,
        n_threads=2,
        flash_attn=False,
        repack=False,
        tap=False,
    )
    found = plan_for(card_of(catalog.BUILTIN), CPU_ONLY, said)
    assert found.run == RunSettings(
        n_ctx=100,
        max_batch_tokens=300,
        batch_tokens=300,
        max_batch_seqs=7,
        n_contexts=3,
        n_threads=2,
        flash_attn=False,
        repack=False,
        tap=False,
    )
    # Threads without contexts are cores to share out.
    cores = plan_for(card_of(catalog.BUILTIN), CPU_ONLY, Settings(n_threads=6)).run
    assert (cores.n_contexts, cores.n_threads) == (6, 1)
    # More sequences take more memory, and a causal model that is run otherwise cannot split a text.
    card = card_of(f"{QWEN}-0.6b")
    plain, wide, whole = (
        plan_for(card, CPU_ONLY, replace(Settings(quant="Q8_0", n_ctx=8192), **said))
        for said in ({}, {"max_batch_seqs": 255}, {"causal": False})
    )
    assert wide.memory["CPU"].used_bytes > plain.memory["CPU"].used_bytes
    assert whole.memory["CPU"].compute_bytes > 5 * plain.memory["CPU"].compute_bytes


def test_what_was_measured_gives_way_to_what_the_user_said():
    measured_run = RunSettings(
        n_ctx=1,
        max_batch_tokens=2,
        batch_tokens=2,
        max_batch_seqs=3,
        n_contexts=4,
        n_threads=5,
        n_gpu_layers=6,
        flash_attn=True,
        repack=True,
        tap=True,
    )
    planned = RunSettings(
        n_ctx=10,
        max_batch_tokens=20,
        batch_tokens=20,
        max_batch_seqs=30,
        n_contexts=40,
        n_threads=50,
        n_gpu_layers=60,
        flash_attn=False,
        repack=False,
        tap=False,
    )
    of_plan = {"n_ctx": 10, "n_gpu_layers": 60}  # always
    for said, kept in (
        ({}, {}),
        ({"max_batch_tokens": 20}, {"max_batch_tokens": 20, "batch_tokens": 20}),
        ({"max_batch_seqs": 30}, {"max_batch_seqs": 30}),
        ({"n_threads": 50}, {}),
        ({"n_contexts": 40}, {"n_contexts": 40, "n_threads": 50}),
        ({"flash_attn": False}, {"flash_attn": False}),
        ({"repack": False}, {"repack": False}),
        ({"tap": False}, {"tap": False}),
    ):
        found = keep_asked(measured_run, planned, Settings(**said))
        assert found == replace(measured_run, **of_plan, **kept), said
        assert Settings(**said).decide_speed is bool(said)
    assert not Settings(quant="Q8_0", n_ctx=9, n_gpu_layers=1, tune=False).decide_speed


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("n_ctx", (8.5, True, "128", [3]), "pass a whole number"),
        ("n_ctx", (2, 0, -1), "from 3, or leave it out"),
        ("n_gpu_layers", (1.0, False), "pass a whole number"),
        ("memory_bytes", (-1,), "from 0, or leave it out"),
        ("margin_bytes", (-1,), "from 0, or leave it out"),
        ("max_batch_tokens", (0,), "from 1, or leave it out"),
        ("max_batch_tokens", (1e3,), "pass a whole number"),
        ("max_batch_seqs", (0, 256), "from 1 to 255"),
        ("n_contexts", (0,), "from 1, or leave it out"),
        ("n_threads", (0,), "from 1, or leave it out"),
        ("causal", (1, "no"), "pass True or False"),
        ("flash_attn", (0,), "pass True or False"),
        ("repack", ("yes",), "pass True or False"),
        ("tap", (1,), "pass True or False"),
        ("tune", (None, 1), "pass True or False"),
        ("exact", (None, "x"), "pass True or False"),
        ("allow_smaller", (None,), "pass True or False"),
        ("prefer", ("best", None, 1), "choose quality, speed, memory"),
        ("quant", (8, b"Q8_0"), "pass a name such as"),
        ("pooling", ("mean", 1), "such as Pooling.MEAN"),
    ],
)
def test_settings_of_a_wrong_type_or_out_of_range(name: str, values: tuple[Any, ...], message: str):
    for value in values:
        with pytest.raises(BadOption, match=f"^{name}=.*{message}"):
            Settings(**{name: value})
        with pytest.raises(BadOption, match=f"^{name}=.*{message}"):
            replace(Settings(), **{name: value})


def test_numbers_and_switches_of_numpy_are_as_python_s():
    settings = Settings(n_ctx=np.int64(64), n_gpu_layers=np.int8(-1), tap=np.False_, exact=np.True_)
    assert settings == Settings(n_ctx=64, n_gpu_layers=-1, tap=False, exact=True)
    assert [type(v) for v in (settings.n_ctx, settings.tap, settings.exact)] == [int, bool, bool]


def test_qualities_are_those_that_can_be_made():
    assert {quants.FLOOR, quants.SPEED_FLOOR, *quants.USUAL} <= set(layout.QUANTS)


# -- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "quant", "devices", "verdict"),
    [
        ("rtx-4090-24gb", "F16", ("CUDA0",), "fits"),
        ("rtx-3090-24gb", "F16", ("CUDA0",), "fits"),
        ("rtx-4070ti-12gb", "Q8_0", ("CUDA0",), "fits"),
        ("wsl", "Q8_0", ("CUDA0",), "fits"),
        ("gpu-8gb", "Q4_K_M", ("CUDA0",), "tight"),
        ("m4-max-48gb", "F16", ("MTL0",), "fits"),
        ("m4-max-64gb", "F16", ("MTL0",), "fits"),
        ("two-gpus", "F16", ("CUDA0", "CUDA1"), "fits"),
        ("laptop-16gb-no-gpu", "Q8_0", ("CPU",), "fits"),
        ("cpu-2core-24gb", "Q5_K_M", ("CPU",), "fits"),
    ],
)
def test_the_8b_on_each_machine(machine: str, quant: str, devices: tuple[str, ...], verdict: str):
    found = plan_for(card_of(f"{QWEN}-8b"), machine_of(machine))
    assert (found.quant, found.devices, found.fit) == (quant, devices, verdict)
    assert found.run.n_gpu_layers == (0 if devices == ("CPU",) else 37)
    if verdict == "tight":
        assert found.run.max_batch_tokens < BATCH_TOKENS
        assert found.suggestion is not None
        assert found.suggestion.startswith(f"{QWEN}-4b (Q8_0 on CUDA0")
    else:
        assert found.run.max_batch_tokens == BATCH_TOKENS
        slow = devices == ("CPU",)
        assert ("; slow here: about " in found.in_short) == slow
        assert (f"; faster: {QWEN}-0.6b (" in found.in_short) == slow
        assert (found.suggestion is None) != slow


@pytest.mark.parametrize(
    ("machine", "smaller"), [("container-4gb", "Q5_K_M"), ("m2-air-8gb", "F16")]
)
def test_the_8b_does_not_fit_everywhere(machine: str, smaller: str):
    with pytest.raises(DoesNotFit, match=NOT_ENOUGH) as caught:
        plan_for(card_of(f"{QWEN}-8b"), machine_of(machine))
    error = caught.value
    assert error.needed_bytes > error.free_bytes > 3 * GIB
    assert f"needs {mib(error.needed_bytes)}" in str(error)
    assert f"try {QWEN}-0.6b ({smaller} on " in str(error)
    with pytest.raises(DoesNotFit, match="try a larger --memory, or a smaller model"):
        make_plan(
            variants_of(card_of(f"{QWEN}-8b")), machine_of(machine), Settings(memory_bytes=GIB)
        )


@pytest.mark.parametrize(
    ("free_gib", "quant", "verdict"),
    [
        (24.0, "F16", "fits"),
        (10.0, "Q8_0", "fits"),
        (8.5, "Q6_K", "fits"),
        (7.7, "Q5_K_M", "fits"),
        (7.0, "Q4_K_M", "fits"),
        (6.0, "Q4_K_M", "tight"),
    ],
)
def test_the_8b_by_free_memory(free_gib: float, quant: str, verdict: str):
    machine = with_gpus(ONE_GPU, int(free_gib * GIB))
    found = plan_for(card_of(f"{QWEN}-8b"), machine)
    assert (found.quant, found.tier, found.fit) == (quant, "gpu", verdict)
    left = machine.devices[0].free_bytes - found.memory["CUDA0"].used_bytes
    margin = min(GIB, machine.devices[0].free_bytes // 8)
    assert left >= margin if verdict == "fits" else margin // 4 <= left < margin


@pytest.mark.parametrize(
    ("prefer", "machine", "quant"),
    [
        ("quality", "rtx-4070ti-12gb", "Q8_0"),
        ("speed", "rtx-4070ti-12gb", "Q4_K_M"),
        ("memory", "rtx-4070ti-12gb", "Q4_K_M"),
        ("quality", "laptop-16gb-no-gpu", "Q8_0"),
        ("speed", "laptop-16gb-no-gpu", "Q5_K_M"),
        ("memory", "laptop-16gb-no-gpu", "Q4_K_M"),
    ],
)
def test_preferences(prefer: Prefer, machine: str, quant: str):
    found = plan_for(card_of(f"{QWEN}-8b"), machine_of(machine), Settings(prefer=prefer))
    assert found.quant == quant
    if prefer == "memory":
        assert found.run.n_ctx == N_CTX


# -- the rules, each with a case in which it decides ---------------------------------------------

GOOD, WORSE, OPEN = (0.001, -0.002, 0.004), (0.03, 0.02, 0.04), (0.01, -0.01, 0.03)


def judged(mean: float, low: float, high: float) -> LevelQuality:
    loss = Loss(mean=mean, low=low, high=high)
    return LevelQuality(
        reference="F16",
        texts="my texts",
        cosine=1.0,
        overlap=1.0,
        ndcg=1 - mean,
        loss=loss,
        as_good=as_good(loss, 1.0, 1000),
    )


def row_of(quant: str, weights_mib: int, **changes: Any) -> Candidate:
    row = Candidate(
        quant=quant,
        tier="cpu",
        where="CPU",
        fit="fits",
        needed_bytes=0,
        free_bytes=0,
        reason="",
        run=RunSettings(),
        memory={"CPU": Memory(weights_bytes=weights_mib * MIB)},
        measured=LevelFigures(),
    )
    return replace(row, **changes)


def fast(tokens_per_s: float) -> dict[str, LevelFigures]:
    return {"measured": LevelFigures(tokens_per_s=tokens_per_s)}


def losing(*loss: float) -> dict[str, LevelFigures]:
    return {"measured": LevelFigures(quality=judged(*loss))}


ROWS = (row_of("F16", 16), row_of("Q8_0", 8), row_of("Q6_K", 6), row_of("Q4_K_M", 4))
TIGHT = tuple(replace(row, fit="tight") for row in ROWS)
ON_GPU = tuple(replace(row, tier="gpu") for row in ROWS)
SPLIT = tuple(
    replace(row, tier="split", run=RunSettings(n_gpu_layers=n))
    for row, n in zip(ROWS, (3, 9, 12, 11), strict=True)
)
TIMED = (
    row_of("F16", 16, **fast(10)),
    row_of("Q8_0", 8, **fast(30)),
    row_of("Q6_K", 6, **fast(20)),
    row_of("Q4_K_M", 4, **fast(99)),  # below what is taken for its speed alone
)
NO_K = (row_of("F16", 16), row_of("Q8_0", 8), row_of("Q4_0", 4))
LOST = (row_of("F16", 16, **losing(*WORSE)), row_of("Q8_0", 8, **losing(*GOOD)), row_of("Q6_K", 6))


LOST_ON_GPU = tuple(replace(row, tier="gpu") for row in LOST)
# Q6_K is slow, and of F16 and Q8_0, which are about as fast, the smaller one is taken.
TOLD = tuple(
    replace(row, expected_tokens_per_s=rate)
    for row, rate in zip(ROWS, (950.0, 900.0, 500.0, 2000.0), strict=True)
)


@pytest.mark.parametrize(
    ("name", "rows", "said", "taken", "reason"),
    [
        ("the user named it", ROWS[1:2], {"quant": "Q8_0"}, "Q8_0", "asked for"),
        ("there is no other", ROWS[1:2], {}, "Q8_0", "the only one that fits"),
        ("memory is tight", TIGHT, {}, "Q4_K_M", "the smallest: memory is tight"),
        ("layers are split", SPLIT, {}, "Q6_K", "puts the most layers on the GPU"),
        ("quality is preferred", SPLIT, {"n_gpu_layers": 9}, "F16", "the best quality of 4"),
        ("memory is preferred", ROWS, {"prefer": "memory"}, "Q4_K_M", "the smallest of 4 that fit"),
        ("quality is preferred", ON_GPU, {}, "F16", "the best quality of 4 that fit"),
        ("quality is preferred", LOST_ON_GPU, {}, "Q8_0", "measured here to lose more: F16"),
        ("on a CPU the fastest", ROWS, {}, "Q6_K", "as good as F16, and the smallest; no speeds"),
        ("on a CPU the fastest", TIMED, {}, "Q8_0", "30 tokens/s, the fastest of 3 measured here"),
        ("on a CPU the fastest", LOST, {}, "Q8_0", "the only one as good as the best of 3"),
        (
            "on a CPU the fastest",
            TOLD,
            {},
            "Q8_0",
            "and fast on such a CPU: about 900",
        ),
        ("speeds were measured", TIMED, {"prefer": "speed"}, "Q8_0", "the fastest of 3 measured"),
        ("on a GPU the smallest", ON_GPU, {"prefer": "speed"}, "Q4_K_M", "fastest on a GPU"),
        ("on a CPU K-quants", ROWS, {"prefer": "speed"}, "Q6_K", "K-quants are the fastest"),
        ("nothing is known", NO_K, {"prefer": "speed"}, "Q4_0", "the smallest; not measured"),
    ],
)
def test_a_rule_decides(
    name: str, rows: tuple[Candidate, ...], said: dict[str, Any], taken: str, reason: str
):
    settings = Settings(**said)
    assert rules.rule_for(rules.Rivals(rows, settings)).name.startswith(name)
    row, why = rules.pick(rows, settings)
    assert row.quant == taken
    assert reason in why


def test_every_rule_has_a_case():
    marks: list[Any] = test_a_rule_decides.pytestmark  # pyright: ignore[reportFunctionMemberAccess]
    names = {case[0] for mark in marks for case in mark.args[1]}
    for rule in rules.RULES:
        assert any(rule.name.startswith(name) for name in names), rule.name


# -- what was measured ---------------------------------------------------------------------------

SPEEDS = {"F16": 180.0, "Q8_0": 181.0, "Q6_K": 345.0, "Q5_K_M": 344.0, "Q4_K_M": 358.0}
FAST = Settings(prefer="speed")


def measured_run(
    name: str, speeds: Mapping[str, float], losses: Mapping[str, Losses] | None = None
) -> MeasuredRun:
    """As a bench of the model keeps it, on the CPU; of `losses` mean, low and high."""
    card = card_of(name)
    assert card.shape is not None
    losses = losses or {}
    return MeasuredRun(
        model=card.id,
        shape=measured.shape_key(card.shape, card.pooling, causal=card.causal),
        by="bench",
        texts_sha256="",
        day="2026-09-30",
        levels={
            quant: LevelFigures(
                tokens_per_s=speeds.get(quant),
                quality=judged(*losses[quant]) if quant in losses else None,
            )
            for quant in {**speeds, **losses}
        },
    )


def choice(known: MeasuredRun, limits: Settings, machine: Machine = CPU_ONLY) -> Plan:
    return plan_for(card_of(f"{QWEN}-0.6b"), machine, limits, known=[known])


def test_measured_speed_decides_where_speed_is_preferred():
    found = choice(measured_run(f"{QWEN}-0.6b", SPEEDS), FAST)
    assert found.quant == "Q6_K"  # Q4_K_M is below Q5_K_M, and its quality was not measured
    assert found.why[0].startswith("quant Q6_K: 345 tokens/s, the fastest of 4 measured here")
    assert found.chosen.known == "345 tokens/s"
    on_cpu = choice(measured_run(f"{QWEN}-0.6b", SPEEDS), Settings())
    assert on_cpu.quant == "Q6_K"  # as good as the best, by the published figures
    assert choice(measured_run(f"{QWEN}-0.6b", SPEEDS | {"Q6_K": 300.0}), FAST).quant == "Q5_K_M"


def test_one_measured_level_is_no_comparison():
    found = choice(measured_run(f"{QWEN}-0.6b", {"Q8_0": 181.0}), FAST)
    assert found.quant == plan_for(card_of(f"{QWEN}-0.6b"), CPU_ONLY, FAST).quant == "Q5_K_M"
    some = choice(measured_run(f"{QWEN}-0.6b", {"F16": 180.0, "Q8_0": 181.0}), FAST)
    assert "fastest of 2 measured here; not measured: Q6_K, Q5_K_M" in some.why[0]


def test_measured_quality_opens_a_level_and_closes_one():
    for losses, quant in (
        ({"Q4_K_M": GOOD}, "Q4_K_M"),
        ({"Q4_K_M": OPEN}, "Q6_K"),  # open: the rank decides
        ({"Q6_K": OPEN}, "Q6_K"),
        ({"Q6_K": WORSE}, "Q8_0"),  # what is lower and was not measured is no better
        ({"Q6_K": WORSE, "Q5_K_M": GOOD}, "Q5_K_M"),
        ({"Q6_K": WORSE, "Q5_K_M": WORSE, "Q8_0": WORSE}, "F16"),
    ):
        known = measured_run(f"{QWEN}-0.6b", SPEEDS, {"F16": (0, 0, 0), **losses})
        assert choice(known, FAST).quant == quant, losses
    found = choice(measured_run(f"{QWEN}-0.6b", SPEEDS, {"Q4_K_M": GOOD}), FAST)
    assert "keeps 99.9 % of F16's nDCG@10, measured here (my texts)" in found.why[0]
    assert "published" not in found.why[0]


def test_no_measurement_goes_below_the_floor():
    speeds = SPEEDS | {"Q2_K": 900.0, "Q3_K_M": 800.0}
    known = measured_run(f"{QWEN}-0.6b", speeds, {"Q2_K": GOOD, "Q3_K_M": GOOD, "Q4_K_M": GOOD})
    for prefer in PREFERENCES:
        assert quants.rank(choice(known, Settings(prefer=prefer)).quant) <= quants.rank(
            quants.FLOOR
        )
    assert choice(known, replace(FAST, quant="Q2_K")).quant == "Q2_K"


def test_quality_passes_over_what_was_measured_to_lose():
    known = measured_run(f"{QWEN}-0.6b", SPEEDS, {"F16": WORSE, "Q8_0": GOOD})
    found = choice(known, Settings(), ONE_GPU)
    assert found.quant == "Q8_0"
    assert "measured here to lose more: F16; keeps 99.9 % of F16's nDCG@10" in found.why[0]
    found = choice(known, Settings())
    assert found.quant == "Q8_0"
    assert "the only one as good as the best of 5 that fit; keeps 99.9 %" in found.why[0]
    all_worse = measured_run(f"{QWEN}-0.6b", SPEEDS, dict.fromkeys(SPEEDS, WORSE))
    assert choice(all_worse, Settings()).quant == "F16"


def test_a_speed_counts_where_it_was_measured():
    """Measured with all layers on the CPU, it says nothing about the GPU."""
    known = measured_run(f"{QWEN}-0.6b", SPEEDS, {"Q4_K_M": GOOD})
    assert "not measured here" in choice(known, FAST, ONE_GPU).why[0]
    on_cpu = choice(known, replace(FAST, n_gpu_layers=0), ONE_GPU)
    assert "358 tokens/s" in on_cpu.why[0]
    levels = {q: replace(one, n_gpu_layers=-1) for q, one in known.levels.items()}
    on_gpu = choice(replace(known, levels=levels), FAST, ONE_GPU)
    assert (on_gpu.tier, on_gpu.quant) == ("gpu", "Q4_K_M")
    assert "358 tokens/s" in on_gpu.why[0]


def test_another_models_figures_do_not_count():
    other = measured_run(f"{QWEN}-4b", SPEEDS, {"F16": WORSE})
    assert choice(other, FAST) == plan_for(card_of(f"{QWEN}-0.6b"), CPU_ONLY, FAST)
    # A fine-tune of the same shape is as fast, and may be as good or not.
    tuned = replace(measured_run(f"{QWEN}-0.6b", SPEEDS, {"Q6_K": WORSE}), model="fine-tune")
    assert choice(tuned, FAST).quant == "Q6_K"


def test_auto_and_smaller_models_know_what_was_measured():
    known = [measured_run(f"{QWEN}-0.6b", SPEEDS)]
    found = plan_auto(machine_of("cpu-2core-24gb"), FAST, known=known)
    assert (found.model, found.quant) == (f"{QWEN}-0.6b", "Q6_K")
    limits = replace(FAST, allow_smaller=True, memory_bytes=2 * GIB)
    smaller = plan_for(card_of(f"{QWEN}-8b"), CPU_ONLY, limits, known=known)
    assert (smaller.model, smaller.quant) == (f"{QWEN}-0.6b", "Q6_K")


# -- limits --------------------------------------------------------------------------------------


def test_files_below_the_floor_are_shown_but_not_chosen():
    card = card_of(f"{QWEN}-0.6b")  # it has a Q2_K and a Q3_K_M
    found = plan_for(card, CPU_ONLY, Settings(prefer="memory"))
    assert found.quant == "Q4_K_M"
    row = next(row for row in found.considered if row.quant == "Q2_K")
    assert row.fits
    assert row.reason.endswith("below Q4_K_M: only if asked for")
    assert plan_for(card, CPU_ONLY, Settings(quant="q2_k")).quant == "Q2_K"


def test_of_two_files_in_one_quantization_the_first_counts():
    card = card_of(f"{QWEN}-0.6b")
    first = file_of(card.id, "Q8_0")
    other = replace(first, layer_bytes=(0,) * 28)
    found = make_plan([first, other], CPU_ONLY)
    assert found.memory["CPU"].weights_bytes == first.input_bytes + sum(first.layer_bytes) + 4096


def test_a_lower_quality_is_offered_where_nothing_else_fits():
    lower = Settings(memory_bytes=650 * MIB)
    with pytest.raises(DoesNotFit, match=r"try --quant Q3_K_M, at a loss of quality, or a larger"):
        plan_for(card_of(f"{QWEN}-0.6b"), CPU_ONLY, lower)
    found = plan_for(card_of(f"{QWEN}-0.6b"), CPU_ONLY, replace(lower, quant="Q3_K_M"))
    assert (found.quant, found.fit) == ("Q3_K_M", "tight")


def test_any_quantization_can_be_planned():
    card = card_of("multilingual-e5-large-instruct")  # Q8_0 and Q6_K
    machine = with_ram(replace(CPU_ONLY, usable_cores=1), 2 * GIB)
    assert plan_for(card, machine, Settings(prefer="memory")).quant == "Q6_K"
    made = plan_for(card, machine, Settings(prefer="memory"), any_quant=True)
    assert (made.quant, made.file) == ("Q4_K_M", None)


def test_layers_are_split_where_the_gpu_is_too_small():
    found = plan_for(card_of(f"{QWEN}-8b"), with_gpus(ONE_GPU, 4 * GIB))
    assert (found.tier, found.quant, found.devices) == ("split", "Q4_K_M", ("CUDA0", "CPU"))
    assert 9 <= found.run.n_gpu_layers < 37
    one_more = replace(found.chosen.run, n_gpu_layers=found.run.n_gpu_layers + 1, n_ctx=N_CTX)
    variant = file_of(f"{QWEN}-8b", "Q4_K_M")
    machine = with_gpus(ONE_GPU, 4 * GIB)
    assert also_fits(found, variant, machine, Settings(), found.chosen.run)
    assert not also_fits(found, variant, machine, Settings(), one_more)
    assert found.suggestion is not None
    assert found.suggestion.startswith(f"{QWEN}-0.6b")
    # A layer or two are not worth their copies. The GPU still helps, one weight at a time, and has
    # no room for the largest of F16 in each context.
    hardly = plan_for(card_of(f"{QWEN}-8b"), with_gpus(ONE_GPU, 2 * GIB))
    assert (hardly.tier, hardly.quant) == ("cpu", "Q5_K_M")


def test_the_caller_decides():
    card, machine = card_of(f"{QWEN}-4b"), ONE_GPU
    limits = Settings(quant="Q6_K", n_ctx=3000, max_batch_tokens=1024, n_gpu_layers=10)
    found = plan_for(card, machine, limits)
    assert (found.quant, found.run.n_ctx, found.run.max_batch_tokens) == ("Q6_K", 3000, 1024)
    assert (found.run.n_gpu_layers, found.tier, found.devices) == (10, "split", ("CUDA0", "CPU"))
    assert sum("asked for" in why for why in found.why) == 4
    fewer = Settings(n_gpu_layers=10, prefer="memory")
    assert plan_for(card, machine, fewer).quant == "Q4_K_M"
    assert plan_for(card, machine, Settings(n_gpu_layers=0)).devices == ("CPU",)
    assert plan_for(card, machine, Settings(n_gpu_layers=-1)).run.n_gpu_layers == 37
    assert plan_for(card, machine, Settings(n_gpu_layers=99)).run.n_gpu_layers == 37


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Settings(quant="Q7"),
            "is not offered as Q7; choose F16, Q8_0, Q6_K, Q5_K_M, Q5_0, Q4_K_M",
        ),
        (Settings(n_ctx=50_000), "n_ctx=50000: qwen3-embedding-4b was trained on 40960 tokens"),
        (Settings(n_gpu_layers=1), "llama.cpp has no GPU here"),
    ],
)
def test_what_cannot_be_had_is_refused(limits: Settings, message: str):
    with pytest.raises(BadOption, match=re.escape(message)):
        plan_for(card_of(f"{QWEN}-4b"), CPU_ONLY, limits)


def test_no_layout_no_guess():
    with pytest.raises(BadOption, match="no layout for architecture 'nomic-bert'"):
        plan_for(card_of("nomic-embed-text-v1.5"), CPU_ONLY)
    with pytest.raises(BadOption, match="its shape is not known"):
        plan_for(card_of("nomic-embed-text-v2-moe"), CPU_ONLY)


@pytest.mark.parametrize(
    ("machine", "model"),
    [
        ("rtx-4090-24gb", f"{QWEN}-8b"),
        ("m4-max-48gb", f"{QWEN}-8b"),
        ("gpu-8gb", f"{QWEN}-4b"),
        ("m2-air-8gb", f"{QWEN}-0.6b"),
        ("cpu-2core-24gb", f"{QWEN}-0.6b"),  # the 8B would fit, and take minutes for a page
        ("container-4gb", f"{QWEN}-0.6b"),
    ],
)
def test_auto_takes_what_runs_well(machine: str, model: str):
    found = plan_auto(machine_of(machine))
    assert (found.model, found.fit) == (model, "fits")
    assert found.why[0] == f"{model}: the best of its family that runs well here"


def test_a_limit_is_not_cut_further():
    """What the caller keeps for others is margin enough."""
    card = card_of(f"{QWEN}-8b")
    free = plan_for(card, ONE_GPU, Settings(quant="Q8_0", n_ctx=8192))
    needed = free.memory["CUDA0"].used_bytes
    exact = Settings(quant="Q8_0", n_ctx=8192, memory_bytes=needed)
    assert plan_for(card, ONE_GPU, exact).fit == "fits"
    less = plan_for(card, ONE_GPU, replace(exact, memory_bytes=needed - 1))
    assert less.fit == "tight"
    close = replace(exact, memory_bytes=ONE_GPU.devices[0].free_bytes)
    assert plan_for(card, ONE_GPU, close).memory["CUDA0"].margin_bytes == MARGIN_BYTES


def test_auto_ends_at_the_smallest():
    tight = plan_auto(with_ram(CPU_ONLY, GIB))
    assert (tight.model, tight.fit) == (f"{QWEN}-0.6b", "tight")
    with pytest.raises(DoesNotFit, match="all-minilm-l6-v2, the built-in model"):
        plan_auto(with_ram(CPU_ONLY, GIB // 2))


def test_a_smaller_model_only_when_asked():
    card, machine = card_of(f"{QWEN}-8b"), machine_of("gpu-8gb")
    assert plan_for(card, machine).model == card.id
    found = plan_for(card, machine, Settings(allow_smaller=True))
    assert (found.model, found.quant, found.fit) == (f"{QWEN}-4b", "Q8_0", "fits")
    assert found.why[0].startswith(f"{QWEN}-4b: {card.id} Q4_K_M on CUDA0 leaves only ")
    roomy = plan_for(card, machine_of("rtx-4090-24gb"), Settings(allow_smaller=True))
    assert roomy.model == card.id
    tiny = plan_for(card, machine_of("container-4gb"), Settings(allow_smaller=True))
    assert tiny.model == f"{QWEN}-0.6b"


def test_a_process_with_its_driver_does_not_pay_for_it_twice():
    run = RunSettings(n_ctx=512, max_batch_tokens=512, n_gpu_layers=-1)
    variant = file_of(f"{QWEN}-0.6b", "Q8_0")
    described = predict(variant, ONE_GPU, run)
    read = predict(variant, replace(ONE_GPU, source="reading"), run)
    assert described["CUDA0"].overhead_bytes == 457 * MIB
    assert read["CUDA0"].overhead_bytes == read["CPU"].overhead_bytes == 0
    assert replace(described["CUDA0"], overhead_bytes=0) == read["CUDA0"]


def test_ram_holds_what_is_on_an_integrated_gpu():
    """With RAM for half of it, the GPU's own 32 GiB do not help."""
    igpu = Device(
        name="Vulkan0",
        description="Graphics",
        backend="Vulkan",
        kind="igpu",
        free_bytes=32 * GIB,
        total_bytes=32 * GIB,
        device_id=None,
    )
    machine = replace(with_ram(CPU_ONLY, 10 * GIB), devices=(igpu, *CPU_ONLY.devices))
    found = plan_for(card_of(f"{QWEN}-8b"), machine)
    assert (found.quant, found.devices) == ("Q6_K", ("Vulkan0",))
    row = next(row for row in found.considered if row.quant == "F16")
    assert (row.fit, row.free_bytes) == ("no", 10 * GIB)
    assert "of RAM+Vulkan0" in row.reason


def test_ram_holds_what_is_on_a_mac():
    machine = with_ram(machine_of("m4-max-48gb"), 10 * GIB)
    found = plan_for(card_of(f"{QWEN}-8b"), machine)
    assert (found.quant, found.devices, found.fit) == ("Q6_K", ("MTL0",), "fits")
    assert "of RAM+MTL0" in found.chosen.reason


def test_encoders_get_a_context_per_core_where_they_fit():
    card = card_of("bge-m3")  # 250,002 tokens: 488 MiB of output buffer for each context
    many = plan_for(card, replace(CPU_ONLY, usable_cores=16), Settings(quant="Q8_0"))
    assert (many.run.n_contexts, many.run.n_threads, many.run.max_batch_tokens) == (8, 2, 512)
    few = plan_for(
        card, with_ram(replace(CPU_ONLY, usable_cores=16), 5 * GIB), Settings(quant="Q8_0")
    )
    assert (few.run.n_contexts, few.run.n_threads) == (2, 8)
    on_gpu = plan_for(card, ONE_GPU)
    assert (on_gpu.run.n_contexts, on_gpu.run.n_ctx, on_gpu.devices) == (1, 8192, ("CUDA0",))
    assert on_gpu.memory["CPU"].host_bytes > 7 * GIB  # 8,192 tokens x vocabulary, in RAM


# -- properties ----------------------------------------------------------------------------------

CARDS = tuple(
    card
    for card in catalog.cards()
    if card.kind == "embedder" and card.files
    if card.shape and card.architecture in layout.ARCHITECTURES
)
sizes = st.integers(0, 40 * GIB)
limits_ = st.builds(
    Settings,
    n_ctx=st.none() | st.integers(3, 512),
    max_batch_tokens=st.none() | st.integers(1, 4096),
    memory_bytes=st.none() | st.integers(0, 32 * GIB),
    margin_bytes=st.none() | st.integers(0, 4 * GIB),
    prefer=st.sampled_from(PREFERENCES),
)
gpu_layers = st.none() | st.integers(-1, 40)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    machine = machine_of(draw(st.sampled_from(ALL_MACHINES)))
    machine = with_ram(replace(machine, usable_cores=draw(st.integers(1, 16))), draw(sizes))
    n_gpus = sum(device.kind != "cpu" for device in machine.devices)
    return with_gpus(machine, *(draw(sizes) for _ in range(n_gpus)))


losses = st.sampled_from([GOOD, WORSE, OPEN])


@st.composite
def known_figures(draw: st.DrawFn, card: ModelCard) -> list[MeasuredRun]:
    """Nothing, or anything, measured of the card's quantizations, on one device or another."""
    quants = st.sampled_from([file.quant for file in card.files] + ["Q3_K_M"])
    of_card = measured_run(
        card.id,
        draw(st.dictionaries(quants, st.floats(1, 1e6))),
        draw(st.dictionaries(quants, losses)),
    )
    n_gpu_layers = draw(st.sampled_from([0, -1]))
    levels = {q: replace(one, n_gpu_layers=n_gpu_layers) for q, one in of_card.levels.items()}
    return [replace(of_card, levels=levels)]


def try_plan(
    card: ModelCard, machine: Machine, limits: Settings, known: Sequence[MeasuredRun] = ()
) -> Plan | None:
    try:
        return make_plan(variants_of(card), machine, limits, known=known)
    except DoesNotFit:
        return None


def used(machine: Machine, memory: dict[str, Memory]) -> Iterator[tuple[int, int]]:
    """(used, free) of each physical memory, counted anew."""
    in_ram = memory["CPU"].used_bytes
    for gpu in gpus_of(machine):
        n_bytes = memory[gpu.name].used_bytes
        yield n_bytes, gpu.free_bytes
        in_ram += n_bytes if machine.unified_memory or gpu.kind == "igpu" else 0
    yield in_ram, machine.ram_available_bytes


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CARDS), machines(), limits_, gpu_layers, st.data())
def test_never_over_budget_and_always_with_reasons(
    card: ModelCard,
    machine: Machine,
    limits: Settings,
    n_gpu_layers: int | None,
    data: st.DataObject,
):
    known = data.draw(known_figures(card))
    if gpus_of(machine):
        limits = replace(limits, n_gpu_layers=n_gpu_layers)
    found = try_plan(card, machine, limits, known)
    if found is None:
        return
    assert found == try_plan(card, machine, limits, known)
    offered = {file.quant for file in card.files}
    if any(quants.rank(quant) <= quants.rank(quants.FLOOR) for quant in offered):
        assert quants.rank(found.quant) <= quants.rank(quants.FLOOR)
    for n_used, n_free in used(machine, dict(found.memory)):
        assert n_used <= n_free
        assert not n_used or n_used <= (
            n_free if limits.memory_bytes is None else limits.memory_bytes
        )
        if found.fit == "fits" and limits.margin_bytes and n_used:
            assert n_used + limits.margin_bytes <= n_free
    assert found.memory == {
        name: replace(part, margin_bytes=found.memory[name].margin_bytes)
        for name, part in predict(
            next(v for v in variants_of(card) if v.quant == found.quant),
            machine,
            found.run,
        ).items()
    }
    choices = ["quant", "n_gpu_layers", "n_ctx", "max_batch_tokens", "n_contexts"]
    told = [why.split()[0] for why in found.why]
    assert told in (choices, [*choices, "speed:"])  # of large models on a known kind of CPU
    assert all(re.fullmatch(r"\S.*: \S.+", why) for why in found.why)
    assert all(row.reason for row in found.considered)
    assert found.chosen.fit == found.fit != "no"
    run = found.run
    assert run.n_threads * run.n_contexts <= max(machine.usable_cores, run.n_contexts)
    assert run.batch_tokens <= run.max_batch_tokens
    assert len({(row.quant, row.tier) for row in found.considered}) == len(found.considered)
    if limits.n_gpu_layers is None:  # layers move to the CPU before it gets tight
        assert all(row.fit != "tight" for row in found.considered if row.tier == "split")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CARDS), machines(), limits_, sizes, sizes, st.data())
def test_more_memory_never_plans_worse(
    card: ModelCard,
    machine: Machine,
    limits: Settings,
    more_ram: int,
    more_gpu: int,
    data: st.DataObject,
):
    """Several GPUs grow together: llama.cpp shares layers out by free memory, so that more on one
    alone moves whole layers there."""
    known = data.draw(st.just([]) | known_figures(card))
    limits = replace(limits, prefer="quality")
    before = try_plan(card, machine, limits, known)
    if before is None:
        return
    gpus = [device for device in machine.devices if device.kind != "cpu"]
    factor = 1 + more_gpu / (8 * GIB)
    if len(gpus_of(machine)) > 1:
        grown = [int(gpu.free_bytes * factor) for gpu in gpus]
        if (
            len(
                {
                    g * gpus[0].free_bytes == grown[0] * d.free_bytes
                    for g, d in zip(grown, gpus, strict=True)
                }
            )
            > 1
        ):
            return
    else:
        grown = [gpu.free_bytes + more_gpu for gpu in gpus]
    more = with_gpus(with_ram(machine, machine.ram_available_bytes + more_ram), *grown)
    after = try_plan(card, more, limits, known)
    assert after is not None
    assert after.rank[0] >= before.rank[0]
    if not known or sound(before):
        assert after.rank >= before.rank
        assert after.rank[0] > before.rank[0] or not sound(before) or sound(after)
        if after.tier == before.tier:
            assert quants.rank(after.quant) <= quants.rank(before.quant)


def sound(found: Plan) -> bool:
    """Chosen for its quality, which was measured and is not known to be lost."""
    quality = found.chosen.measured.quality
    roomy = found.fit == "fits" and found.tier != "split"
    return roomy and quality is not None and quality.as_good is not False


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.sampled_from(CARDS), sizes, sizes, st.data())
def test_more_memory_never_plans_slower(card: ModelCard, ram: int, more: int, data: st.DataObject):
    """Where the speed of every level was measured."""
    quants = {file.quant for file in card.files}
    speeds = data.draw(st.fixed_dictionaries(dict.fromkeys(quants, st.floats(1, 1e6))))
    known = [measured_run(card.id, speeds)]
    before = try_plan(card, with_ram(CPU_ONLY, ram), FAST, known)
    if before is None or not fast_enough(before):
        return
    after = try_plan(card, with_ram(CPU_ONLY, ram + more), FAST, known)
    assert after is not None
    assert speeds[after.quant] >= speeds[before.quant]


def fast_enough(found: Plan) -> bool:
    """It was chosen by speed: with room, and of more than one."""
    return "the fastest of" in found.why[0]


# -- documents and measurements ------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_of_plans_is_up_to_date():
    import plans

    made = (BENCHMARKS.parent / "docs" / "plans.md").read_text("utf-8")
    assert made == plans.document(), "run: python benchmarks/plans.py docs/plans.md"


def test_reports_are_summed_by_device():
    """Buffers as llama.cpp names them on machines that are not here."""
    from memory import Reports

    reports = Reports()
    for line in (
        "load_tensors:   CPU_Mapped model buffer size =   486.01 MiB",
        "load_tensors:        CUDA0 model buffer size =  4453.99 MiB",
        "load_tensors:  MTL0_Mapped model buffer size =  1136.48 MiB",
        "llama_kv_cache:      CUDA1 KV buffer size =   576.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =   112.02 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =    16.02 MiB",
        "sched_reserve:        CPU compute buffer size =     1.00 MiB",
    ):
        reports.emit(logging.makeLogRecord({"msg": line}))
    assert reports.mib == {
        ("CPU", "weights"): 486.01,
        ("CUDA0", "weights"): 4453.99,
        ("MTL0", "weights"): 1136.48,
        ("CUDA1", "cache"): 576.0,
        ("CUDA0", "compute"): 112.02,
        ("CPU", "compute"): pytest.approx(17.02),
    }


# -- command line --------------------------------------------------------------------------------

RunPlan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> RunPlan:
    """`gguf-embed plan` with these arguments, on a machine that holds no models."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))

    def run(*args: object) -> tuple[int, str, str]:
        code = cli.main(["plan", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def on(machine: str) -> tuple[str, Path]:
    return "--machine", MACHINES / f"{machine}.json"


def test_the_command_shows_what_was_considered(run_plan: RunPlan):
    code, out, err = run_plan(f"{QWEN}-8b", *on("gpu-8gb"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{QWEN}-8b on gpu-8gb (from public specifications)"
    assert lines[2].split() == ["quant", "where", "n_ctx", "needed", "free", "verdict", "reason"]
    rows = [line.split()[0] for line in lines[3:9]]
    assert rows == ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M"]
    assert re.match(
        r"F16 +CUDA0 +512 +15,\d{3} MiB +7,168 MiB +no +needs 15,\d{3} MiB of", lines[3]
    )
    assert re.match(r"Q4_K_M +CUDA0 +8192 +6,\d{3} MiB +7,168 MiB +tight +leaves only", lines[8])
    assert "chosen: Q4_K_M on CUDA0, tight" in lines
    assert "  max_batch_tokens 128: small, because memory is tight" in lines
    assert re.search(r"^CUDA0 +4,454 MiB +1,\d{3} MiB .* 457 MiB", out, re.MULTILINE)
    assert lines[-1].startswith(f"more room: {QWEN}-4b (Q8_0 on CUDA0 leaves ")


def test_the_command_gives_json(run_plan: RunPlan):
    code, out, _ = run_plan(f"{QWEN}-4b", *on("m4-max-48gb"), "--json")
    assert code == 0
    made = json.loads(out)
    assert (made["machine"], made["model"], made["quant"]) == ("m4-max-48gb", f"{QWEN}-4b", "F16")
    assert made["file"]["name"] == "Qwen3-Embedding-4B-f16.gguf"
    assert made["n_gpu_layers"] == 37
    assert [row["quant"] for row in made["considered"]][-1] == "Q4_K_M"
    assert made["memory"]["MTL0"]["weights_bytes"] > 7 * GIB


def test_the_command_knows_what_was_measured_here(run_plan: RunPlan):
    for machine in (hardware.probe(), CPU_ONLY):
        known = measured_run("bge-m3", SPEEDS, {"F16": (0, 0, 0), "Q8_0": GOOD})
        measured.keep(known, machine.usable_cores)
    code, out, _ = run_plan("bge-m3", "--any-quant", "--prefer", "speed", "--n-gpu-layers", 0)
    assert code == 0
    row = r"^Q8_0 .*; measured here: 181 tokens/s, 99\.9 % of F16's nDCG@10$"
    assert re.search(row, out, re.MULTILINE)
    assert "quant Q6_K: 345 tokens/s, the fastest of 4 measured here; not measured: " in out
    code, out, _ = run_plan("bge-m3", *on("laptop-16gb-no-gpu"), "--any-quant", "--prefer", "speed")
    assert code == 0
    assert "tokens/s" not in out


@pytest.mark.parametrize(
    ("args", "chosen"),
    [
        (("auto", *on("gpu-8gb")), "qwen3-embedding-4b Q8_0 8192"),
        (("qwen3-embedding:8b", *on("gpu-8gb"), "--allow-smaller"), "qwen3-embedding-4b Q8_0 8192"),
        (("Qwen/Qwen3-Embedding-8B-GGUF", *on("wsl")), "qwen3-embedding-8b Q8_0 8192"),
        (
            ("qwen3-embedding-8b", *on("wsl"), "--prefer", "speed"),
            "qwen3-embedding-8b Q4_K_M 32768",
        ),
        (("qwen3-embedding-8b:Q6_K", *on("wsl")), "qwen3-embedding-8b Q6_K 16384"),
        (("qwen3-embedding-8b", *on("wsl"), "--memory", "6GiB"), "qwen3-embedding-8b Q4_K_M 4096"),
        (("qwen3-embedding-8b", *on("wsl"), "--n-ctx", 999), "qwen3-embedding-8b Q8_0 999"),
        (
            ("multilingual-e5-large", "--any-quant", "--quant", "q2_k"),
            "multilingual-e5-large Q2_K 512",
        ),
        ((catalog.builtin_path(),), "all-minilm-l6-v2 Q8_0 512"),
    ],
)
def test_the_options_reach_the_plan(run_plan: RunPlan, args: tuple[object, ...], chosen: str):
    code, out, err = run_plan(*args, "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert f"{made['model']} {made['quant']} {made['n_ctx']}" == chosen


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((f"{QWEN}-8b", *on("m2-air-8gb")), 5, NOT_ENOUGH),
        ((f"{QWEN}-8b", "--machine", "absent.json"), 2, "absent.json: cannot be read"),
        ((f"{QWEN}-8b", "--machine", __file__), 2, "test_plan.py: machine description: not JSON"),
        (("qwen4-embedding",), 4, "Did you mean qwen3-embedding"),
        ((f"{QWEN}-8b", *on("wsl"), "--quant", "Q7"), 4, "has no Q7; it has: F16, Q8_0 (7,"),
        ((catalog.builtin_path(), "--any-quant"), 2, "name a file"),
    ],
)
def test_the_command_says_what_is_wrong(
    run_plan: RunPlan, args: tuple[object, ...], code: int, message: str
):
    found, out, err = run_plan(*args)
    assert (found, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("123", 123),
        ("6GiB", 6 * GIB),
        ("6g", 6 * GIB),
        ("1.5 MiB", 3 * MIB // 2),
        ("2GB", 2 * 10**9),
    ],
)
def test_sizes(text: str, n_bytes: int):
    assert size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "6 apples", "-1", "GiB", "1e9", "6GG"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        size(text)


if __name__ == "__main__":
    _run_builtin()
