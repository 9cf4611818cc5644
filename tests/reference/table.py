"""The table of docs/accuracy.md: how near our vectors are to transformers', by kind of model.

Run from `tests/`; where torch and transformers are not installed, `--stored` takes the references
that are kept here:

    python -m reference.table [--stored]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from reference.make_reference import CASES, compute, load

from gguf_embed import Embedder, Settings

LEVELS = ("F32", "Q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table.")
    parser.add_argument("--stored", action="store_true", help="not live: the stored references")
    stored = parser.parse_args().stored
    print("| model | token ids | least cosine alone | in a batch | Q8_0 alone | in a batch |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if name == "qwen3-reranker":
                continue
            reference = load(name) if stored else compute(case)
            cells: list[str] = []
            for level in LEVELS:
                path = case.write(Path(folder) / f"{name}-{level}.gguf", outtype=level).path
                with Embedder.open(path, settings=Settings(tune=False)) as embedder:
                    if level == LEVELS[0]:
                        pairs = zip(reference.texts, reference.ids, strict=True)
                        equal = [list(embedder.tokenize(text)) == list(ids) for text, ids in pairs]
                        cells.append(f"{sum(equal)} of {len(equal)}")
                    alone = np.stack([embedder.encode(text) for text in reference.texts])
                    batch = embedder.encode(list(reference.texts))
                for vectors in (alone, batch):
                    cosines = (vectors.astype(np.float64) * reference.vectors).sum(axis=1)
                    cells.append(f"{min(cosines.min(), 1):.6f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
