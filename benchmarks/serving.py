"""Who serves vectors fastest here: `gguf-embed serve`, llama-server, and the engine without HTTP.

    python benchmarks/serving.py MODEL.gguf --llama-server PATH --out results/serving.json

The same file, threads and texts. All servers run; one is asked at a time, in rounds, in another
order each. llama-server enters once for each of its settings below, and its best counts at each
load. A figure counts only where the vectors agree with the engine's. The engine without HTTP is
asked by as many threads as there are connections. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
import workloads
from load import Answers, Ask, ask, drive

from gguf_embed import Embedder, Settings
from gguf_embed.server.offers import offer_of

CONNECTIONS = (1, 8, 64)
# The workload, how many requests of it there are, and how many of its texts are in each.
LOADS = {
    "1 query": ("single", 512, 1),
    "32 sentences": ("single", 16, 32),  # for a model that takes minutes for 32 documents
    "32 documents": ("mixed", 16, 32),
}
# Slots and microbatch: as it comes, and what its documentation says for embeddings.
LLAMA_SERVER = {
    "llama-server": [],
    "llama-server np16": ["-np", "16", "-b", "2048", "-ub", "2048", "-c", "8192"],
    "llama-server np64": ["-np", "64", "-b", "4096", "-ub", "4096", "-c", "32768"],
}
START_S = 120
LEAST_COSINE = 0.98

Driver = Callable[[Sequence[Ask], int, float], Answers]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(stack: ExitStack, command: list[str], port: int, health: str) -> int:
    """A server, until the stack ends; its process id."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end() -> None:
        process.terminate()
        process.wait()

    stack.callback(end)
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise SystemExit(f"{command[0]} ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{health}") as answer:
                if answer.status == 200:
                    return process.pid
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{command[0]} is not ready after {START_S} s")


def over_http(port: int, first: Ask) -> Driver:
    return lambda asks, n, seconds: asyncio.run(drive(port, asks, n, seconds, first))


def bare(embedder: Embedder, texts_of: dict[int, list[str]]) -> Driver:
    """The engine, asked by threads."""

    def run(asks: Sequence[Ask], n: int, seconds: float) -> Answers:
        answers, lock = Answers(), threading.Lock()
        begin = time.perf_counter()
        end = begin + seconds

        def caller(number: int) -> None:
            turn = number
            while (start := time.perf_counter()) < end:
                each = asks[turn % len(asks)]
                embedder.encode(texts_of[id(each)])
                with lock:
                    answers.latencies_s.append(time.perf_counter() - start)
                    answers.n_tokens += each.n_tokens
                turn += n

        with ThreadPoolExecutor(n) as threads:
            list(threads.map(caller, range(n)))
        answers.seconds = time.perf_counter() - begin
        return answers

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Serving, side by side.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    standard = ["1 query", "32 documents"]
    parser.add_argument("--loads", nargs="+", default=standard, choices=LOADS)
    parser.add_argument("--who", nargs="+", metavar="NAME", help="only these, as in the table")
    parser.add_argument("--requests", type=int, help="different ones: fewer for a slow model")
    parser.add_argument("--timeout", type=float, default=600, help="seconds, of our server")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    with ExitStack() as stack:
        settings = Settings(n_threads=args.threads)
        embedder = stack.enter_context(Embedder.open(args.model, settings=settings, isolated=True))

        def count(text: str) -> int:
            return len(embedder.tokenize(text))

        served = offer_of(str(args.model)).id  # llama-server answers to any name
        loads: dict[str, list[Ask]] = {load: [] for load in args.loads}
        texts_of: dict[int, list[str]] = {}
        for name in args.loads:
            kind, n_requests, size = LOADS[name]
            n_requests = min(args.requests or n_requests, n_requests)
            texts = workloads.make(kind, n_requests * size, count).texts
            for start in range(0, len(texts), size):
                part = list(texts[start : start + size])
                n_tokens = int(embedder.count_tokens(part).sum())
                made = ask(served, part, embedder.encode(part), n_tokens)
                loads[name].append(made)
                texts_of[id(made)] = part

        opening = texts_of[id(loads[args.loads[0]][0])][:1]
        first = ask(served, opening, embedder.encode(opening), 0)
        ours, contenders = free_port(), dict[str, Driver]()
        command = [sys.executable, "-m", "gguf_embed", "serve", "--model", str(args.model)]
        command += ["--port", str(ours), "--preload", "--quiet", "--threads", str(args.threads)]
        command += ["--timeout", str(args.timeout)]
        contenders["engine, no HTTP"] = bare(embedder, texts_of)
        started(stack, command, ours, "/ready")
        contenders["gguf-embed serve"] = over_http(ours, first)
        for name, flags in LLAMA_SERVER.items() if args.llama_server else ():
            port = free_port()
            command = [args.llama_server, "--model", str(args.model), "--embedding", "--offline"]
            command += ["--host", "127.0.0.1", "--port", str(port), "--threads", str(args.threads)]
            command += ["--threads-batch", str(args.threads), *flags]
            started(stack, command, port, "/health")
            contenders[name] = over_http(port, first)

        runs: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
        order = args.who or list(contenders)
        for number in range(args.rounds):
            random.Random(number).shuffle(order)
            for load in args.loads:
                for n in args.connections:
                    for name in order:
                        found = contenders[name](loads[load], n, args.seconds).as_dict()
                        runs.setdefault((load, n, name), []).append(found)
                        print(f"round {number + 1}: {load} x {n}, {name}: {found}", flush=True)

    report = summary(runs)
    print(table(report))
    said = {"facts": machine.facts(args.llama_server), "model": args.model.name, "runs": report}
    line = json.dumps(said)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


def summary(runs: dict[tuple[str, int, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians of the rounds; a contender whose vectors were wrong has no figures."""
    report: list[dict[str, Any]] = []
    for (load, n, name), found in runs.items():
        row: dict[str, Any] = {"load": load, "connections": n, "name": name}
        if min(each["min_cosine"] for each in found) < LEAST_COSINE:
            row["error"] = "its vectors are others"
        else:
            for key in ("requests_per_s", "tokens_per_s", "p50_ms", "p99_ms"):
                row[key] = statistics.median(each[key] for each in found)
        row["rounds"] = found
        report.append(row)
    return report


def table(report: list[dict[str, Any]]) -> str:
    lines = ["load | connections | who | requests/s | tokens/s | p50 ms | p99 ms"]
    for row in report:
        figures = [row.get(key, "-") for key in ("requests_per_s", "tokens_per_s")]
        figures += [row.get(key, "-") for key in ("p50_ms", "p99_ms")]
        shown = [row["load"], row["connections"], row["name"], *figures]
        lines.append(" | ".join(map(str, shown)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
