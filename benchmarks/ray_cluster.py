"""A job on a Ray cluster of two nodes on this machine, one of which is killed in the middle.

    python benchmarks/ray_cluster.py --rows 50000

The same rows go through one process first. Checked: every row once, vectors equal. Both nodes share
the cores of one machine, so the ratio tells what spreading costs, not what a second machine gains.
Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from gguf_embed import cli

WORDS = ("river", "bread", "bridge", "oven", "boat", "mill", "violin", "letter", "train", "winter")
PARTS = "part-*"


def write_rows(path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    texts = [f"{n} {' '.join(rng.choice(WORDS, rng.integers(1, 6)))}" for n in range(n)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def embed(table: Path, out: Path, *words: str) -> float:
    """Seconds of the whole command."""
    began = time.monotonic()
    code = cli.main(
        [
            *("embed", str(table), "--field", "text", "-o", f"{out}/", "--no-tune"),
            *("--threads", "1", "--no-accelerator", "--quiet", *words),
        ]
    )
    assert code == 0, f"exit code {code}"
    return time.monotonic() - began


def vectors(out: Path) -> tuple[list[int], np.ndarray]:
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    parts = [pyarrow.parquet.read_table(out / line["file"]) for line in lines[1:-1]]
    table = pyarrow.concat_tables(parts)
    return table["position"].to_pylist(), np.stack(table["vector"].to_numpy())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000)
    n = parser.parse_args().rows

    import ray  # pyright: ignore[reportMissingImports]
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        table, alone, spread = (Path(folder) / name for name in ("in.parquet", "alone", "spread"))
        write_rows(table, n)
        alone_s = embed(table, alone)
        cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
        node: Any = cluster.add_node(num_cpus=4)
        ray.init(address=cluster.address, log_to_driver=False)
        n_when_killed = 0

        def kill() -> None:
            nonlocal n_when_killed
            while (n_made := len([*spread.glob(PARTS)])) < max(1, n // 2048 // 2):
                time.sleep(0.05)
            n_when_killed = n_made
            cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        spread_s = embed(table, spread, "--ray", "auto")
        killer.join()
        ray.shutdown()
        cluster.shutdown()
        rows, made = vectors(spread)
        expected_rows, expected = vectors(alone)
        assert rows == expected_rows == [*range(1, n + 1)], "every row once, in order"
        cosines = np.einsum("nd,nd->n", made, expected)
        assert cosines.min() > 0.9999, cosines.min()
    run = {
        "rows": n,
        "one_process_s": round(alone_s, 1),
        "two_nodes_one_killed_s": round(spread_s, 1),
        "rows_per_s": [round(n / alone_s), round(n / spread_s)],
        "shards_when_killed": n_when_killed,
        "equal_bytes": bool(np.array_equal(made, expected)),
        "least_cosine": float(cosines.min()),
        "greatest_difference": float(np.abs(made - expected).max()),
    }
    print(json.dumps(run))


if __name__ == "__main__":
    main()
