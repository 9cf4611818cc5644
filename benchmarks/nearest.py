"""The nearest of many vectors: ours through the coarse copy, a full product, and LanceDB.

    python benchmarks/nearest.py --vectors FILE.npy [--sizes 100000,1000000] [--lancedb]
    python benchmarks/index.py latency --vectors FILE.npy     # makes that file

Vectors are those of FILE.npy, of real texts. Beyond their number each is taken again with noise (a
cosine of about 0.9 to the one that it was made of), so that a larger set is as crowded as a real
one. Questions are docstring summaries, by the built-in model. A time counts only with its recall:
the share of the ten rows of the greatest cosine, by float64, that are found. LanceDB (the package
lancedb): its exact search, IVF_PQ and IVF_HNSW_SQ with refining, at several numbers of probes.

Prints wall and CPU milliseconds of a question (p50 / p99), and one line of JSON last. The first
question of each engine is not counted. On a busy machine go by the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import index as corpus
import numpy as np

from gguf_embed import Embedder
from gguf_embed.index.nearness import Nearness
from gguf_embed.index.ranking import best_rows
from gguf_embed.index.vector_file import VectorFile
from gguf_embed.vectors import Vectors

NOISE = 0.48  # of length, beside a vector of length 1: a cosine of 0.9
BLOCK = 1 << 15
TOP = 10


def enlarged(real: Vectors, n: int) -> Vectors:
    """So many rows: the real ones, then noisy copies."""
    vectors = np.empty((n, real.shape[1]), np.float32)
    chance = np.random.default_rng(0)
    for first in range(0, n, BLOCK):
        rows = np.arange(first, min(first + BLOCK, n))
        block = real[rows % len(real)]
        noisy = rows >= len(real)
        noise = chance.normal(size=(int(noisy.sum()), real.shape[1])).astype(np.float32)
        block[noisy] += noise * np.float32(NOISE / real.shape[1] ** 0.5)
        vectors[rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def exact_rows(vectors: Vectors, questions: Vectors) -> list[set[int]]:
    """The ten best of each question, by float64; equal ones by chance."""
    found: list[list[tuple[float, int]]] = [[] for _ in questions]
    for first in range(0, len(vectors), BLOCK):
        products = vectors[first : first + BLOCK].astype(np.float64) @ questions.T.astype("f8")
        for row, scores in enumerate(products.T):
            best = np.argpartition(-scores, min(TOP, len(scores) - 1))[:TOP]
            found[row] += [(float(scores[at]), first + int(at)) for at in best]
            found[row] = sorted(found[row], reverse=True)[:TOP]
    return [{at for _, at in each} for each in found]


def measured(
    name: str, ways: Sequence[Callable[[], Sequence[int]]], exact: Sequence[set[int]]
) -> dict[str, Any]:
    """Figures of one engine."""
    ways[0]()
    found: list[set[int]] = []
    clock = corpus.Clock.of([lambda way=way: found.append({*way()}) for way in ways])
    shares = [len(a & b) / TOP for a, b in zip(found, exact, strict=True)]
    figures = {**clock.figures(), "recall": round(float(np.mean(shares)), 4)}
    print(f"{name:34} {json.dumps(figures)}", flush=True)
    return figures


def ours(work: Path, vectors: Vectors, questions: Vectors, exact: list[set[int]]) -> dict[str, Any]:
    """The coarse copy, and a full product of mapped rows."""
    file = VectorFile(work / "vectors.f32", vectors.shape[1])
    begin = time.process_time()
    for first in range(0, len(vectors), BLOCK):
        file.append(vectors[first : first + BLOCK], first)
    result: dict[str, Any] = {"write_cpu_s": round(time.process_time() - begin, 1)}
    ranges = [(0, len(vectors))]
    n_multiplied: list[int] = []

    def near(nearness: Nearness, question: Vectors) -> list[int]:
        found = nearness.near(question, ranges, TOP)
        n_multiplied.append(len(found.rows))
        return found.rows[best_rows(found.cosines, TOP)].tolist()

    for name, least in (("coarse copy", 1), ("full product", len(vectors) + 1)):
        nearness = Nearness(file, len(vectors), least_rows=least)
        n_multiplied.clear()
        result[name] = measured(name, [partial(near, nearness, q) for q in questions], exact)
        result[name]["rows_multiplied_p50"] = float(np.median(n_multiplied))
    return result


def lancedb_figures(
    work: Path, vectors: Vectors, questions: Vectors, exact: list[set[int]]
) -> dict[str, Any]:
    """The same in LanceDB."""
    import lancedb  # type: ignore[import-not-found]
    import pyarrow as pa  # type: ignore[import-not-found]
    from lancedb.index import HnswSq, IvfPq  # type: ignore[import-not-found]

    result: dict[str, Any] = {"version": lancedb.__version__}
    flat = pa.array(vectors.reshape(-1), pa.float32())
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    rows = pa.array(np.arange(len(vectors)))
    database = lancedb.connect(work / "lance")
    made = database.create_table("v", pa.table({"row": rows, "vector": column}))

    def near(question: Vectors, **refined: int) -> list[int]:
        search = made.search(question).distance_type("cosine").limit(TOP)
        for name, value in refined.items():
            search = getattr(search, name)(value)
        return [each["row"] for each in search.select(["row", "_distance"]).to_list()]

    result["exact"] = measured("LanceDB, exact", [partial(near, q) for q in questions], exact)
    kinds = (
        ("IVF_PQ", IvfPq(distance_type="cosine"), (10, 100)),
        ("IVF_HNSW_SQ", HnswSq(distance_type="cosine"), (2,)),
    )
    for name, config, refine_factors in kinds:
        wall, cpu = time.perf_counter(), time.process_time()
        made.create_index("vector", config=config, replace=True)
        result[f"{name}_build_wall_s"] = round(time.perf_counter() - wall, 1)
        result[f"{name}_build_cpu_s"] = round(time.process_time() - cpu, 1)
        for nprobes, refine_factor in product((20, 100), refine_factors):
            refined = {"nprobes": nprobes, "refine_factor": refine_factor}
            label = f"{name}, {nprobes} probes, refined {refine_factor}"
            ways = [partial(near, q, **refined) for q in questions]
            result[label] = measured(f"LanceDB, {label}", ways, exact)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vectors", type=Path, required=True, metavar="FILE.npy")
    parser.add_argument("--sizes", default="100000,1000000")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--lancedb", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with Embedder.open() as embedder:
        asked = corpus.questions()[: args.questions]
        questions = np.stack([embedder.encode_query(each) for each in asked])
    real = np.load(args.vectors, mmap_mode="r")
    run: dict[str, Any] = {"n_real": len(real), "n_questions": len(questions)}
    for size in map(int, args.sizes.split(",")):
        vectors = enlarged(real, size)
        exact = exact_rows(vectors, questions)
        print(f"{size} vectors of {vectors.shape[1]}", flush=True)
        work = Path(tempfile.mkdtemp(prefix="gguf_embed-nearest-"))
        try:
            run[f"{size}"] = ours(work, vectors, questions, exact)
            if args.lancedb:
                run[f"{size}"]["lancedb"] = lancedb_figures(work, vectors, questions, exact)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if args.out:
        args.out.write_text(json.dumps(run) + "\n")
    print(json.dumps(run))


if __name__ == "__main__":
    sys.exit(main())
