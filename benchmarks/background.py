"""What `gguf-embed index --background` costs a program that somebody waits for.

    python benchmarks/background.py [--seconds 6] [--rounds 7] [--out background.json]

The foreground is a loop of sums on every core, each counting what it does in a span, and a process
that wakes up every 10 ms and notes how late it was. Spans are interleaved, in another order each
round:

alone       nothing beside it
background  `index --background` beside it
plain       `index` beside it, without manners
quiet       `index --background` and no foreground: which share of the cores it takes then

Prints the foreground's work as a share of what it does alone, how late the one wakes up, how many
cores the index used, and one line of JSON last. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine
import numpy as np
import workloads

N_FILES = 200
TEXTS_PER_FILE = 400
START_S = 120.0
AT_WORK_CPU_S = 6.0  # it has opened the model by then


def work(seconds: float, answer: Connection) -> None:
    """Count sums, which take the same time each."""
    n, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(20_000))
        n += 1
    answer.send(n)


def wake(seconds: float, answer: Connection) -> None:
    """How late a sleeper of 10 ms wakes up, in ms."""
    late: list[float] = []
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        time.sleep(0.01)
        late.append((time.perf_counter() - now - 0.01) * 1000)
    answer.send(late)


def foreground(seconds: float, n_cores: int) -> tuple[int, list[float]]:
    """(work done, lateness) of a span."""
    held: list[tuple[Any, Connection]] = []
    for target in [work] * n_cores + [wake]:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.Process(target=target, args=(seconds, there))
        process.start()
        held.append((process, here))
    answers = [here.recv() for _, here in held]
    for process, _ in held:
        process.join()
    return sum(answers[:-1]), answers[-1]


class Indexing:
    """`gguf-embed index` over many texts, ended when it is no longer wanted."""

    def __init__(self, texts: Path, place: Path, *options: str) -> None:
        shutil.rmtree(place, ignore_errors=True)
        # As in a terminal, where the session is led by a shell.
        command = ["sh", "-c", '"$@"; exit', "sh", sys.executable, "-m", "gguf_embed"]
        command += ["index", str(texts), "-o", str(place)]
        self._process = subprocess.Popen(
            [*command, "--quiet", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + START_S
        while self.cpu_s() < AT_WORK_CPU_S:
            assert self._process.poll() is None, "the index was done, or failed, too early"
            assert time.monotonic() < end, "the index does not begin"
            time.sleep(0.05)

    def cpu_s(self) -> float:
        """CPU seconds of it and of its children."""
        import psutil

        own = psutil.Process(self._process.pid)
        parts = [own, *own.children(recursive=True)]
        return sum(sum(part.cpu_times()[:2]) for part in parts)

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of a span")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    n_cores = len(os.sched_getaffinity(0))
    root = Path(tempfile.mkdtemp(prefix="gguf_embed-background-"))
    texts = root / "texts"
    texts.mkdir()
    made = workloads.make("mixed", TEXTS_PER_FILE, lambda text: len(text) // 4).texts
    for file in range(N_FILES):
        (texts / f"{file}.txt").write_text("\n\n".join(f"{file} {text}" for text in made))
    spans: dict[str, list[Any]] = {name: [] for name in ("alone", "background", "plain", "quiet")}
    try:
        for index in range(args.rounds):
            names = list(spans)
            random.Random(index).shuffle(names)
            for name in names:
                indexing = None
                if name != "alone":
                    options = [] if name == "plain" else ["--background"]
                    indexing = Indexing(texts, root / "made.index", *options)
                before = indexing.cpu_s() if indexing else 0.0
                if name == "quiet":
                    time.sleep(args.seconds)
                    n, late = 0, [0.0]
                else:
                    n, late = foreground(args.seconds, n_cores)
                used = (indexing.cpu_s() - before if indexing else 0.0) / args.seconds
                if indexing is not None:
                    indexing.end()
                spans[name].append((n, late, used))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    rows: dict[str, Any] = {}
    for name, each in spans.items():
        shares = [
            n / max(alone, 1) for (n, *_), (alone, *_) in zip(each, spans["alone"], strict=True)
        ]
        late = [ms for _, lates, _ in each for ms in lates]
        rows[name] = {
            "work_share": round(statistics.median(shares), 3),
            "work_shares": [round(share, 3) for share in shares],
            "late_p50_ms": round(float(np.quantile(late, 0.5)), 2),
            "late_p99_ms": round(float(np.quantile(late, 0.99)), 2),
            "index_cores": round(statistics.median(used for *_, used in each), 2),
        }
        print(
            f"{name:12} work {rows[name]['work_share']:.3f}  late "
            f"{rows[name]['late_p50_ms']:.2f} / {rows[name]['late_p99_ms']:.2f} ms (p50 / p99)  "
            f"cores of the index {rows[name]['index_cores']:.2f}"
        )
    line = json.dumps({**machine.facts(None), "n_cores": n_cores, "spans": rows})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
