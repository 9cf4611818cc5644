"""The golden rows, and how an embedder compares with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf_embed.engine.embedder import Embedder

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """Texts and what the reference makes of them; see make_golden.py."""

    texts: list[str]
    kinds: list[str]
    ids: list[list[int]]  # at most `max_tokens` each
    vectors: NDArray[np.float32]  # (n, 384), of length 1
    max_tokens: int

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Truncate at the end, as the reference does: [SEP] stays."""
        kept = list(ids)
        return kept if len(kept) <= self.max_tokens else [*kept[: self.max_tokens - 1], kept[-1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    cosine: NDArray[np.float32]  # (n,)
    other_ids: list[int]  # rows whose token ids differ


def load() -> Golden:
    lines = (HERE / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    stored = np.load(HERE / "vectors.npz")
    provenance = json.loads((HERE / "provenance.json").read_text(encoding="utf-8"))
    ends = np.cumsum(stored["n_tokens"])
    return Golden(
        texts=[row["text"] for row in rows],
        kinds=[row["kind"] for row in rows],
        ids=[part.tolist() for part in np.split(stored["ids"], ends[:-1])],
        vectors=stored["vectors"],
        max_tokens=provenance["max_seq_length"],
    )


def compare(embedder: Embedder, golden: Golden) -> Comparison:
    """Embed every row as a user would, in one call, long texts cut at the end."""
    vectors = embedder.encode(golden.texts, truncate="end")
    ids = map(golden.cut, map(embedder.tokenize, golden.texts))
    pairs = enumerate(zip(ids, golden.ids, strict=True))
    return Comparison(
        cosine=(vectors * golden.vectors).sum(axis=1),
        other_ids=[row for row, (ours, theirs) in pairs if ours != theirs],
    )
