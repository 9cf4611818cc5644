"""The portable build beside the native one: tokens/s in turns, on this machine.

    python benchmarks/portable.py NATIVE_PYTHON PORTABLE_PYTHON [MODEL] [--rounds 9] > portable.json

Each Python is one of an environment: of `install.py`, and of `install.py --portable --venv DIR`.
Both processes hold the model, and embed the same texts in turns, each round in the order opposite
to the last one; the ratio of a round is that of neighbours. Once with our own kernels, once with
ggml's alone (--ggml). Their vectors must be equal. Run it on a quiet machine; it takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np, workloads
from gguf_embed import Embedder, Settings
from gguf_embed.native import library
rows = [text[:400] for text in workloads.docstrings()[: int(sys.argv[3])]]
model = sys.argv[4:] or ["all-minilm-l6-v2"]
with Embedder.open(*model, settings=Settings(tune=False)) as embedder:
    np.save(sys.argv[2], embedder.encode(rows, progress=False, truncate='end'))
    print(json.dumps({"variant": library.cpu_variant(), "lib": str(library.library_path())}))
    sys.stdout.flush()
    for _ in sys.stdin:
        began = time.perf_counter(), time.process_time()
        embedder.encode(rows, progress=False, truncate='end')
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        print(json.dumps(took), flush=True)
"""


class Build:
    """One Python with its llama.cpp, which embeds when it is told to."""

    def __init__(self, python: str, vectors: Path, args: argparse.Namespace) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GGUF_EMBED_HOME": str(vectors.parent)}
        if args.ggml:
            env["GGUF_EMBED_ACCELERATOR"] = "0"
        words = [str(ROOT / "benchmarks"), str(vectors), str(args.n), *filter(None, [args.model])]
        self._process = subprocess.Popen(
            [python, "-c", CHILD, *words],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer()

    def embed(self) -> list[float]:
        """Wall and CPU seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """Its process is gone afterwards."""
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("native")
    parser.add_argument("portable")
    parser.add_argument("model", nargs="?", help="default: the built-in one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--n", type=int, default=1500, help="texts of a slice")
    parser.add_argument("--ggml", action="store_true", help="without our own kernels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name / "vectors.npy" for name in ("native", "portable")}
        for place in places.values():
            place.parent.mkdir()
        builds = {name: Build(getattr(args, name), places[name], args) for name in places}
        rounds: list[dict[str, list[float]]] = []
        for number in range(args.rounds):
            order = [*builds] if number % 2 == 0 else [*builds][::-1]
            rounds.append({name: builds[name].embed() for name in order})
        for build in builds.values():
            build.end()
        first, second = (np.load(place) for place in places.values())
    wall, cpu = (
        [each["native"][kind] / each["portable"][kind] for each in rounds] for kind in (0, 1)
    )
    found = {
        "about": {name: build.about for name, build in builds.items()},
        "model": args.model or "built-in",
        "kernels": "ggml" if args.ggml else "ours where they are proved",
        "vectors_equal": bool(np.array_equal(first, second)),
        "least_cosine": float((first * second).sum(axis=1).min()),
        "speed_of_native": {"wall": median(wall), "cpu": median(cpu)},
        "least_and_most": {"wall": [min(wall), max(wall)], "cpu": [min(cpu), max(cpu)]},
        "rounds": rounds,
    }
    ratio = found["speed_of_native"]
    print(f"portable: {ratio['wall']:.3f} of native (CPU time {ratio['cpu']:.3f})", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
