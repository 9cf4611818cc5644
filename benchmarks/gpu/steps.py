"""What `run.py` measures on a GPU machine, each step a process of its own.

    python benchmarks/gpu/steps.py STEP [ARGUMENT ...]

A step prints lines that start with "@": JSON objects, each a part of its result. Whatever it had
printed counts, also where it then dies or runs out of time. Every step takes what is there: on a
machine without a GPU the same steps run on the CPU, on small shapes (GPU_RUN_SMALL=1).
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
SMALL = os.environ.get("GPU_RUN_SMALL") == "1"
WORK = Path(os.environ.get("GPU_RUN_WORK", tempfile.gettempdir()))
DATA_SHEET_FLOPS = 989e12  # dense bf16 of an H100 or H200 SXM
TIMED_S = 0.2 if SMALL else 1.0  # least time of one timing
LARGE_BYTES = 4 << 30  # a model that takes seconds to load and to time
NOT_HERE = 69  # exit code: what a step needs is not on this machine
Tokens = npt.NDArray[np.int32]


def emit(**values: object) -> None:
    """A part of this step's result."""
    print("@" + json.dumps(values, default=str), flush=True)


def run_text(*command: str) -> str:
    """What a program prints; its error where it has none to give."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip()


def mib_numbers(text: str) -> list[int]:
    """The numbers of nvidia-smi's lines such as "1234 MiB" or "1234"; none of "[N/A]"."""
    words = (line.split() for line in text.splitlines())
    return [int(line[0]) for line in words if line and line[0].isdecimal()]


