"""Reference vectors of late chunking: transformers' token vectors of a whole document, pooled.

Run from `tests/` where torch and transformers are installed (extra `reference`):

    python -m reference.late

A token belongs to the chunk that holds its last character, as the offsets of `tokenizers` tell;
blanks belong to the word after them.
"""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from reference.make_reference import CASES
from reference.network import Network
from tiny import Array, Pooling

HERE = Path(__file__).parent
NAMES = ("qwen3-mean", "qwen3-last", "bert-mean", "xlmr-mean")
DOCUMENT = (
    "# The boat\n\nThe boat is on the water. It was in the river, and the fish was with it!\n"
    "\tWhich bank?  The river bank, not the money bank.\n\n"
    "Über die Brücke, 3.14 of the bread;\nyes. no\n"
)
PROMPT = "passage: "
# At a heading, sentences, a line, within a line, within a word; some overlap.
MARKS = (0, 12, 38, 83, 96, 132, 168, 171, len(DOCUMENT))
SPANS = (
    *pairwise(MARKS),
    (0, len(DOCUMENT)),
    (42, 59),
    (20, 100),
)


def compute(name: str) -> dict[str, Any]:
    """The vectors of a case, with and without a prompt, and what made them."""
    import tokenizers
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model = CASES[name].write(Path(folder) / "model.gguf")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(model.tokenizer))
    network = Network(model)

    def cut(place: int) -> int:
        inside = 0 < place < len(DOCUMENT)
        return len(DOCUMENT[:place].rstrip(" \t")) if inside else place

    def vectors(prompt: str) -> Array:
        made = tokenizer.encode(prompt + DOCUMENT)
        hidden = network.hidden(made.ids)
        rows: list[Array] = []
        for start, end in SPANS:
            own = [
                at
                for at, (offsets, special) in enumerate(
                    zip(made.offsets, made.special_tokens_mask, strict=True)
                )
                if not special and cut(start) < offsets[1] - len(prompt) <= cut(end)
            ]
            part = hidden[own]
            pooled = part.mean(axis=0) if model.pooling is Pooling.MEAN else part[-1]
            rows.append(pooled / np.linalg.norm(pooled))
        return np.stack(rows)

    about = {
        "made_by": "tests/reference/late.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "weights_sha256": model.weights_sha256,
    }
    return {"plain": vectors(""), "prompted": vectors(PROMPT), "about": json.dumps(about)}


def load(name: str) -> dict[str, Any]:
    """The stored vectors of a case."""
    with np.load(HERE / f"late-{name}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def main() -> None:
    for name in NAMES:
        made = compute(name)
        cosines = made["plain"] @ made["plain"].T
        apart = 1 - (cosines - 2 * np.eye(len(cosines))).max()
        print(name, made["plain"].shape, "nearest two spans are", round(float(apart), 4), "apart")
        np.savez_compressed(HERE / f"late-{name}.npz", **made)


if __name__ == "__main__":
    main()
