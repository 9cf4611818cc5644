"""Learning inside the work beside tuning before it: texts/s over runs of several lengths.

    python benchmarks/learning.py [MODEL] [--texts 1000,10000,100000] > learning.json

Each way has a folder of its own for what is kept, so that it begins as on a new machine:

    untuned   the settings of the plan
    inside    a run tries ways within its own work, and every vector counts
    before    `tune` measures first, then the run begins; its time counts

A run may take `--most-s` seconds. A longer one is sampled: it is stopped there, and the rest is
told from its rate in the second half; `sampled` says which. With `--most-s 70` and `--tune-s 60`
the whole takes seven minutes at most. Run it on a quiet machine: under load a run keeps nothing.
The table goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import workloads

WAYS = ("untuned", "inside", "before")
N_CHARS = 60  # of a short text: a sentence, some 12 tokens


def texts(n: int) -> Iterator[str]:
    """Short ones, no two of them alike."""
    words = " ".join(workloads.docstrings()).split()
    sentences = [" ".join(words[at : at + 10])[:N_CHARS] for at in range(0, len(words) - 10, 7)]
    return (f"{text} {number}" for number, text in enumerate(islice(cycle(sentences), n)))


def one_run(model: str | None, way: str, n: int, most_s: float) -> dict[str, Any]:
    """In a process of its own: the seconds of a run, without those of opening."""
    from gguf_embed import Embedder, Settings

    settings = Settings(tune=way != "untuned")
    rows = list(texts(n))
    with (
        Embedder.open(model, settings=settings)
        if model
        else Embedder.open(settings=settings) as embedder
    ):
        embedder.encode(rows[:8], progress=False)
        began = time.perf_counter()
        marks: list[tuple[float, int]] = [(0.0, 0)]
        done = 0
        for block in embedder.stream(iter(rows), window=512):
            done += len(block.vectors)
            marks.append((time.perf_counter() - began, done))
            if marks[-1][0] > most_s:
                break
        seconds = time.perf_counter() - began
    sampled = done < n
    if sampled:
        half = next(mark for mark in marks if mark[1] >= done / 2 or mark is marks[-1])
        half = marks[0] if half is marks[-1] else half
        rate = (done - half[1]) / (marks[-1][0] - half[0])
        seconds = marks[-1][0] + (n - done) / rate
    return {"way": way, "n": n, "seconds": seconds, "sampled": sampled, "computed": done}


def tune(model: str | None, seconds: float, env: dict[str, str]) -> float:
    """Seconds that `gguf-embed tune` takes."""
    command = [sys.executable, "-m", "gguf_embed", "tune", *([model] if model else [])]
    began = time.perf_counter()
    budget = str(max(1, round(seconds)))
    subprocess.run([*command, "--budget", budget], env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as tuned_home:
        tuned = {**os.environ, "GGUF_EMBED_HOME": tuned_home}
        tune_s = tune(args.model, args.tune_s, tuned)
        for n in map(int, args.texts.split(",")):
            for way in WAYS:
                with tempfile.TemporaryDirectory() as fresh:
                    env = tuned if way == "before" else {**tuned, "GGUF_EMBED_HOME": fresh}
                    words = [*([args.model] if args.model else []), "--one", way, "--texts", str(n)]
                    done = subprocess.run(
                        [sys.executable, __file__, *words, "--most-s", str(args.most_s)],
                        env=env,
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
                run["tune_s"] = tune_s if way == "before" else 0.0
                run["texts_per_s"] = n / (run["seconds"] + run["tune_s"])
                mark = " (sampled)" if run["sampled"] else ""
                print(
                    f"{n:>9,} {way:8} {run['texts_per_s']:9,.0f} texts/s, "
                    f"{run['seconds']:7.1f} s + {run['tune_s']:5.1f} s before{mark}",
                    file=sys.stderr,
                )
                found.append(run)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", help="default: the built-in one")
    parser.add_argument("--texts", default="1000,10000,100000", help="lengths of the runs")
    parser.add_argument("--most-s", type=float, default=70.0, help="of a run; the rest is told")
    parser.add_argument("--tune-s", type=float, default=60.0, help="of tuning before")
    parser.add_argument("--one", choices=WAYS, help="one run, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_run(args.model, args.one, int(args.texts), args.most_s)))
        return
    print(json.dumps({"model": args.model or "built-in", "runs": run_all(args)}))


if __name__ == "__main__":
    main()