def card_used_mib() -> int | None:
    """What is in use on the first card, by whomever."""
    query = run_text("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    return next(iter(mib_numbers(query)), None)


# ----------------------------------------------------------------------------- the machine


def facts() -> None:
    """The card, the driver, the compilers, the packages."""
    query = "name,driver_version,compute_cap,memory.total,memory.used,clocks.sm,clocks.max.sm"
    emit(card=run_text("nvidia-smi", f"--query-gpu={query}", "--format=csv"))
    emit(nvcc=run_text("nvcc", "--version"), cxx=run_text("c++", "--version").partition("\n")[0])
    emit(cmake=run_text("cmake", "--version"), ninja=run_text("ninja", "--version"))
    emit(cores=os.cpu_count(), memory=run_text("free", "-m"), disk=run_text("df", "-h", str(WORK)))
    emit(cpu=run_text("sh", "-c", "grep -m1 'model name' /proc/cpuinfo"))
    names = ("torch", "transformers", "sentence-transformers", "numpy", "psutil", "tokenizers")
    emit(python=sys.version, packages={name: version_of(name) for name in names})


def need(*packages: str) -> None:
    """End the step where one of them is not installed: that is no fault of what is measured."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        print(f"no {', '.join(missing)} here", file=sys.stderr)
        raise SystemExit(NOT_HERE)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_layers(n: int) -> int:
    """So many layers on the GPU, where there is one; a rehearsal runs on the CPU."""
    from gguf_embed.native import library

    return n if any(device.kind == "gpu" for device in library.devices()) else 0


def ceiling() -> None:
    """What the card gives PyTorch: a bf16 matrix product, a copy."""
    need("torch")
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 512
    emit(device=torch.cuda.get_device_name(0) if device == "cuda" else "CPU")
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    emit(bf16_flops_per_s=2 * n**3 / timed(lambda: a @ b, sync_of(torch, device)), size=n)
    source = torch.empty(1 << (31 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    seconds = timed(source.clone, sync_of(torch, device))
    emit(copy_bytes_per_s=2 * source.numel() / seconds)


def sync_of(torch: Any, device: str) -> Callable[[], None]:
    """Waits for the device."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def timed(call: Callable[[], object], sync: Callable[[], None]) -> float:
    """Seconds of a call: the mean of as many as TIMED_S holds, after two."""
    for _ in range(2):
        call()
    sync()
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < TIMED_S:
        call()
        sync()
        n += 1
    return (time.perf_counter() - started) / n


def doctor() -> None:
    """The installation's own report, with the self-test on CPU and GPU."""
    command = [sys.executable, "-m", "gguf_embed", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    emit(exit_code=done.returncode, report=json.loads(done.stdout))


def plans() -> None:
    """What the plan makes of this machine, for the models that people ask for."""
    from gguf_embed.catalog import catalog
    from gguf_embed.machine.probe import probe
    from gguf_embed.plan.plan import plan_auto, plan_for

    machine = probe()
    emit(auto=plan_auto(machine).in_short)
    for name in ("qwen3-embedding-0.6b", "qwen3-embedding-8b", "bge-m3"):
        card = catalog.find(name)
        assert card is not None
        plan = plan_for(card, machine)
        memory = {where: asdict(part) for where, part in plan.memory.items()}
        emit(model=name, plan=plan.in_short, run=asdict(plan.run), memory=memory)


# ---------------------------------------------------------------------------- right vectors


def families() -> None:
    """Every family of tiny models in a process of its own, several at a time."""
    from reference.make_reference import CASES

    names = [name for name in CASES if name != "qwen3-reranker"]
    names = names[:2] if SMALL else names

    def one(name: str) -> None:
        # Its lines go where ours go, each as soon as it is there.
        command = [sys.executable, __file__, "family", name]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            emit(family=name, exit_code=done.returncode, error=done.stderr[-1500:])

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as threads:
        list(threads.map(one, names))


def family(name: str) -> None:
    """One family: GPU against CPU and against transformers' stored vectors, alone and together."""
    from reference.make_reference import CASES, load

    from gguf_embed import Embedder, Settings

    case, reference = CASES[name], load(name)
    texts = list(reference.texts)
    with tempfile.TemporaryDirectory() as folder:
        for level in ("F16", "Q8_0"):
            path = case.write(Path(folder) / f"{name}-{level}.gguf", outtype=level).path
            made: dict[str, npt.NDArray[np.float32]] = {}
            for place, n_gpu_layers in (("cpu", 0), ("gpu", gpu_layers(-1))):
                settings = Settings(tune=False, n_gpu_layers=n_gpu_layers)
                with Embedder.open(path, settings=settings) as embedder:
                    made[f"{place}_alone"] = np.stack([embedder.encode(text) for text in texts])
                    made[f"{place}_batch"] = embedder.encode(texts)
                    again = embedder.encode(texts)
                made[f"{place}_again"] = again
            cosines = {
                "gpu_to_cpu_alone": least(made["gpu_alone"], made["cpu_alone"]),
                "gpu_to_cpu_batch": least(made["gpu_batch"], made["cpu_batch"]),
                "gpu_batch_to_alone": least(made["gpu_batch"], made["gpu_alone"]),
                "cpu_batch_to_alone": least(made["cpu_batch"], made["cpu_alone"]),
                "gpu_to_reference": least(made["gpu_batch"], reference.vectors),
                "cpu_to_reference": least(made["cpu_batch"], reference.vectors),
            }
            same = bool((made["gpu_batch"] == made["gpu_again"]).all())
            emit(family=name, level=level, n=len(texts), again_equal=same, **cosines)


def least(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """The least cosine of rows; NaN where there is one."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.round(((x * y).sum(axis=1) / norms).min(), 7))


# -------------------------------------------------------------------------- memory and speed


def shape(name: str, level: str) -> None:
    """A random model of that shape: predicted and actual memory, tokens/s, tapped and pooled."""
    import memory
    import random_models
    import shapes

    from gguf_embed.plan.settings import Settings

    card = small_card(name) if SMALL else shapes.known()[name]
    path = WORK / f"{name}-{level}.gguf"
    try:
        seconds = random_models.write(card, path, level)
        emit(model=name, level=level, file_bytes=path.stat().st_size, written_s=round(seconds, 1))
        before = card_used_mib()
        measured = memory.measure(path, Settings())
        emit(memory=measured, card_mib_before=before)
        speeds(path)
        if os.environ.get("GPU_RUN_KEEP") == path.name:
            path = WORK / "not-this"
    finally:
        path.unlink(missing_ok=True)


def small_card(name: str) -> Any:
    """The model's card with a shape that a CPU runs at once."""
    import shapes

    card = shapes.known()[name]
    assert card.shape is not None
    shape = replace(
        card.shape,
        n_layer=2,
        n_embd=256,
        n_head=4,
        n_head_kv=2,
        head_dim=64,
        n_ff=512,
        n_vocab=512,
        n_ctx_train=1024,
    )
    return replace(card, shape=shape, bos_id=None, eos_id=500)


def speeds(path: Path) -> None:
    """Tokens/s by microbatch, length of texts, tap and contexts; and how near their vectors are."""
    import machine as facts_of

    from gguf_embed.gguf.header import read_header
    from gguf_embed.machine.probe import probe
    from gguf_embed.native.model import Model
    from gguf_embed.plan.plan import make_plan
    from gguf_embed.plan.settings import Settings
    from gguf_embed.plan.variants import variant_of

    header = read_header(path)
    variant = variant_of(header)
    plan = make_plan([variant], probe(), Settings())
    started = time.monotonic()
    model = Model(path, n_gpu_layers=plan.run.n_gpu_layers, repack=False)
    emit(load_s=round(time.monotonic() - started, 2), run=asdict(plan.run))
    rng = np.random.default_rng(0)
    canaries = [rng.integers(0, model.n_vocab, n).astype(np.int32) for n in (5, 33, 128, 200)]
    reference: npt.NDArray[np.float32] | None = None
    encoder = variant.mode.encoder
    large = path.stat().st_size > LARGE_BYTES
    for size, length, tap, n_contexts in variations(encoder=encoder, large=large):
        run = replace(
            plan.run,
            n_ctx=max(size, length),
            max_batch_tokens=size,
            batch_tokens=size,
            max_batch_seqs=min(255, max(4, size // length)),
            n_contexts=n_contexts,
            n_threads=4,
            tap=tap,
        )
        try:
            rate, vectors = speed(model, variant.mode, run, length, canaries)
        except Exception as error:  # the other variations may still work
            emit(size=size, length=length, tap=tap, contexts=n_contexts, error=str(error))
            continue
        reference = vectors if reference is None else reference
        flops = facts_of.weight_flops_per_token(header)
        flops += facts_of.attention_flops_per_token(header, [length])
        emit(
            size=size,
            length=length,
            tap=tap,
            contexts=n_contexts,
            tokens_per_s=round(rate),
            share_of_data_sheet=round(rate * flops / DATA_SHEET_FLOPS, 4),
            cosine_to_first=least(vectors, reference),
        )
    model.close()


def variations(*, encoder: bool, large: bool) -> Iterator[tuple[int, int, bool, int]]:
    """(tokens of a microbatch, tokens of a text, tapped, contexts), what matters most first."""
    if SMALL:
        yield from ((512, 128, True, 1), (512, 128, False, 1))
        return
    if encoder:  # attention is masked over the whole microbatch: a large one takes minutes
        yield from ((512, 128, False, 1), (2048, 128, False, 1))
        yield from ((2048, 512, False, 1), (512, 128, False, 2), (512, 128, False, 4))
        return
    for size in (2048, 512) if large else (2048, 512, 4096, 1024, 8192):
        yield size, 128, True, 1
        yield size, 128, False, 1
    if not large:
        yield from ((8192, 512, True, 1), (2048, 128, True, 2))


def speed(
    model: Any, mode: Any, run: Any, length: int, canaries: Sequence[Tokens]
) -> tuple[float, npt.NDArray[np.float32]]:
    """(tokens/s over full microbatches, the vectors of the canaries)."""
    from gguf_embed.engine.runner import Runner

    rng = np.random.default_rng(1)
    per_batch = run.batch_tokens // length
    with Runner(model, mode, run) as runner:
        vectors = runner.run(canaries).vectors
        batches = [
            [rng.integers(0, model.n_vocab, length).astype(np.int32) for _ in range(per_batch)]
            for _ in range(2 * run.n_contexts)
        ]
        for future in [runner.submit(batch) for batch in batches]:  # buffers, graphs, clocks
            future.result()
        started, n = time.perf_counter(), 0
        while time.perf_counter() - started < TIMED_S / 2:
            for future in [runner.submit(batch) for batch in batches]:
                future.result()
            n += len(batches)
        seconds = time.perf_counter() - started
    return n * per_batch * length / seconds, vectors


def offload() -> None:
    """The same vectors with all layers, some and none on the card, by count and by memory."""
    import random_models
    import shapes

    from gguf_embed.gguf.header import read_header
    from gguf_embed.machine.probe import probe
    from gguf_embed.native.model import Model
    from gguf_embed.plan.plan import make_plan
    from gguf_embed.plan.settings import Settings
    from gguf_embed.plan.variants import variant_of

    name = "qwen3-embedding-0.6b"
    card = small_card(name) if SMALL else shapes.known()[name]
    assert card.shape is not None
    n_layer = card.shape.n_layer
    layers = list(dict.fromkeys(map(gpu_layers, (-1, n_layer, n_layer // 2, 1, 0))))
    for level in ("F16", "Q8_0", "Q4_K_M"):
        path = WORK / f"offload-{level}.gguf"
        random_models.write(card, path, level)
        variant = variant_of(read_header(path))
        asked = [Settings(n_gpu_layers=n) for n in layers]
        if not SMALL:
            asked.append(Settings(memory_bytes=path.stat().st_size * 3 // 4, n_ctx=2048))
        first: npt.NDArray[np.float32] | None = None
        for settings in asked:
            try:
                plan = make_plan([variant], probe(), settings)
                before = card_used_mib()
                run = replace(plan.run, n_ctx=min(plan.run.n_ctx, 2048))
                with Model(path, n_gpu_layers=run.n_gpu_layers, repack=False) as model:
                    rng = np.random.default_rng(0)
                    texts = [
                        rng.integers(0, model.n_vocab, n).astype(np.int32) for n in (5, 40, 300)
                    ]
                    vectors = run_once(model, variant.mode, run, texts)
                    used = card_used_mib()
            except Exception as error:
                emit(level=level, asked=settings.n_gpu_layers, error=str(error))
                continue
            first = vectors if first is None else first
            emit(
                level=level,
                asked=settings.n_gpu_layers,
                where=plan.chosen.where,
                memory_asked=settings.memory_bytes,
                cosine_to_all=least(vectors, first),
                used_mib=None if used is None or before is None else used - before,
                predicted_mib={k: v.used_bytes >> 20 for k, v in plan.memory.items()},
            )
        path.unlink()


def run_once(model: Any, mode: Any, run: Any, texts: Sequence[Tokens]) -> npt.NDArray[np.float32]:
    from gguf_embed.engine.runner import Runner

    with Runner(model, mode, run) as runner:
        return runner.run(texts).vectors


# ------------------------------------------------------------------- as users run it, and peers


def builtin() -> None:
    """The built-in model through the whole engine: first vector, texts/s, tuned and not."""
    import workloads

    from gguf_embed import Embedder, Settings

    started = time.monotonic()
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        vector = embedder.encode("Is anybody there?")
        emit(first_vector_s=round(time.monotonic() - started, 2), n=len(vector))
    n = 100 if SMALL else 10_000
    whole = workloads.make("tiny", 10 * n, lambda text: len(text) // 4).texts
    for name, settings, texts in (
        ("cpu", Settings(tune=False, n_gpu_layers=0), docstring_texts(n // 10)),
        ("gpu", Settings(tune=False), docstring_texts(n)),
        (
            "gpu, large microbatches",
            Settings(tune=False, max_batch_tokens=8192),
            docstring_texts(n),
        ),
        ("gpu, tuned", Settings(), docstring_texts(n)),
        ("gpu, tuned, tiny texts", Settings(), list(whole)),
    ):
        engine_speed(name, Embedder, None, settings, texts)
    speeds(next((ROOT / "models").glob("*.gguf")))


def docstring_texts(n: int) -> list[str]:
    import workloads

    texts = [text[:1500] for text in workloads.docstrings() if len(text) >= 60]
    return [f"{i} {texts[i % len(texts)]}" for i in range(n)]


def engine_speed(
    name: str, embedder_class: Any, path: Path | None, settings: Any, texts: Sequence[str]
) -> npt.NDArray[np.float32] | None:
    """Texts/s and tokens/s of `encode`, tokenizing included; the vectors."""
    try:
        started = time.monotonic()
        model = {} if path is None else {"model": path}
        with embedder_class.open(*model.values(), settings=settings) as embedder:
            opened_s = time.monotonic() - started
            embedder.encode(texts[:64])
            counting = time.perf_counter()
            n_tokens = int(embedder.count_tokens(texts).sum())
            counted_s = time.perf_counter() - counting
            started = time.perf_counter()
            vectors = embedder.encode(list(texts), truncate="end")
            seconds = time.perf_counter() - started
            emit(
                engine=name,
                texts=len(texts),
                tokens=n_tokens,
                opened_s=round(opened_s, 2),
                tokenize_s=round(counted_s, 3),
                seconds=round(seconds, 3),
                texts_per_s=round(len(texts) / seconds),
                tokens_per_s=round(n_tokens / seconds),
                run=str(getattr(embedder, "run", "")),
            )
            return vectors
    except Exception as error:
        emit(engine=name, error=f"{type(error).__name__}: {error}")
        return None


def peer() -> None:
    """sentence-transformers in bf16 and this engine, on the same weights and texts, 0.6B."""
    need("torch", "sentence_transformers")
    import random_models
    import shapes
    import torch  # pyright: ignore[reportMissingImports]
    import torch_model

    from gguf_embed import Embedder, Settings

    name = "qwen3-embedding-0.6b"
    card = small_card(name) if SMALL else shapes.known()[name]
    path, directory = WORK / "peer-F16.gguf", WORK / "peer-st"
    random_models.write(card, path, "F16")
    texts = [text[:400] for text in docstring_texts(50 if SMALL else 2000)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs: npt.NDArray[np.float32] | None = None
    peer_name = "sentence-transformers bf16"
    try:
        torch_model.convert(path, directory)
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

        st = SentenceTransformer(
            str(directory), device=device, model_kwargs={"torch_dtype": torch.bfloat16}
        )
        st.encode(texts[:64], batch_size=32, normalize_embeddings=True)
        for batch_size in (32,) if SMALL else (32, 128, 512):
            started = time.perf_counter()
            theirs = st.encode(texts, batch_size=batch_size, normalize_embeddings=True)
            seconds = time.perf_counter() - started
            emit(
                engine=peer_name,
                batch_size=batch_size,
                seconds=round(seconds, 3),
            )
        n_tokens = sum(len(ids) for ids in st.tokenizer(texts)["input_ids"])
        emit(engine=peer_name, texts=len(texts), tokens=n_tokens)
        del st
        gc.collect()
        torch.cuda.empty_cache()
    except Exception as error:
        emit(engine=peer_name, error=f"{type(error).__name__}: {error}")
    for label, settings in (
        ("gguf_embed F16", Settings(tune=False)),
        ("gguf_embed F16, large microbatches", Settings(tune=False, max_batch_tokens=8192)),
        ("gguf_embed F16, tuned", Settings()),
    ):
        ours = engine_speed(label, Embedder, path, settings, texts)
        if theirs is not None and ours is not None:
            emit(engine=label, cosine_to_peer=least(ours, theirs.astype(np.float32)))
    path.unlink()


def torch_forward(name: str) -> None:
    """transformers in bf16 with random weights of a shape: tokens/s of the forward pass."""
    need("torch", "transformers")
    import shapes
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model  # pyright: ignore[reportMissingImports]

    from gguf_embed.gguf import layout

    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = small_card(name) if SMALL else shapes.known()[name]
    shape = card.shape
    assert shape is not None
    common = {
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "max_position_embeddings": shape.n_ctx_train,
    }
    more = {"num_key_value_heads": shape.n_head_kv, "head_dim": shape.head_dim}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        if shape.architecture == "bert":
            model = BertModel(BertConfig(**common))
        else:
            model = Qwen3Model(Qwen3Config(**common, **more))
    model.eval()
    names = {"token_embd.weight", "position_embd.weight", "token_types.weight"}
    matrices = [
        tensor
        for tensor in layout.tensors(shape, "F16")
        if len(tensor.shape) == 2 and tensor.name not in names
    ]
    flops = sum(2 * tensor.shape[0] * tensor.shape[1] for tensor in matrices)
    for n_texts, length in (
        ((4, 128),) if SMALL else ((4, 128), (16, 128), (64, 128), (256, 128), (16, 512))
    ):
        ids = torch.randint(0, shape.n_vocab, (n_texts, length), device=device)
        mask = torch.ones_like(ids)

        def once(ids: Any = ids, mask: Any = mask) -> object:
            with torch.inference_mode():
                return model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1].float()

        seconds = timed(once, sync_of(torch, device))
        rate = n_texts * length / seconds
        emit(
            model=name,
            texts=n_texts,
            length=length,
            tokens_per_s=round(rate),
            share_of_data_sheet=round(rate * flops / DATA_SHEET_FLOPS, 4),  # weights only
        )


STEPS: Mapping[str, Callable[..., None]] = {
    "facts": facts,
    "ceiling": ceiling,
    "doctor": doctor,
    "plans": plans,
    "families": families,
    "family": family,
    "shape": shape,
    "offload": offload,
    "builtin": builtin,
    "peer": peer,
    "torch": torch_forward,
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    STEPS[name](*arguments)


if __name__ == "__main__":
    main()
