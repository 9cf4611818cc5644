"""The stored references, made anew: `pytest -m reference` (needs the extra `reference`)."""

from __future__ import annotations

import numpy as np
import pytest
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
