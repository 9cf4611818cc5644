"""The lines of a file without those that say again what an earlier one said.

python examples/deduplicate.py questions.txt > shorter.txt
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gguf_embed import Embedder


def deduplicate(lines: Sequence[str], above: float = 0.75) -> list[str]:
    """Those whose cosine to every one that is kept before them is not above `above`."""
    if not lines:
        return []
    with Embedder.open() as embedder:
        vectors = embedder.encode(lines)
    kept: list[int] = []
    for row, vector in enumerate(vectors):
        if not kept or np.max(vectors[kept] @ vector) <= above:
            kept.append(row)
    return [lines[row] for row in kept]


if __name__ == "__main__":
    given = [line for line in Path(sys.argv[1]).read_text("utf-8").splitlines() if line.strip()]
    shorter = deduplicate(given)
    print("\n".join(shorter))
    print(f"{len(given) - len(shorter)} of {len(given)} lines left out", file=sys.stderr)
