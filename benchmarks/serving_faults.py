"""Does a server stay right, and the same size, whatever is done to it?

    python benchmarks/serving_faults.py MODEL.gguf --minutes 10              # mixed traffic
    python benchmarks/serving_faults.py MODEL.gguf --minutes 5 --kill-every 20

Starts `gguf-embed serve` and asks it over --connections: queries and documents in every dialect,
clients that go away, bodies that are none. Every vector is compared with the engine's own. With
--kill-every the process that computes is killed again and again: its texts are computed anew, so
that only a request whose text is alone with the kills may fail, with 500 and a message. Memory,
descriptors and threads of the server are read at the start and at the end. Ends in a line of JSON.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import workloads
from load import Vectors
from serving import free_port, started

from gguf_embed import Embedder
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


class Traffic:
    """Requests until a time, and what came of them."""

    def __init__(self, port: int, model: str, texts: list[str], expected: Vectors) -> None:
        self.port, self.model, self.texts, self.expected = port, model, texts, expected
        self.seen = Counter[str]()
        self.min_cosine = 1.0
        self.failures = Counter[str]()

    async def client(self, number: int, end: float) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            try:
                await self.one(chance)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.seen[f"connection: {type(error).__name__}"] += 1

    async def one(self, chance: random.Random) -> None:
        path, body_of, vectors_of = chance.choice(DIALECTS)
        size = chance.choice((1, 1, 1, 1, 4, 16))
        rows = [chance.randrange(len(self.texts)) for _ in range(size)]
        body = json.dumps(body_of(self.model, [self.texts[row] for row in rows])).encode()
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
            vectors = np.array(vectors_of(json.loads(answer)), np.float32)
            cosines = (vectors * self.expected[rows]).sum(axis=1)
            self.min_cosine = min(self.min_cosine, float(cosines.min()))
        elif what >= 0.03:
            self.failures[f"{status} {answer[:200].decode()}"] += 1


def computing(server: psutil.Process) -> list[psutil.Process]:
    return [
        child
        for child in server.children()
        if "gguf_embed.engine.hosted" in " ".join(child.cmdline())
    ] or server.children()


def size_of(server: psutil.Process) -> dict[str, int]:
    return {
        "memory_bytes": server.memory_info().rss,
        "descriptors": server.num_fds(),
        "threads": server.num_threads(),
    }


async def kill_now_and_then(server: psutil.Process, every_s: float, end: float) -> int:
    n = 0
    while time.monotonic() + every_s < end:
        await asyncio.sleep(every_s)
        for child in computing(server):
            child.kill()
            n += 1
    return n


async def run(args: argparse.Namespace, port: int, traffic: Traffic) -> dict[str, Any]:
    server = next(
        process
        for process in psutil.Process().children()
        if any(each.laddr.port == port for each in process.net_connections() if each.laddr)
    )
    warm = time.monotonic() + min(20.0, 6 * args.minutes)
    await asyncio.gather(*(traffic.client(n, warm) for n in range(args.connections)))
    before = size_of(server)
    traffic.seen.clear()
    end = time.monotonic() + 60 * args.minutes
    clients = [traffic.client(n, end) for n in range(args.connections)]
    killing = (
        kill_now_and_then(server, args.kill_every, end) if args.kill_every else asyncio.sleep(0)
    )
    n_kills, *_ = await asyncio.gather(killing, *clients)
    await asyncio.sleep(1)
    return {
        "answers": dict(traffic.seen),
        "failures": dict(traffic.failures.most_common(10)),
        "min_cosine": traffic.min_cosine,
        "n_kills": n_kills or 0,
        "before": before,
        "after": size_of(server),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Load and faults.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--kill-every", type=float, metavar="SECONDS")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with Embedder.open(args.model) as embedder:
        texts = list(workloads.make("mixed", 400, lambda text: len(embedder.tokenize(text))).texts)
        texts += workloads.make("single", 400, len).texts
        expected = embedder.encode(texts)
    port = free_port()
    command = [sys.executable, "-m", "gguf_embed", "serve", "--model", str(args.model)]
    command += ["--port", str(port), "--preload", "--quiet"]
    with ExitStack() as stack:
        started(stack, command, port, "/ready")
        traffic = Traffic(port, offer_of(str(args.model)).id, texts, expected)
        report = asyncio.run(run(args, port, traffic))
    line = json.dumps(report)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
