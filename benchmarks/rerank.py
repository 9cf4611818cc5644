"""What a prefix that is computed once gains a reranker, and pairs/s beside llama-server.

    python benchmarks/rerank.py MODEL.gguf [--llama-server PATH] [--out rerank.json]

Each query is scored with all documents: by us as it runs, by us with the prefix computed for each
pair, by llama-server's /v1/rerank as it comes and with the flags of `SERVER_FLAGS`. Rounds are
interleaved, in another order each. A time counts only if the scores agree with ours. The documents
are docstrings (workloads.py), the queries their summary lines. shapes.py makes a file of random
weights in a reranker's shape. Run it on a quiet machine.

Prints a table and one line of JSON last; `--out` keeps that in a file.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import workloads

from gguf_embed import Reranker, Settings
from gguf_embed.engine.backend import Backend, BatchLimits, Head, Outcome
from gguf_embed.engine.opening import open_reranker
from gguf_embed.native.model import Tokens
from gguf_embed.vectors import Vectors

SERVER_START_S = 300
SERVER_FLAGS: dict[str, list[str]] = {
    "llama-server": [],
    "llama-server, 8 slots": ["--parallel", "8", "--ctx-size", "16384"],
    "llama-server, 8 slots, batch 2048": [
        *("--parallel", "8", "--ctx-size", "16384"),
        *("--batch-size", "2048", "--ubatch-size", "2048"),
    ],
}
MOST_CHARACTERS = 1000  # of a document: a passage, and within llama-server's microbatch
SAME = 0.05  # scores of quantized weights depend on the rows of a microbatch

Score = Callable[[str, Sequence[str]], Vectors]


class Unshared:
    """A backend that is never asked to compute a prefix once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def dim(self) -> int:
        return self._backend.dim

    @property
    def specials(self) -> frozenset[int]:
        return self._backend.specials

    @property
    def limits(self) -> BatchLimits:
        return replace(self._backend.limits, max_prefix=0)

    def tokenize(self, text: str) -> Tokens:
        return self._backend.tokenize(text)

    def contexts_for(self, n_tokens: int, head: Head) -> int:
        return self._backend.contexts_for(n_tokens, head)

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        assert not n_prefix
        return self._backend.run(sequences, head=head, n_contexts=n_contexts)

    def close(self) -> None:
        """The other one closes it."""


class Server:
    """llama-server with --reranking."""

    def __init__(self, binary: str, model: str, n_threads: int, flags: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        command = [binary, "--model", model, "--reranking", "--offline", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--threads", str(n_threads)]
        command += ["--threads-batch", str(n_threads), *flags]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + SERVER_START_S
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise RuntimeError(f"llama-server does not start: {' '.join(command)}")
            try:
                self._ask("GET", "/health", None)
                return
            except (OSError, http.client.HTTPException, RuntimeError):  # 503 while loading
                time.sleep(0.05)

    def score(self, query: str, documents: Sequence[str]) -> Vectors:
        body = json.dumps({"query": query, "documents": list(documents)})
        rows = sorted(self._ask("POST", "/v1/rerank", body)["results"], key=lambda r: r["index"])
        return np.array([row["relevance_score"] for row in rows], np.float32)

    def _ask(self, method: str, path: str, body: str | None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1800)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"HTTP {response.status}: {content[:300].decode(errors='replace')}")
        return json.loads(content)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-server", help="binary; without it only we run")
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-tune", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)

    settings = Settings(tune=not args.no_tune, n_threads=args.threads)
    with ExitStack() as held:
        opened = open_reranker(args.model, settings, on_status=print)
        ours = held.enter_context(Reranker.of(opened))
        unshared = Reranker.of(replace(opened, backend=Unshared(opened.backend)))
        held.callback(unshared.close)
        entries: dict[str, Score] = {"shared": ours.score, "unshared": unshared.score}
        for name, flags in SERVER_FLAGS.items() if args.llama_server else ():
            server = Server(args.llama_server, str(args.model), args.threads, flags)
            held.callback(server.close)
            entries[name] = server.score

        made = workloads.make("mixed", 8 * args.documents, lambda text: len(text) // 4).texts
        documents = [text for text in made if len(text) <= MOST_CHARACTERS][: args.documents]
        queries = workloads.make("single", args.queries, lambda text: len(text) // 4).texts
        raw = opened.mode.encoder  # llama-server gives logits there
        expected = {query: ours.score(query, documents) for query in queries}
        n_tokens = sum(
            each.n_tokens for query in queries for each in ours.rank(query, documents, top=None)
        )
        apart: dict[str, float] = {}
        for name, score in entries.items():
            found = {query: score(query, documents) for query in queries}
            if raw and name.startswith("llama-server"):
                found = {query: 1 / (1 + np.exp(-scores)) for query, scores in found.items()}
            apart[name] = max(float(np.abs(found[q] - expected[q]).max()) for q in queries)
            print(f"{name}: scores differ from ours by up to {apart[name]:.4f}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in entries}
        order = list(entries)
        for index in range(args.rounds):
            random.Random(index).shuffle(order)
            for name in order:
                began = time.perf_counter()
                for query in queries:
                    entries[name](query, documents)
                seconds[name].append(time.perf_counter() - began)
                print(f"round {index + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
        run_settings = repr(opened.run)

    n_pairs = args.queries * args.documents
    rows: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        agrees = apart[name] <= SAME
        ratios = [theirs / us for us, theirs in zip(seconds["shared"], times, strict=True)]
        rows[name] = {
            "pairs_per_s": n_pairs / statistics.median(times) if agrees else None,
            "shared_is_times": statistics.median(ratios) if agrees else None,
            "seconds": times,
            "largest_difference": apart[name],
        }
        shown = f"{rows[name]['pairs_per_s']:8.2f} pairs/s" if agrees else "other scores"
        factor = f"  shared is {statistics.median(ratios):.2f} x" if agrees else ""
        print(f"{name:36} {shown}{factor}  largest difference {apart[name]:.4f}")
    run = {
        **machine.facts(args.llama_server),
        "model": args.model.name,
        "n_queries": args.queries,
        "n_documents": args.documents,
        "n_tokens": n_tokens,
        "run_settings": run_settings,
        "engines": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(run, indent=1) + "\n")
    print(json.dumps(run))


if __name__ == "__main__":
    sys.exit(main())
