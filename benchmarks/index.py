"""An index of a real corpus: time, size, updates, latency, and how well it finds.

    python benchmarks/index.py [corpus] [finds] [latency] [lancedb] [--out index.json]

corpus   texts of the standard library and installed packages (.md, .rst, .txt, and a page of
         docstrings for each module): first run, size, a run after nothing, after 1 % of the files
         have changed
finds    a docstring's body by its summary (gguf_embed.lab.docstrings), each body a file: nDCG@10
         and recall@10 of meaning, words and both, at several shares of the words, and by ranks
latency  questions at 1,000, 10,000 and 100,000 passages. Passages are real text, cut by the model's
         tokens; the vectors behind them are random, since a product takes as long: questions are
         embedded by the model
lancedb  the same passages and vectors in LanceDB (pip install lancedb), the same questions

Prints tables, and one line of JSON last. The model is the built-in one.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gguf_embed import Embedder
from gguf_embed.catalog import BUILTIN
from gguf_embed.engine.options import Block
from gguf_embed.index.index import Index
from gguf_embed.index.making import Wanted, make_index
from gguf_embed.lab.docstrings import docstring_task
from gguf_embed.vectors import finish

SKIPPED = {"RECORD", "top_level.txt", "entry_points.txt", "SOURCES.txt", "requires.txt"}
N_QUESTIONS = 200
TOP = 10


class RandomVectors(Embedder):
    """The built-in model, but documents get random vectors: for figures of time alone."""

    def stream(self, texts, **options):  # type: ignore[no-untyped-def,override]
        texts = list(texts)
        if len(texts) < 8:  # a question
            yield from super().stream(texts, **options)
            return
        made = np.random.default_rng(len(texts)).normal(size=(len(texts), self.dim))
        counts = np.zeros(len(texts), np.int32)
        vectors = finish(made.astype(np.float32), dimensions=None, normalize=True)
        yield Block(start=0, vectors=vectors, token_counts=counts, truncated=counts.astype(bool))


def sources() -> list[Path]:
    """Folders of installed texts."""
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def pages(target: Path) -> int:
    """Fill a folder with texts, and a page for each module with docstrings; how many files."""
    n = 0
    for root in sources():
        for path in sorted(root.rglob("*")):
            if path.name in SKIPPED or "licenses" in path.parts or not path.is_file():
                continue
            name = "__".join(path.relative_to(root).parts)
            if path.suffix in (".md", ".rst", ".txt") and path.stat().st_size > 300:
                text = path.read_bytes().decode("utf-8", "replace")
                if path.suffix == ".txt" and "/" not in text and text.count(" ") < 50:
                    continue
            elif path.suffix == ".py":
                text = docstring_page(path)
                name = name.removesuffix(".py") + ".md"
                if len(text) < 600:
                    continue
            else:
                continue
            (target / name).write_text(text)
            n += 1
    return n


def docstring_page(path: Path) -> str:
    """The docstrings of a module, as Markdown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return ""
    parts = [f"# {path.stem}\n\n{ast.get_docstring(tree) or ''}\n"]
    for node in ast.walk(tree):
        documented = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node)):
            parts.append(f"## {node.name}\n\n{text}\n")
    text = "\n".join(parts) if len(parts) > 1 else ""
    return text.encode("utf-8", "replace").decode()


