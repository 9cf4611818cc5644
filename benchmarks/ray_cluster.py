"""A job on a Ray cluster of two nodes on this machine, one of which is killed in the middle.

    python benchmarks/ray_cluster.py --rows 50000 --folder /tmp/ray --limit-s 900

The same rows go through one process first. Checked: every row once, vectors equal. Both nodes share
the cores of one machine, so the ratio tells what spreading costs, not what a second machine gains.
Overhead is CPU time of all processes less that of the one, for each row: it holds on a busy machine
too. Each half is kept in the folder, and a second call does what is missing. Ends in one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet

from gguf_embed import cli

WORDS = ("river", "bread", "bridge", "oven", "boat", "mill", "violin", "letter", "train", "winter")
PARTS = "part-*"


def write_rows(path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    texts = [f"{n} {' '.join(rng.choice(WORDS, rng.integers(1, 6)))}" for n in range(n)]
    half = path.with_suffix(".half")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), half)
    half.replace(path)


class CpuClock:
    """CPU seconds of this process and of all that it has started, those that ended included."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, float], float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._look()
        self._before = sum(self._seconds.values())
        self._thread.start()

    def stop(self) -> float:
        """Since it was made."""
        self._done.set()
        self._thread.join()
        self._look()
        return sum(self._seconds.values()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(1):
            self._look()

    def _look(self) -> None:
        own = psutil.Process()
        for each in (own, *own.children(recursive=True)):
            try:
                times = each.cpu_times()
                self._seconds[each.pid, each.create_time()] = times.user + times.system
            except psutil.Error:  # it has just ended
                continue


def embed(table: Path, out: Path, *words: str) -> dict[str, float]:
    """What the whole command took."""
    shutil.rmtree(out, ignore_errors=True)
    began, own, clock = time.monotonic(), time.process_time(), CpuClock()
    code = cli.main(
        [
            *("embed", str(table), "--field", "text", "-o", f"{out}/", "--no-tune"),
            *("--threads", "1", "--exact", "--quiet", *words),
        ]
    )
    assert code == 0, f"exit code {code}"
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(clock.stop(), 1),
        "own_cpu_s": round(time.process_time() - own, 1),
    }


def vectors(out: Path) -> tuple[list[int], np.ndarray]:
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    parts = [pyarrow.parquet.read_table(out / line["file"]) for line in lines[1:-1]]
    table = pyarrow.concat_tables(parts)
    return table["position"].to_pylist(), np.stack(table["vector"].to_numpy())


def spread_over_two(table: Path, out: Path, n: int) -> dict[str, float]:
    """The same on a cluster, one node of which is killed when a fourth of the shards is there."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    node: Any = cluster.add_node(num_cpus=4)
    ray.init(address=cluster.address, log_to_driver=False)
    n_when_killed = 0

    def kill() -> None:
        nonlocal n_when_killed
        while (n_made := len([*out.glob(PARTS)])) < max(1, n // 2048 // 4):
            time.sleep(0.05)
        n_when_killed = n_made
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        took = embed(table, out, "--ray", "auto")
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {**took, "shards_when_killed": n_when_killed}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=900)
    args = parser.parse_args()
    n: int = args.rows
    # Raised in the main thread, so that the cluster goes too.
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(75))
    signal.setitimer(signal.ITIMER_REAL, args.limit_s)

    args.folder.mkdir(parents=True, exist_ok=True)
    table, alone, spread = (args.folder / name for name in (f"in-{n}.parquet", "alone", "spread"))
    if not table.exists():
        write_rows(table, n)
    took: dict[str, dict[str, float]] = {}
    for name, run in (
        ("alone", lambda: embed(table, alone)),
        ("spread", lambda: spread_over_two(table, spread, n)),
    ):
        kept = args.folder / f"{name}-{n}.json"
        if not kept.exists():
            kept.write_text(json.dumps(run()))
        took[name] = json.loads(kept.read_text())
    rows, made = vectors(spread)
    expected_rows, expected = vectors(alone)
    assert rows == expected_rows == [*range(1, n + 1)], "every row once, in order"
    cosines = np.einsum("nd,nd->n", made, expected)
    assert cosines.min() > 0.9999, cosines.min()
    print(
        json.dumps(
            {
                "rows": n,
                **took,
                "rows_per_s": {name: round(n / each["seconds"]) for name, each in took.items()},
                "overhead_us_per_row": round(
                    (took["spread"]["cpu_s"] - took["alone"]["cpu_s"]) / n * 1e6
                ),
                "equal_bytes": bool(np.array_equal(made, expected)),
                "least_cosine": float(cosines.min()),
                "greatest_difference": float(np.abs(made - expected).max()),
                "load": os.getloadavg(),
            }
        )
    )


if __name__ == "__main__":
    main()
