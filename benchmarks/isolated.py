"""What the isolated engine costs: its throughput beside the plain engine's, and both's memory.

    python benchmarks/isolated.py MODEL [rounds] [texts] > isolated.json

Rounds alternate between the two, each in a process of its own, and the order changes with every
round. The vectors must be the same to the bit. The ratio is the median of neighbouring pairs.
Memory is the peak resident set of the parent and of its largest child. Run it on a quiet machine.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from workloads import docstrings

from gguf_embed import Embedder, Settings


def measure(model: str, n_texts: int, *, isolated: bool) -> dict[str, Any]:
    """One process: open, warm up, embed."""
    texts = docstrings()[:n_texts]
    with Embedder.open(model, settings=Settings(tune=False), isolated=isolated) as embedder:
        n_tokens = int(embedder.count_tokens(texts).clip(max=512).sum())
        embedder.encode(texts[:8], truncate="end")
        started = time.perf_counter()
        vectors = embedder.encode(texts, truncate="end")
        seconds = time.perf_counter() - started
    return {
        "isolated": isolated,
        "tokens_per_s": n_tokens / seconds,
        "sha256": hashlib.sha256(vectors.tobytes()).hexdigest(),
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "child_peak_kib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }


def measure_in_child(model: str, n_texts: int, *, isolated: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", model, str(n_texts), str(int(isolated))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(model: str, n_rounds: str = "5", n_texts: str = "200") -> None:
    # Self-test and proof are done once. In a child: Linux counts a parent's peak as its children's.
    measure_in_child(model, 8, isolated=False)
    rounds: list[dict[str, Any]] = []
    for index in range(int(n_rounds)):
        for isolated in (False, True) if index % 2 == 0 else (True, False):
            rounds.append(measure_in_child(model, int(n_texts), isolated=isolated))
    assert len({each["sha256"] for each in rounds}) == 1, "the vectors differ"
    speeds = {
        isolated: [each["tokens_per_s"] for each in rounds if each["isolated"] is isolated]
        for isolated in (False, True)
    }
    ratio = statistics.median(b / a for a, b in zip(speeds[False], speeds[True], strict=True))
    print(json.dumps({"model": model, "isolated_to_plain": ratio, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), isolated=sys.argv[4] == "1")))
    else:
        main(*sys.argv[1:])
