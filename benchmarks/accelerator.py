"""What the accelerator gains: its kernels' rate, and whole models beside plain llama.cpp.

    python benchmarks/accelerator.py MODEL.gguf ... [--pairs 3] [--lengths 128 128 128 128]
    python benchmarks/accelerator.py --kernels

Each pair is two child processes, one after the other: without and with the accelerator, one
thread, the same random tokens. Times are CPU seconds, the best of some calls; on a machine that
does other work too, the ratio within a pair is worth more than any figure. The vectors of both
must agree before a time counts. Ends in one line of JSON.

`--kernels` prints multiply-adds per second of each instruction set that this CPU has, by weight
type, at 1 to 512 rows. `of_ceiling` is the share of what the set's instructions do in registers
alone, with nothing loaded or stored; so it is with 36 rows in the first level cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.model import Model
from gguf_embed.vectors import Pooling

ROOT = Path(__file__).parents[1]
CALLS = 3  # the best of so many


def main() -> None:
    parser = argparse.ArgumentParser(description="What the accelerator gains on this machine.")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128] * 4, help="tokens a text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", action="store_true", help="the kernels' rates")
    parser.add_argument("--accelerator", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Path(args.child[0]), Path(args.child[1]), args)))
        return
    if args.kernels:
        subprocess.run([sys.executable, ROOT / "native" / "build.py", "--rate"], check=True)
    results = [compared(model, args) for model in args.models]
    print(json.dumps({"lengths": args.lengths, "threads": args.threads, "models": results}))


def compared(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of CPU time, pair by pair, and how near the vectors are."""
    pairs: list[tuple[float, float]] = []
    cosine = 1.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.pairs):
            out = [Path(folder) / "plain.npy", Path(folder) / "accelerated.npy"]
            first = number % 2  # who begins takes turns
            seconds = [0.0, 0.0]
            for which in (first, 1 - first):
                seconds[which] = run_child(model, out[which], args, on=bool(which))
            pairs.append((seconds[0], seconds[1]))
            plain, ours = map(np.load, out)
            cosine = min(cosine, float((plain * ours).sum(axis=1).min()))
            print(f"{model.name}: {seconds[0]:.3f} -> {seconds[1]:.3f} CPU s per 1,000 tokens")
    assert cosine > 0.98, cosine  # a fast wrong answer is not a result
    ratios = [plain / ours for plain, ours in pairs]
    print(f"{model.name}: {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
    return {"model": model.name, "pairs": pairs, "ratio": statistics.median(ratios), "cos": cosine}


def run_child(model: Path, out: Path, args: argparse.Namespace, *, on: bool) -> float:
    """CPU seconds for 1,000 tokens in a process of its own."""
    command = [sys.executable, __file__, "--child", str(model), str(out)]
    command += ["--threads", str(args.threads), "--lengths", *map(str, args.lengths)]
    command += ["--accelerator"] if on else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    return float(told["seconds"])


def measure(path: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The best of some calls over the same texts; the vectors go to `out`."""
    n_tokens = sum(args.lengths)
    model = Model(path, repack=False)
    causal = model.n_ctx_train > 8192  # of the models measured: the Qwen3 ones
    params = ContextParams(
        n_ctx=n_tokens,
        n_ubatch=n_tokens,
        n_seq_max=len(args.lengths),
        n_threads=args.threads,
        pooling=Pooling.LAST if causal else Pooling.MEAN,
        flash_attn=True,
        tap=causal,
        accelerator=args.accelerator,
    )
    context = Context(model, params, encoder=not causal)
    rng = np.random.default_rng(0)
    texts = [
        rng.integers(1000, min(model.n_vocab, 20_000), n).astype(np.int32) for n in args.lengths
    ]
    vectors = context.run(texts)
    times: list[float] = []
    for _ in range(CALLS if causal else 5 * CALLS):
        start = time.process_time()
        vectors = context.run(texts)
        times.append(time.process_time() - start)
    np.save(out, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return {"seconds": min(times) / n_tokens * 1000}


if __name__ == "__main__":
    main()
