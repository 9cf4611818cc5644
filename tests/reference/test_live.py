"""The stored references, made anew: `pytest -m reference` (needs the extra `reference`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference import late, rerank
from reference.make_reference import CASES, compute, load, sensitivity

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("name", CASES)
def test_transformers_still_gives_the_stored_vectors(name: str) -> None:
    made, stored = compute(CASES[name]), load(name)
    assert list(made.texts) == list(stored.texts)
    assert made.ids == stored.ids
    assert made.weights_sha256 == stored.weights_sha256
    np.testing.assert_allclose(made.vectors, stored.vectors, atol=1e-4)
    np.testing.assert_allclose(made.cut, stored.cut, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen3-reranker"])
def test_mistakes_would_be_seen(name: str) -> None:
    """Ten times the tolerance of the comparison with our engine (1 - 0.9999)."""
    moved = sensitivity(CASES[name], load(name))
    assert min(moved.values()) > 1e-3, moved


@pytest.mark.parametrize("name", rerank.CASES)
def test_transformers_still_gives_the_stored_scores(name: str) -> None:
    made, stored = rerank.compute(rerank.CASES[name]), rerank.load(name)
    assert made.ids == stored.ids
    assert made.weights_sha256 == stored.weights_sha256
    for key in ("scores", "cut", "task"):
        np.testing.assert_allclose(getattr(made, key), getattr(stored, key), atol=1e-5)


def test_cross_encoder_gives_the_stored_scores(tmp_path: Path) -> None:
    """sentence-transformers' own class, which bge-reranker-v2-m3 is used with."""
    cross = pytest.importorskip("sentence_transformers").CrossEncoder
    recipe = rerank.Recipe(rerank.CASES["xlmr"].write(tmp_path / "model.gguf"))
    recipe.network.save_pretrained(tmp_path / "hf")
    recipe.tokenizer.pad_token, recipe.tokenizer.model_max_length = "<pad>", 128
    recipe.tokenizer.save_pretrained(tmp_path / "hf")
    encoder = cross(str(tmp_path / "hf"), max_length=128, device="cpu")
    pairs = [(query, document) for query in rerank.QUERIES for document in rerank.DOCUMENTS]
    scores = np.reshape(encoder.predict(pairs), (len(rerank.QUERIES), -1))
    np.testing.assert_allclose(scores, rerank.load("xlmr").scores, atol=1e-4)


@pytest.mark.parametrize("name", late.NAMES)
def test_transformers_still_gives_the_stored_vectors_of_chunks(name: str) -> None:
    made, stored = late.compute(name), late.load(name)
    for key in ("plain", "prompted"):
        np.testing.assert_allclose(made[key], stored[key], atol=1e-4)
