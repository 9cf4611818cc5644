"""How near the vectors of two files of a model are, and how much smaller one of them is.

    python examples/compare_levels.py model-F16.gguf model-Q4_K_M.gguf texts.txt
    python examples/compare_levels.py                # offline: the built-in model in fewer bits

`gguf-embed bench` tells more: speed, memory, and what retrieval loses.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gguf_embed import Embedder, Settings

TEXTS = [
    "The cat sleeps on the warm stove.",
    "Rent is due on the first of each month.",
    "def mean(values): return sum(values) / len(values)",
    "The train to the coast leaves at nine.",
]


def compare(one: str, other: str, texts: Sequence[str]) -> tuple[float, float]:
    """The least and the mean cosine between the two files' vectors of a text."""
    with Embedder.open(one, settings=Settings(tune=False)) as embedder:
        first = embedder.encode(texts)
    with Embedder.open(other, settings=Settings(tune=False)) as embedder:
        cosines = (first * embedder.encode(texts)).sum(axis=1)
    return float(cosines.min()), float(cosines.mean())


def in_fewer_bits(level: str, folder: str) -> str:
    """The built-in model in another level, made here."""
    made = str(Path(folder) / f"built-in-{level}.gguf")
    command = [sys.executable, "-m", "gguf_embed", "quantize", built_in(), level]
    subprocess.run([*command, "-o", made, "--force", "--quiet"], check=True)
    return made


def built_in() -> str:
    """The file of the built-in model."""
    command = [sys.executable, "-m", "gguf_embed", "models", "path", "all-minilm-l6-v2"]
    return subprocess.check_output(command, text=True).strip()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 2:
            files, texts = sys.argv[1:3], TEXTS
            if len(sys.argv) > 3:
                texts = Path(sys.argv[3]).read_text("utf-8").splitlines()
        else:
            files, texts = [built_in(), in_fewer_bits("Q4_0", scratch)], TEXTS
        least, mean = compare(files[0], files[1], texts)
        sizes = [Path(name).stat().st_size / 2**20 for name in files if Path(name).is_file()]
        print(f"cosine {mean:.4f} on average, {least:.4f} at least")
        print(", ".join(f"{size:,.1f} MiB" for size in sizes))