def corpus(work: Path, embedder: Embedder, most_files: int) -> dict[str, Any]:
    """First run, size, runs after."""
    folder = work / "pages"
    folder.mkdir()
    pages(folder)
    files = sorted(folder.iterdir())
    step = max(1, len(files) // most_files)
    for position, path in enumerate(files):
        if position % step:
            path.unlink()
    files = sorted(folder.iterdir())
    place = work / "corpus.index"

    def timed() -> tuple[float, Any]:
        begin = time.perf_counter()
        report = make_index(place, embedder, Wanted(folders={folder: None}), model=BUILTIN)
        return time.perf_counter() - begin, report

    first, report = timed()
    result: dict[str, Any] = {
        "n_files": len(files),
        "text_bytes": sum(path.stat().st_size for path in files),
        "n_passages": report.n_passages,
        "n_tokens": report.n_tokens,
        "n_unread": len(report.unread),
        "first_s": first,
        "index_bytes": sum(p.stat().st_size for p in place.rglob("*") if p.is_file()),
    }
    result["nothing_s"] = timed()[0]
    changed = files[:: len(files) // max(1, len(files) // 100)][: max(1, len(files) // 100)]
    for path in changed:
        with path.open("a") as stream:
            stream.write("\n## A change\n\nOne more paragraph stands at the end of this file.\n")
    seconds, report = timed()
    result |= {"changed_files": len(changed), "changed_s": seconds}
    result |= {"changed_embedded": report.n_embedded, "changed_share": seconds / first}
    moved = files[1]
    moved.rename(folder / "moved.md")
    seconds, report = timed()
    result |= {"moved_s": seconds, "moved_embedded": report.n_embedded}
    return result


def finds(work: Path, embedder: Embedder, n_passages: int | None) -> dict[str, Any]:
    """nDCG@10 and recall@10 on docstrings."""
    task = docstring_task(limit=n_passages)
    folder = work / "bodies"
    folder.mkdir()
    for row, text in enumerate(task.passages):
        (folder / f"{row}.txt").write_text(text)
    place = work / "bodies.index"
    make_index(place, embedder, Wanted(folders={folder: None}), model=BUILTIN)
    rows = range(0, len(task.queries), max(1, len(task.queries) // 1000))
    wanted = list(rows)  # the body of the same docstring
    found: dict[str, list[dict[int, float]]] = {"meaning": [], "words": []}
    with Index.open(place) as index:
        n = index.status().n_passages
        for row in rows:
            for by in ("meaning", "words"):
                best: dict[int, float] = {}
                for hit in index.search(task.queries[row], embedder, by=by, top=400):  # type: ignore[arg-type]
                    best.setdefault(int(hit.path.stem), hit.score)
                found[by].append(best)
        whole = [
            [int(hit.path.stem) for hit in index.search(task.queries[row], embedder, top=TOP)]
            for row in rows
        ]
    tables: dict[str, tuple[float, float]] = {}

    def score(name: str, ranked: Callable[[int], list[int]]) -> None:
        ranks = [
            order.index(want) if want in (order := ranked(i)[:TOP]) else None
            for i, want in enumerate(wanted)
        ]
        gains = [0.0 if rank is None else 1 / np.log2(rank + 2) for rank in ranks]
        hits = [rank is not None for rank in ranks]
        tables[name] = float(np.mean(gains)), float(np.mean(hits))

    def ordered(scores: dict[int, float]) -> list[int]:
        return sorted(scores, key=lambda row: -scores[row])

    for by, lists in found.items():
        score(by, lambda i, lists=lists: ordered(lists[i]))

    score("both, as the index gives it", lambda i: list(dict.fromkeys(whole[i])))

    def shared(i: int, share: float) -> list[int]:
        near, words = found["meaning"][i], found["words"][i]
        least = min(near.values(), default=0)
        return ordered(
            {
                row: (1 - share) * near.get(row, least) + share * words.get(row, 0)
                for row in near.keys() | words.keys()
            }
        )

    def spread(i: int, share: float) -> list[int]:
        near, words = found["meaning"][i], found["words"][i]
        low, high = min(near.values(), default=0), max(near.values(), default=1)
        return ordered(
            {
                row: (1 - share) * (near.get(row, low) - low) / max(high - low, 1e-9)
                + share * words.get(row, 0)
                for row in near.keys() | words.keys()
            }
        )

    def of_ranks(i: int, k: int) -> list[int]:
        scores: dict[int, float] = {}
        for lists in found.values():
            for rank, row in enumerate(lists[i], 1):
                scores[row] = scores.get(row, 0) + 1 / (k + rank)
        return ordered(scores)

    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        score(f"cosine and share {share}", lambda i, share=share: shared(i, share))
    for share in (0.2, 0.3, 0.4, 0.5, 0.6):
        score(f"cosine stretched and share {share}", lambda i, share=share: spread(i, share))
    for k in (10, 60):
        score(f"ranks fused, k={k}", lambda i, k=k: of_ranks(i, k))
    return {"n_passages": n, "n_queries": len(wanted), "ndcg_and_recall": tables}


def code_texts(target: Path) -> Iterator[Path]:
    """Source files of installed packages, copied."""
    for root in sources():
        for path in sorted(root.rglob("*.py")):
            if path.is_file() and 2000 < path.stat().st_size < 400_000:
                copy = target / "__".join(path.relative_to(root).parts)
                copy.write_bytes(path.read_bytes())
                yield copy


def questions() -> list[str]:
    """Summaries of docstrings."""
    task = docstring_task()
    step = max(1, len(task.queries) // N_QUESTIONS)
    return list(task.queries[::step][:N_QUESTIONS])


def quantiles(times: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ms = np.sort(np.array(times)) * 1000
    return {"p50_ms": float(np.median(ms)), "p99_ms": float(np.quantile(ms, 0.99))}


def latency(work: Path, embedder: Embedder, sizes: list[int]) -> dict[str, Any]:
    """Questions at several sizes."""
    folder = work / "code"
    folder.mkdir()
    place = work / "code.index"
    asked = questions()
    result: dict[str, Any] = {}
    waiting, n_bytes = code_texts(folder), 0
    for size in sizes:
        # About 650 bytes of code for a passage; more files until there are enough.
        while True:
            report = make_index(
                place,
                embedder,
                Wanted(folders={folder: None}, include=["*.py"], gitignore=False),
                model=BUILTIN,
            )
            if report.n_passages >= size or not waiting:
                break
            need = (size - report.n_passages) * 650
            n_bytes = 0
            for path in waiting:
                n_bytes += path.stat().st_size
                if n_bytes > need:
                    break
            else:
                waiting = iter(())
                break
        figures: dict[str, Any] = {}
        with Index.open(place) as index:
            figures["n_passages"] = index.status().n_passages
            figures["index_bytes"] = index.status().n_bytes
            for by in ("both", "meaning", "words"):
                for text in asked[:5]:
                    index.search(text, embedder, by=by)  # type: ignore[arg-type]
                times = []
                for text in asked:
                    begin = time.perf_counter()
                    index.search(text, embedder, by=by)  # type: ignore[arg-type]
                    times.append(time.perf_counter() - begin)
                figures[by] = quantiles(times)
            times = []
            for text in asked[:50]:
                begin = time.perf_counter()
                index.search(text, embedder, paths=["_*"])
                times.append(time.perf_counter() - begin)
            figures["both, filtered by path"] = quantiles(times)
        print(json.dumps({size: figures}), file=sys.stderr, flush=True)
        figures["cold_s"] = cold(place, asked[0])
        result[f"{size}"] = figures
        print(json.dumps({size: figures}), file=sys.stderr)
    return result


def cold(place: Path, question: str) -> list[float]:
    """A whole `gguf-embed search --index`, in seconds, three times."""
    times: list[float] = []
    command = [sys.executable, "-m", "gguf_embed", "search", question, "--index", str(place)]
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return times


def lancedb_figures(work: Path, embedder: Embedder) -> dict[str, Any]:
    """The passages and vectors of `latency` in LanceDB."""
    begin = time.perf_counter()
    import lancedb  # type: ignore[import-not-found]
    import pyarrow as pa  # type: ignore[import-not-found]
    from lancedb.index import FTS  # type: ignore[import-not-found]

    result: dict[str, Any] = {
        "version": lancedb.__version__,
        "import_s": time.perf_counter() - begin,
    }
    from gguf_embed.index.generations import open_parts, read_facts

    generation = work / "code.index" / "1"
    facts = read_facts(generation)
    tables, file = open_parts(generation, facts, writable=False)
    with tables:
        files = tables.files()
        n_rows = tables.n_rows()
        vectors = file.rows(n_rows)
        texts: list[str] = []
        rows: list[int] = []
        for each in files:
            texts += [stored.passage.text for stored in tables.passages_of(each.id)]
            rows += range(each.first_row, each.first_row + each.n_rows)
    taken = np.ascontiguousarray(vectors[rows])
    place = work / "lance"
    database = lancedb.connect(place)
    flat = pa.array(taken.reshape(-1), pa.float32())
    table = pa.table(
        {"text": texts, "vector": pa.FixedSizeListArray.from_arrays(flat, facts.space.dim)}
    )
    begin = time.perf_counter()
    made = database.create_table("passages", table)
    result["write_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    made.create_index("text", config=FTS(with_position=True))
    result["words_index_s"] = time.perf_counter() - begin
    result["n_passages"] = made.count_rows()
    result["bytes"] = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    asked = questions()
    vectors_of = [embedder.encode_query(text) for text in asked]

    def both(i: int) -> Any:
        query = embedder.encode_query(asked[i])
        search = made.search(query_type="hybrid").vector(query).text(asked[i])
        return search.limit(TOP).to_list()

    ways: dict[str, Callable[[int], Any]] = {
        "meaning": lambda i: made.search(embedder.encode_query(asked[i])).limit(TOP).to_list(),
        "words": lambda i: made.search(asked[i], query_type="fts").limit(TOP).to_list(),
        "both": both,
    }
    assert len(vectors_of) == len(asked)
    for by, way in ways.items():
        try:
            for i in range(5):
                way(i)
            times = []
            for i in range(len(asked)):
                begin = time.perf_counter()
                way(i)
                times.append(time.perf_counter() - begin)
            result[by] = quantiles(times)
        except Exception as error:
            result[by] = f"{type(error).__name__}: {error}"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["corpus", "finds", "latency"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--files", type=int, default=800, help="of the corpus, at most about")
    parser.add_argument("--bodies", type=int, help="of the docstrings; default: all")
    parser.add_argument("--sizes", default="1000,10000,100000")
    args = parser.parse_args()
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    result: dict[str, Any] = {"cpu": cpu, "n_cores": len(os.sched_getaffinity(0))}
    work = Path(tempfile.mkdtemp(prefix="gguf_embed-index-"))
    try:
        if "corpus" in args.parts or "finds" in args.parts:
            with Embedder.open() as embedder:
                if "corpus" in args.parts:
                    result["corpus"] = corpus(work, embedder, args.files)
                if "finds" in args.parts:
                    result["finds"] = finds(work, embedder, args.bodies)
        if "latency" in args.parts or "lancedb" in args.parts:
            with RandomVectors.open() as embedder:
                sizes = [int(size) for size in args.sizes.split(",")]
                result["latency"] = latency(work, embedder, sizes)
                if "lancedb" in args.parts:
                    result["lancedb"] = lancedb_figures(work, embedder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for part, figures in result.items():
        print(f"{part}: {json.dumps(figures, indent=1) if isinstance(figures, dict) else figures}")
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
