"""Prints what a model's vectors are with the accelerator, and whether they stay the same.

    python tests/accelerator_vectors.py MODEL OUT.npy KERNEL|off

The texts are golden ones. Each is embedded alone, with one thread; with the accelerator then also
in random batches, with two threads, and by four contexts at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerator_child import choose
from golden.compare import load

from gguf_embed.native import library
from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.model import Model, Tokens
from gguf_embed.vectors import Pooling, Vectors

N_CTX = 512


def batches(
    sequences: list[Tokens], rng: np.random.Generator
) -> Iterator[tuple[list[int], list[Tokens]]]:
    """Row numbers and sequences that fit a context, in random order."""
    rows: list[int] = []
    n_tokens = 0
    for row in rng.permutation(len(sequences)).tolist():
        if n_tokens + len(sequences[row]) > N_CTX or len(rows) == 16:
            yield rows, [sequences[r] for r in rows]
            rows, n_tokens = [], 0
        rows.append(row)
        n_tokens += len(sequences[row])
    yield rows, [sequences[r] for r in rows]


def main() -> None:
    model = Model(Path(sys.argv[1]), repack=False)
    on = sys.argv[3] != "off"
    if on:
        choose(sys.argv[3])
    kernel = library.accelerated().kernel if on else None
    causal = "qwen3" in sys.argv[1]
    params = ContextParams(
        n_ctx=N_CTX,
        n_ubatch=N_CTX,
        n_seq_max=16,
        n_threads=1,
        pooling=Pooling.LAST if causal else Pooling.MEAN,
        tap=causal,
        flash_attn=True,
        accelerator=on,
    )
    texts = load().texts[::4]
    sequences = [model.tokenize(text.encode())[: N_CTX // 2] for text in texts]

    def context(n_threads: int = 1) -> Context:
        return Context(model, replace(params, n_threads=n_threads), encoder=not causal)

    def batched(made: Context, seed: int) -> Vectors:
        vectors = np.empty((len(sequences), model.dim), np.float32)
        for rows, chosen in batches(sequences, np.random.default_rng(seed)):
            vectors[rows] = made.run(chosen)
        return vectors

    one = context()
    alone = np.concatenate([one.run([sequence]) for sequence in sequences])
    np.save(sys.argv[2], alone)
    if not on:
        print(json.dumps({"kernel": kernel}))
        return
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(batched, [context() for _ in range(4)], range(4)))
    same = {
        "in batches": np.array_equal(batched(one, 9), alone),
        "with two threads": np.array_equal(batched(context(2), 8), alone),
        "by four contexts": all(np.array_equal(vectors, alone) for vectors in several),
    }
    if causal:
        shared = [np.concatenate([sequences[0][:7], sequence]) for sequence in sequences[:12]]
        plain = np.concatenate([one.run([sequence]) for sequence in shared])
        same["after a shared prefix"] = np.array_equal(one.run(shared, n_prefix=7), plain)
    print(json.dumps({"kernel": kernel, "same": same}))


if __name__ == "__main__":
    main()
