"""Where the time to the first vector goes: each step in milliseconds, on the first use and later.

    python benchmarks/startup.py [MODEL] [--runs 5] > startup.json

Each run is a process of its own that imports the package, opens the model and embeds one text. A
first use has a fresh folder for what is kept; the steps are the medians of its runs. "vector at"
and "all in" are the wall time of another process, whose steps nobody takes, up to the vector and up
to its end: to look at the steps, all modules are imported first, and else the child that proves is
started before that. Run it on a quiet machine. The table goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

STEPS = (
    "python",
    "imports",
    "start of the child",
    "llama.cpp",
    "machine",
    "header and plan",
    "self-test",
    "proof",
    "load",
    "first vector",
    "vector at",
    "all in",
)
WHOLE = """
import os, sys, time
from gguf_embed import Embedder
embedder = Embedder.open(*sys.argv[2:])
embedder.encode(sys.argv[1])
print(time.time() - float(os.environ["STARTED_AT"]))
"""
TEXT = "The first vector on this machine."


def one_run(model: str | None) -> dict[str, float]:
    """In a process of its own: seconds of each step up to the first vector."""
    steps: dict[str, float] = {"python": time.time() - float(os.environ["STARTED_AT"])}

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                steps[step] = steps.get(step, 0.0) + time.perf_counter() - began

        return run

    began = time.perf_counter()
    from gguf_embed import Embedder
    from gguf_embed.engine import loaded, opening, proof
    from gguf_embed.machine import probe, selftest
    from gguf_embed.native import library

    steps["imports"] = time.perf_counter() - began
    # The child that proves is started before llama.cpp is read: both go on side by side.
    start = timed("start of the child", proof.Worker.start)
    proof.Worker.start = lambda worker: start(worker)  # pyright: ignore[reportAttributeAccessIssue]
    probe_machine = probe.probe

    def probed(**how: Any) -> Any:
        timed("llama.cpp", library.bindings)()
        return timed("machine", probe_machine)(**how)

    probe.probe = probed
    opening.choose = timed("header and plan", opening.choose)
    selftest.check = timed("self-test", selftest.check)
    proof.prove = timed("proof", proof.prove)
    opening.load = timed("load", loaded.load)
    opened = Embedder.open(model) if model else Embedder.open()
    began = time.perf_counter()
    opened.encode(TEXT)
    steps["first vector"] = time.perf_counter() - began
    return steps


def runs(model: str | None, n: int, *, first_use: bool) -> list[dict[str, float]]:
    """Steps of each of `n` processes."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as shared:
        for _ in range(n):
            with tempfile.TemporaryDirectory() as fresh, tempfile.TemporaryDirectory() as other:
                steps = _steps(model, fresh if first_use else shared)
                found.append({**steps, **_whole(model, other if first_use else shared)})
    return found if first_use else found[1:]


def _steps(model: str | None, home: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", *([model] if model else [])]
    done = subprocess.run(
        command, env=_environment(home), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _whole(model: str | None, home: str) -> dict[str, float]:
    """Up to the first vector, and up to the end of the process."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, TEXT, *([model] if model else [])],
        env=_environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    return {"all in": time.perf_counter() - began, "vector at": float(done.stdout)}


def _environment(home: str) -> dict[str, str]:
    return {**os.environ, "GGUF_EMBED_HOME": home, "STARTED_AT": repr(time.time())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", help="default: the built-in one")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", action="store_true", help="one run, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_run(args.model)))
        return
    measured = {
        "first use": runs(args.model, args.runs, first_use=True),
        "later": runs(args.model, args.runs + 1, first_use=False),
    }
    for step in STEPS:
        cells = [
            f"{1000 * median(steps.get(step, 0.0) for steps in found):8.0f}"
            for found in measured.values()
        ]
        print(f"{step:20}{''.join(cells)} ms", file=sys.stderr)
    print(json.dumps({"model": args.model or "built-in", "runs": measured}))


if __name__ == "__main__":
    main()
