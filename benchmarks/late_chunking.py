"""What late chunking does to retrieval: find a docstring's body by its summary, in its module.

    python benchmarks/late_chunking.py [MODEL] [--pairs 1000] [--out late.json]

The bodies of a module's docstrings, in the order of the file, are one document; each body is a
chunk. Queries are the summaries. Chunks are embedded alone and within their document, in windows of
as many whole chunks as the model takes. nDCG@10 over all chunks; the interval is that of the mean
difference over queries. Nothing is timed. Prints a table and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gguf_embed import Embedder, Settings
from gguf_embed.lab.docstrings import Pair, distinct, read_pairs
from gguf_embed.lab.metrics import loss_of, ndcg, rank
from gguf_embed.vectors import Vectors

TOP = 10
MOST_TOKENS = 200  # of a chunk: several fit into the least context
LEAST_CHUNKS = 3  # of a document: fewer say little of their neighbours


def documents(n_pairs: int, count: Callable[[list[str]], Sequence[int]]) -> list[list[Pair]]:
    """The docstrings of modules of the standard library, module by module; long bodies left out."""
    root = Path(json.__file__).parents[1]
    skipped = {"test", "idlelib", "lib2to3", "site-packages", "turtledemo"}
    paths = sorted(
        path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)
    )
    pairs = distinct(pair for path in paths for pair in read_pairs(path, root))
    counts = count([pair.body for pair in pairs])
    pairs = [pair for pair, n in zip(pairs, counts, strict=True) if n <= MOST_TOKENS]
    modules = [list(group) for _, group in groupby(pairs, lambda pair: pair.source.split(":")[0])]
    taken: list[list[Pair]] = []
    for module in (each for each in modules if len(each) >= LEAST_CHUNKS):
        if sum(map(len, taken)) >= n_pairs:
            break
        taken.append(module)
    return taken


def late(embedder: Embedder, module: list[Pair], prompt: str) -> Vectors:
    """The vectors of a module's bodies within it."""
    text, spans = "", []
    for pair in module:
        start = len(text)
        text += pair.body
        spans.append((start, len(text)))
        text += "\n\n"
    return embedder.encode_chunks(text, spans, windows=True, prompt=prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="all-minilm-l6-v2")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with Embedder.open(args.model, settings=Settings(tune=False)) as embedder:
        prompt = embedder.prompt("document")
        modules = documents(args.pairs, lambda texts: embedder.count_tokens(texts).tolist())
        pairs = [pair for module in modules for pair in module]
        qrels = [{row: 1.0} for row in range(len(pairs))]
        queries = embedder.encode_query([pair.summary for pair in pairs])
        alone = embedder.encode([pair.body for pair in pairs], prompt=prompt)
        within = np.concatenate([late(embedder, module, prompt) for module in modules])
        model, pooling, n_ctx = embedder.model_id, embedder.pooling.name.lower(), embedder.n_ctx
    scores = {
        name: ndcg(rank(queries, vectors, k=TOP), qrels)
        for name, vectors in (("alone", alone), ("late", within))
    }
    loss = loss_of(scores["late"], scores["alone"])
    cosines = np.einsum("nd,nd->n", alone, within)
    run: dict[str, Any] = {
        "model": model,
        "pooling": pooling,
        "n_ctx": n_ctx,
        "python": sys.version.split()[0],
        "n_modules": len(modules),
        "n_chunks": len(pairs),
        "ndcg_at_10": {name: float(values.mean()) for name, values in scores.items()},
        "loss": str(loss),
        "mean_cosine": float(cosines.mean()),
    }
    for name, values in scores.items():
        print(f"{name:6} nDCG@10 {values.mean():.4f}")
    print(f"difference {loss}")
    if args.out:
        args.out.write_text(json.dumps(run, indent=1) + "\n")
    print(json.dumps(run))


if __name__ == "__main__":
    main()
