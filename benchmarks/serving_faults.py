"""Does a server stay right, and the same size, whatever is done to it?

    python benchmarks/serving_faults.py MODEL.gguf --seconds 600             # mixed traffic
    python benchmarks/serving_faults.py MODEL.gguf --seconds 300 --kill-every 20
    python benchmarks/serving_faults.py MODEL.gguf --seconds 60 --reranker RERANKER.gguf

Starts `gguf-embed serve` and asks it over --connections: queries and documents in every dialect,
pairs where there is a --reranker, clients that go away, bodies that are none. Every vector and
every score is compared with the engine's own. With --kill-every the processes that compute are
killed again and again: their texts are computed anew, so that only a request whose text is alone
with the kills may fail, with 500 and a message. Memory, descriptors and threads of the server are
read each --look seconds. Ends in a line of JSON, and in status 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import workloads
from load import Vectors
from serving import free_port, started

from gguf_embed import Embedder, Reranker
from gguf_embed.server.offers import offer_of

NONSENSE = (
    b'{"model": "x", "input": NaN}',
    b'{"input": "\xff\xfe"}',
    b"[" * 5000,
    b'{"input": "x", "dimensions": 1e999}',
    b"",
)
# Path, body of texts, vectors of an answer.
Dialect = tuple[str, Callable[[str, list[str]], object], Callable[[Any], object]]
DIALECTS: tuple[Dialect, ...] = (
    (
        "/v1/embeddings",
        lambda model, texts: {"model": model, "input": texts},
        lambda said: [each["embedding"] for each in said["data"]],
    ),
    (
        "/api/embed",
        lambda model, texts: {"model": model, "input": texts},
        lambda said: said["embeddings"],
    ),
    ("/embed", lambda model, texts: {"inputs": texts}, lambda said: said),
    (
        "/v2/embed",
        lambda model, texts: {"model": model, "texts": texts, "embedding_types": ["float"]},
        lambda said: said["embeddings"]["float"],
    ),
)


LEAST_COSINE = 0.999  # of a vector to the engine's own: a text may share a microbatch with others
MOST_APART = 0.02  # of a score from the engine's own
N_QUERIES = 4  # of pairs
N_TEXTS = 150  # short ones, and as many documents


@dataclass(kw_only=True)
class Traffic:
    """Requests until a time, and what came of them."""

    port: int
    model: str
    texts: list[str]
    expected: Vectors
    reranker: str | None = None
    scores: Vectors | None = None  # of the first texts as queries, with all texts
    seen: Counter[str] = field(default_factory=Counter[str])
    failures: Counter[str] = field(default_factory=Counter[str])
    n_wrong: int = 0
    min_cosine: float = 1.0
    most_apart: float = 0.0

    async def client(self, number: int, end: float) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            try:
                await self.one(chance)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.seen[f"connection: {type(error).__name__}"] += 1

    async def one(self, chance: random.Random) -> None:
        size = chance.choice((1, 1, 1, 1, 4, 16))
        rows = [chance.randrange(len(self.texts)) for _ in range(size)]
        texts = [self.texts[row] for row in rows]
        if self.reranker is not None and chance.random() < 0.1:
            query = chance.randrange(N_QUERIES)
            path = "/v1/rerank"
            said = {"model": self.reranker, "query": self.texts[query], "documents": texts}
            check = partial(self.check_scores, query, rows)
        else:
            path, body_of, vectors_of = chance.choice(DIALECTS)
            said = body_of(self.model, texts)
            check = partial(self.check_vectors, rows, vectors_of)
        body = json.dumps(said).encode()
        what = chance.random()
        if what < 0.03:
            body = chance.choice(NONSENSE)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            if 0.03 <= what < 0.06:
                await asyncio.sleep(chance.random() * 0.05)
                self.seen["went away"] += 1
                return
            answer_head = (await reader.readuntil(b"\r\n\r\n")).lower()
            at = answer_head.index(b"content-length:") + 15
            length = int(answer_head[at : answer_head.index(b"\r\n", at)])
            answer = await reader.readexactly(length)
        finally:
            writer.close()
        status = int(answer_head[9:12])
        self.seen[f"{'nonsense ' if what < 0.03 else ''}{status}"] += 1
        if status == 200:
            check(json.loads(answer))
        elif what >= 0.03:
            self.failures[f"{status} {answer[:200].decode()}"] += 1

    def check_vectors(
        self, rows: list[int], vectors_of: Callable[[Any], object], said: object
    ) -> None:
        vectors = np.array(vectors_of(said), np.float32)
        cosines = (vectors * self.expected[rows]).sum(axis=1)
        self.min_cosine = min(self.min_cosine, float(cosines.min()))
        self.n_wrong += int((cosines < LEAST_COSINE).sum())

    def check_scores(self, query: int, rows: list[int], said: Any) -> None:
        assert self.scores is not None
        got = np.empty(len(rows))
        for result in said["results"]:
            got[result["index"]] = result["relevance_score"]
        apart = np.abs(got - self.scores[query, rows])
        self.most_apart = max(self.most_apart, float(apart.max()))
        self.n_wrong += int((apart > MOST_APART).sum())


def computing(server: psutil.Process) -> list[psutil.Process]:
    """The children that hold the models: there may be none for a moment."""
    found: list[psutil.Process] = []
    for child in server.children():
        with suppress(psutil.Error):
            if "gguf_embed.engine.hosted" in child.cmdline():
                found.append(child)
    return found


def size_of(server: psutil.Process) -> dict[str, int]:
    children = 0
    for child in computing(server):
        with suppress(psutil.Error):
            children += child.memory_info().rss
    return {
        "memory_mib": server.memory_info().rss >> 20,
        "memory_of_children_mib": children >> 20,
        "descriptors": server.num_fds(),
        "threads": server.num_threads(),
    }


async def look_now_and_then(
    server: psutil.Process, every_s: float, end: float, sizes: list[dict[str, int]]
) -> None:
    while time.monotonic() + every_s < end:
        await asyncio.sleep(every_s)
        sizes.append(size_of(server))
        print(sizes[-1], file=sys.stderr, flush=True)


async def kill_now_and_then(server: psutil.Process, every_s: float, end: float) -> int:
    n = 0
    while time.monotonic() + every_s < end:
        await asyncio.sleep(every_s)
        for child in computing(server):
            with suppress(psutil.Error):
                child.kill()
                n += 1
    return n


async def run(args: argparse.Namespace, server: psutil.Process, traffic: Traffic) -> dict[str, Any]:
    async def ask(end: float) -> None:
        await asyncio.gather(*(traffic.client(n, end) for n in range(args.connections)))

    await ask(time.monotonic() + min(20.0, args.seconds / 5))  # until all threads and buffers are
    traffic.seen.clear()
    sizes = [size_of(server)]
    end = time.monotonic() + args.seconds
    looking = asyncio.ensure_future(look_now_and_then(server, args.look, end, sizes))
    n_kills = 0
    if args.kill_every:
        n_kills, _ = await asyncio.gather(kill_now_and_then(server, args.kill_every, end), ask(end))
    else:
        await ask(end)
    await looking
    await asyncio.sleep(1)
    sizes.append(size_of(server))
    return {
        "answers": dict(traffic.seen),
        "failures": dict(traffic.failures.most_common(10)),
        "n_wrong": traffic.n_wrong,
        "min_cosine": traffic.min_cosine,
        "most_apart": traffic.most_apart,
        "n_kills": n_kills,
        "sizes": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Load and faults.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--reranker", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--kill-every", type=float, metavar="SECONDS")
    parser.add_argument("--look", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with Embedder.open(args.model, isolated=True) as embedder:
        texts = list(workloads.make("single", N_TEXTS, len).texts)
        texts += workloads.make("mixed", N_TEXTS, lambda text: len(embedder.tokenize(text))).texts
        expected = embedder.encode(texts)
    scores = None
    if args.reranker:
        with Reranker.open(args.reranker, isolated=True) as reranker:
            scores = np.stack([reranker.score(query, texts) for query in texts[:N_QUERIES]])
    port = free_port()
    command = [sys.executable, "-m", "gguf_embed", "serve", "--model", str(args.model)]
    command += ["--model", str(args.reranker)] if args.reranker else []
    command += ["--port", str(port), "--preload", "--quiet"]
    with ExitStack() as stack:
        server = psutil.Process(started(stack, command, port, "/ready"))
        traffic = Traffic(
            port=port,
            model=offer_of(str(args.model)).id,
            texts=texts,
            expected=expected,
            reranker=offer_of(str(args.reranker)).id if args.reranker else None,
            scores=scores,
        )
        report = asyncio.run(run(args, server, traffic))
    line = json.dumps(report)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)
    sys.exit(1 if traffic.n_wrong else 0)


if __name__ == "__main__":
    main()
