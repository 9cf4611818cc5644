"""An index of a real corpus: time, size, updates, latency, and how well it finds.

    python benchmarks/index.py [corpus] [finds] [latency] [lancedb] [--out index.json]

corpus   texts of the standard library and installed packages (.md, .rst, .txt, and a page of
         docstrings for each module), with `--docs` CPython's documentation: first run, size, a run
         after nothing, after 1 % of the files have changed, latency, and how many of the ten
         passages that a full product of float64 puts first are found through the coarse copy, and
         by words and meaning together. Its documentation, from Debian:
           apt-get download python3.11-doc && dpkg-deb -x python3.11-doc_*.deb x
           --docs x/usr/share/doc/python3.11/html/_sources
finds    a docstring's body by its summary (gguf_embed.lab.docstrings), each body a file: nDCG@10
         and recall@10 of meaning, words and both, at several shares of the words, and by ranks
latency  questions at 1,000, 10,000 and 100,000 passages: source code of installed packages, cut at
         about 650 characters. Their vectors are those of the longest line of each, by the model
         (`--vectors FILE.npy` keeps them), since embedding all of the text takes an hour
lancedb  the same passages and vectors in LanceDB (pip install lancedb), the same questions; its
         approximate indexes with their recall

Prints tables, and one line of JSON last. The model is the built-in one. Times are wall and CPU: on
a busy machine go by the latter.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gguf_embed import Embedder
from gguf_embed.catalog import BUILTIN
from gguf_embed.index.facts import KnownFile, Passage
from gguf_embed.index.generations import begin, switch
from gguf_embed.index.index import RANKINGS, Index
from gguf_embed.index.making import Wanted, facts_for, make_index
from gguf_embed.index.nearness import Nearness, rows_of
from gguf_embed.index.passages import digest_of
from gguf_embed.index.ranking import best_rows
from gguf_embed.index.vector_file import VectorFile
from gguf_embed.io.folder import FileStamp
from gguf_embed.lab.docstrings import docstring_task
from gguf_embed.vectors import Vectors

SKIPPED = {"RECORD", "top_level.txt", "entry_points.txt", "SOURCES.txt", "requires.txt"}
N_QUESTIONS = 200
TOP = 10


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


def corpus(work: Path, embedder: Embedder, most_files: int, docs: Path | None) -> dict[str, Any]:
    """First run, size, runs after."""
    folder = work / "pages"
    folder.mkdir()
    pages(folder)
    files = sorted(folder.iterdir())
    step = max(1, len(files) // most_files)
    for position, path in enumerate(files):
        if position % step:
            path.unlink()
    n_docs = 0
    for path in sorted(docs.rglob("*.rst.txt")) if docs is not None else ():
        name = "docs__" + "__".join(path.relative_to(docs or path).parts)
        (folder / name.removesuffix(".txt")).write_bytes(path.read_bytes())
        n_docs += 1
    files = sorted(folder.iterdir())
    place = work / "corpus.index"

    def timed() -> tuple[float, Any]:
        """CPU seconds."""
        begin_s, begin_wall_s = time.process_time(), time.perf_counter()
        report = make_index(place, embedder, Wanted(folders={folder: None}), model=BUILTIN)
        result.setdefault("walls_s", []).append(time.perf_counter() - begin_wall_s)
        return time.process_time() - begin_s, report

    result: dict[str, Any] = {}
    first, report = timed()
    result |= {
        "n_files": len(files),
        "n_docs": n_docs,
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
    with Index.open(place) as index:
        ways = [partial(index.search, each, embedder) for each in questions()]
        result["first question"] = Clock.of(ways[:1]).figures()
        result["questions"] = Clock.of(ways).figures()
        result |= recalls(index, embedder)
    result["cold"] = cold(place, questions()[0])
    return result


def recalls(index: Index, embedder: Embedder) -> dict[str, float]:
    """Shares of the ten passages of the greatest cosine, in float64, that are found."""
    facts = index.facts.space
    file = VectorFile(index.place / "1" / "vectors.f32", facts.dim)
    n_rows = file.path.stat().st_size // 4 // facts.dim
    nearness = Nearness(file, n_rows, least_rows=1)
    vectors = nearness.vectors.astype(np.float64)
    found: dict[str, list[float]] = {"coarse": [], "both": []}
    n_multiplied: list[int] = []
    with index._now() as now:  # pyright: ignore[reportPrivateUsage]
        ranges = now.ranges
    for question in questions():
        asked = embedder.encode_query(question)
        near = nearness.near(asked, ranges, TOP)
        n_multiplied.append(len(near.rows))
        best = near.rows[best_rows(near.cosines, TOP)]
        exact = np.full(n_rows, -2.0)
        rows = rows_of(ranges, n_rows)
        exact[rows] = vectors[rows] @ asked
        least = np.sort(exact)[-TOP] - 1e-6  # equal passages are as good
        found["coarse"].append(float((exact[best] >= least).mean()))
        hits = index.search(question, embedder, top=TOP)
        found["both"].append(float(np.mean([(h.similarity or 0) >= least for h in hits])))
    return {
        **{f"recall_{name}": round(float(np.mean(each)), 4) for name, each in found.items()},
        "rows_multiplied": float(np.median(n_multiplied)),
    }


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


def questions() -> list[str]:
    """Summaries of docstrings."""
    task = docstring_task()
    step = max(1, len(task.queries) // N_QUESTIONS)
    return list(task.queries[::step][:N_QUESTIONS])


@dataclass
class Clock:
    """Wall and CPU time of one thing, again and again, in milliseconds."""

    wall: list[float]
    cpu: list[float]

    @classmethod
    def of(cls, ways: Iterable[Callable[[], object]]) -> Clock:
        clock = cls([], [])
        for way in ways:
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            clock.wall.append((time.perf_counter() - wall) * 1000)
            clock.cpu.append((time.process_time() - cpu) * 1000)
        return clock

    def figures(self) -> dict[str, float]:
        return {
            f"{name}_{label}_ms": round(float(np.quantile(times, share)), 1)
            for name, times in (("wall", self.wall), ("cpu", self.cpu))
            for label, share in (("p50", 0.5), ("p99", 0.99))
        }


def code_passages(n: int) -> Iterator[tuple[Path, list[Passage]]]:
    """So many passages of source files."""
    for root in (*sources(), Path(sysconfig.get_path("stdlib")).parent):
        for path in sorted(root.rglob("*.py")):
            if not path.is_file() or not 2000 < path.stat().st_size < 400_000:
                continue
            text = path.read_bytes().decode("utf-8", "replace")
            found: list[Passage] = []
            start, line = 0, 1
            while start < len(text) and len(found) < n:
                end = text.rfind("\n", start + 300, start + 650) + 1 or start + 650
                part = text[start:end]
                last = line + part.count("\n")
                if part.strip():
                    found.append(
                        Passage(
                            digest=digest_of(part.encode()),
                            text=part,
                            headings=(),
                            start=start,
                            end=start + len(part),
                            first_line=line,
                            last_line=last,
                        )
                    )
                start, line = end, last
            n -= len(found)
            if found:
                yield path, found
            if n <= 0:
                return


def vectors_of_lines(embedder: Embedder, n: int, kept: Path | None) -> Vectors:
    """A vector for each passage of the code: that of its longest line."""
    if kept is not None and kept.exists() and len(vectors := np.load(kept)) >= n:
        return vectors[:n]
    texts = [
        " ".join(max(passage.text.splitlines(), key=lambda line: len(line.strip()))[:120].split())
        for _, passages in code_passages(n)
        for passage in passages
    ]
    vectors = embedder.encode(texts, prompt=embedder.prompt("document"))
    if kept is not None:
        np.save(kept, vectors)
    return vectors


def fill(place: Path, embedder: Embedder, vectors: Vectors) -> dict[str, Any]:
    """An index of as much code as there are vectors, without cutting by tokens or embedding."""
    facts = facts_for(embedder, BUILTIN)
    place.mkdir()
    wall, cpu = time.perf_counter(), time.process_time()
    tables, file = begin(place, 1, facts)
    switch(place, 1)
    stamp = FileStamp(n_bytes=1, mtime_ns=1, ctime_ns=1)
    with tables:
        with tables.writing():
            tables.set_folder(Path("/"), "")
        n_rows, batch = 0, list[tuple[Path, list[Passage]]]()

        def write() -> None:
            nonlocal n_rows
            n = sum(len(passages) for _, passages in batch)
            file.append(vectors[n_rows : n_rows + n], n_rows)
            with tables.writing():
                for path, passages in batch:
                    known = KnownFile(
                        id=0,
                        folder=1,
                        name=str(path.relative_to("/")),
                        digest=b"",
                        stamp=stamp,
                        first_row=n_rows,
                        n_rows=len(passages),
                    )
                    tables.add_file(known, passages)
                    n_rows += len(passages)
                tables.set_fact("n_rows", str(n_rows))
            batch.clear()

        for each in code_passages(len(vectors)):
            batch.append(each)
            if sum(len(passages) for _, passages in batch) > 4000:
                write()
        write()
        with tables.writing():
            tables.set_fact("unfinished", "0")
            tables.optimize()
    return {
        "n_passages": n_rows,
        "write_wall_s": round(time.perf_counter() - wall, 1),
        "write_cpu_s": round(time.process_time() - cpu, 1),
        "index_bytes": sum(p.stat().st_size for p in place.rglob("*") if p.is_file()),
    }


def latency(work: Path, embedder: Embedder, sizes: list[int], kept: Path | None) -> dict[str, Any]:
    """Questions at several sizes."""
    asked = questions()
    all_vectors = vectors_of_lines(embedder, max(sizes), kept)
    result: dict[str, Any] = {
        "question alone": Clock.of(partial(embedder.encode_query, each) for each in asked).figures()
    }
    for size in sizes:
        place = work / f"code-{size}.index"
        figures = fill(place, embedder, all_vectors[:size])
        with Index.open(place) as index:
            first = Clock.of([partial(index.search, asked[0], embedder)])
            figures["first question"] = first.figures()
            for by in RANKINGS:
                ways = [partial(index.search, each, embedder, by=by) for each in asked[1:]]
                figures[f"{by}, words for the first time"] = Clock.of(ways).figures()
                figures[by] = Clock.of(ways).figures()
            ways = [partial(index.search, each, embedder, paths=["_*"]) for each in asked[:50]]
            figures["both, filtered by path"] = Clock.of(ways).figures()
        figures["cold"] = cold(place, asked[0])
        result[f"{size}"] = figures
        print(json.dumps({size: figures}), file=sys.stderr, flush=True)
    return result


def cold(place: Path, question: str) -> dict[str, Any]:
    """A whole `gguf-embed search --index`, three times."""
    command = [sys.executable, "-m", "gguf_embed", "search", question, "--index", str(place)]
    result: dict[str, Any] = {}
    for by in ("both", "words"):
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            begin_s = time.perf_counter()
            subprocess.run([*command, "--by", by], check=True, capture_output=True)
            wall = time.perf_counter() - begin_s
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            result.setdefault(f"{by}_wall_s", []).append(round(wall, 2))
            result.setdefault(f"{by}_cpu_s", []).append(round(cpu, 2))
    return result


def lancedb_figures(work: Path, embedder: Embedder, size: int, kept: Path | None) -> dict[str, Any]:
    """The passages and vectors of `latency` in LanceDB."""
    begin_s = time.perf_counter()
    import lancedb  # type: ignore[import-not-found]
    import pyarrow as pa  # type: ignore[import-not-found]
    from lancedb.index import FTS, HnswSq, IvfPq  # type: ignore[import-not-found]

    result: dict[str, Any] = {
        "version": lancedb.__version__,
        "import_s": time.perf_counter() - begin_s,
    }
    vectors = vectors_of_lines(embedder, size, kept)
    texts = [passage.text for _, passages in code_passages(size) for passage in passages]
    place = work / "lance"
    database = lancedb.connect(place)
    flat = pa.array(vectors.reshape(-1), pa.float32())
    table = pa.table(
        {"text": texts, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    )

    def timed(name: str, way: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        made = way()
        result[f"{name}_wall_s"] = round(time.perf_counter() - wall, 1)
        result[f"{name}_cpu_s"] = round(time.process_time() - cpu, 1)
        return made

    made = timed("write", lambda: database.create_table("passages", table))
    timed("words_index", lambda: made.create_index("text", config=FTS()))
    result["n_passages"] = made.count_rows()
    result["bytes"] = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    asked = questions()
    queries = [embedder.encode_query(each) for each in asked]
    exact = [set(np.argsort(-(vectors @ query))[:TOP].tolist()) for query in queries]

    def nearest(query: Any, **refined: int) -> Any:
        search = made.search(query).distance_type("cosine").with_row_id(True).limit(TOP)
        for name, value in refined.items():
            search = getattr(search, name)(value)
        return search.select(["_rowid"]).to_list()

    def both(text: str, query: Any) -> Any:
        return made.search(query_type="hybrid").vector(query).text(text).limit(TOP).to_list()

    def measure(name: str, ways: Sequence[Callable[[], Any]]) -> None:
        for way in ways[:5]:
            way()
        result[name] = Clock.of(ways).figures()

    measure("meaning, exact", [partial(nearest, query) for query in queries])
    words = [partial(made.search, each, query_type="fts") for each in asked]
    measure("words", [lambda way=way: way().limit(TOP).to_list() for way in words])
    measure("both, exact", [partial(both, *each) for each in zip(asked, queries, strict=True)])
    kinds = {
        "IVF_PQ": (IvfPq(distance_type="cosine"), {"refine_factor": 10}),
        "IVF_HNSW_SQ": (HnswSq(distance_type="cosine"), {"refine_factor": 2}),
    }
    for name, (config, refined) in kinds.items():
        before = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        timed(name, lambda config=config: made.create_index("vector", config=config, replace=True))
        after = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        result[f"{name}_bytes"] = after - before
        for nprobes in (20, 100):
            how = {"nprobes": nprobes, **refined}
            ways = [partial(nearest, query, **how) for query in queries]
            measure(f"{name}, {nprobes} probes", ways)
            found = [{row["_rowid"] for row in way()} for way in ways]
            shares = [len(a & b) / TOP for a, b in zip(found, exact, strict=True)]
            result[f"{name}, {nprobes} probes"]["recall"] = round(float(np.mean(shares)), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["corpus", "finds", "latency"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--files", type=int, default=800, help="of the corpus, at most about")
    parser.add_argument("--docs", type=Path, help="a folder of .rst.txt, for the corpus")
    parser.add_argument("--bodies", type=int, help="of the docstrings; default: all")
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--vectors", type=Path, metavar="FILE.npy", help="those of latency, kept")
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
                    result["corpus"] = corpus(work, embedder, args.files, args.docs)
                if "finds" in args.parts:
                    result["finds"] = finds(work, embedder, args.bodies)
        if "latency" in args.parts or "lancedb" in args.parts:
            with Embedder.open() as embedder:
                sizes = [int(size) for size in args.sizes.split(",")]
                if "latency" in args.parts:
                    result["latency"] = latency(work, embedder, sizes, args.vectors)
                if "lancedb" in args.parts:
                    result["lancedb"] = lancedb_figures(work, embedder, max(sizes), args.vectors)
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
