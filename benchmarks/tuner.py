"""Is the tuner's choice as good as the best of all settings? A full grid, timed beside it.

    python benchmarks/tuner.py MODEL.gguf --n 40 --rounds 3

Tunes the model anew, as `gguf-embed tune` does. Then every combination of repacking, flash
attention, contexts and microbatch embeds the same texts in interleaved rounds, with the tuner's
choice and the untuned start among them. Prints a table, fastest first, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import machine
import numpy as np
import workloads

from gguf_embed.engine import tune
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import find_model
from gguf_embed.machine import probe as hardware
from gguf_embed.plan.settings import RunSettings, Settings

CHOICE, START = "the tuner's choice", "untuned"
TUNE_S = 120.0  # time to measure as much as the tuner likes
TOLERANCE = 0.99  # cosine to the first contender's vectors: quantized kernels round differently


def grid(n_cores: int) -> list[Settings]:
    """Every setting that the tuner may choose from."""
    shares = [n for n in range(1, n_cores + 1) if n_cores % n == 0]
    return [
        _settings(
            RunSettings(
                repack=repack,
                flash_attn=flash_attn,
                n_contexts=n_contexts,
                n_threads=n_cores // n_contexts,
                batch_tokens=batch_tokens,
            )
        )
        for repack, flash_attn, n_contexts, batch_tokens in product(
            (True, False), (True, False), shares, tune.BATCH_TOKENS
        )
    ]


def _settings(run: RunSettings) -> Settings:
    """These, whatever was measured."""
    return Settings(
        tune=False,
        repack=run.repack,
        flash_attn=run.flash_attn,
        n_contexts=run.n_contexts,
        n_threads=run.n_threads,
        max_batch_tokens=run.batch_tokens,
    )


def seconds(path: Path, settings: Settings, texts: Sequence[str]) -> tuple[float, Any]:
    """Time to embed the texts, without loading, and their vectors."""
    with Embedder.open(path, settings=settings) as embedder:
        embedder.encode(texts[:4])
        began = time.perf_counter()
        vectors = embedder.encode(texts)
        return time.perf_counter() - began, vectors


def main() -> None:
    parser = argparse.ArgumentParser(description="Is the tuner as good as a full grid?")
    parser.add_argument("model", type=Path)
    parser.add_argument("--n", type=int, default=40, help="texts of the mixed workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep the JSON here")
    args = parser.parse_args()

    n_cores = hardware.usable_cores()
    with Embedder.open(args.model, settings=Settings(tune=False)) as embedder:
        work = workloads.make("mixed", args.n, lambda text: int(embedder.count_tokens([text])[0]))
        n_tokens = int(embedder.count_tokens(work.texts).sum())
    target = find_model(args.model, Settings()).target
    tuned = tune.tune(target, budget_s=TUNE_S)
    print(f"{args.model.name}: {n_tokens:,} tokens; tuned in {tuned.seconds:.0f} s", flush=True)

    contenders = {CHOICE: Settings(tune=False), START: _settings(target.start)}
    for settings in grid(n_cores):
        name = (
            f"repack {settings.repack}, flash {settings.flash_attn}, "
            f"{settings.n_contexts} x {settings.n_threads}, {settings.max_batch_tokens}"
        )
        contenders[name] = settings
    times: dict[str, list[float]] = {name: [] for name in contenders}
    reference: Any = None
    names = list(contenders)
    for turn in range(args.rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            took, vectors = seconds(args.model, contenders[name], work.texts)
            reference = vectors if reference is None else reference
            worst = float(np.einsum("nd,nd->n", vectors, reference).min())
            assert worst > TOLERANCE, f"{name}: cosine {worst}"
            times[name].append(took)
        print(f"round {turn + 1} of {args.rounds}", flush=True)

    speeds = {name: n_tokens / statistics.median(t) for name, t in times.items()}
    best = max((n for n in speeds if n not in (CHOICE, START)), key=speeds.__getitem__)
    for name in sorted(speeds, key=speeds.__getitem__, reverse=True):
        low, high = n_tokens / max(times[name]), n_tokens / min(times[name])
        print(f"{speeds[name]:8,.0f} tokens/s ({low:,.0f}-{high:,.0f})  {name}")
    found = {
        "model": args.model.name,
        "machine": machine.facts(None),
        "n_tokens": n_tokens,
        "rounds": args.rounds,
        "choice": asdict(tuned.settings),
        "tuned_s": tuned.seconds,
        "choice_to_best": speeds[CHOICE] / speeds[best],
        "choice_to_untuned": speeds[CHOICE] / speeds[START],
        "best": best,
        "tokens_per_s": speeds,
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
