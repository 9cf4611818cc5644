"""The built-in model against sentence-transformers on the original float32 weights.

`python tests/golden/report.py` prints the same figures. The bounds hold what was measured on
x86-64 (AVX-512, AMX, llama.cpp 0c1e57098) with a little room for other kernels:

           min        median
    F16    0.999994   0.999999
    Q8_0   0.99775    0.99954
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from golden.compare import HERE, Comparison, Golden, compare, load

from gguf_embed.catalog.catalog import builtin_path
from gguf_embed.engine.embedder import Embedder
from gguf_embed.plan.settings import Settings

pytestmark = pytest.mark.native

BOUNDS = {"F16": (0.99998, 0.999995), "Q8_0": (0.9975, 0.9994)}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load()


@pytest.fixture(scope="module", params=BOUNDS)
def embedder(request: pytest.FixtureRequest, minilm_f16: Path) -> Iterator[Embedder]:
    path = minilm_f16 if request.param == "F16" else builtin_path()
    with Embedder.open(path, settings=Settings(tune=False)) as opened:
        assert opened.quant == request.param
        yield opened


@pytest.fixture(scope="module")
def compared(embedder: Embedder, golden: Golden) -> Comparison:
    return compare(embedder, golden)


def test_token_ids_are_the_references(compared: Comparison, golden: Golden):
    assert [(row, golden.texts[row]) for row in compared.other_ids] == []


def test_vectors_are_the_references(embedder: Embedder, compared: Comparison):
    low, median = BOUNDS[embedder.quant]
    worst = int(compared.cosine.argmin())
    assert compared.cosine.min() >= low, f"row {worst}"
    assert np.median(compared.cosine) >= median


def test_vectors_have_length_one(embedder: Embedder, golden: Golden):
    lengths = np.linalg.norm(embedder.encode(golden.texts[:64]), axis=1)
    assert np.abs(lengths - 1).max() < 1e-6


def test_the_golden_rows_are_what_they_claim(golden: Golden):
    assert len(golden.texts) == len(set(golden.texts)) == len(golden.ids) >= 200
    assert golden.vectors.shape == (len(golden.texts), 384)
    counts = sorted(map(len, golden.ids))
    assert (counts[0], counts[-1]) == (2, golden.max_tokens)
    assert all((ids[0], ids[-1]) == (101, 102) for ids in golden.ids)
    assert len(set(golden.kinds)) >= 35
    digest = hashlib.sha256((HERE / "texts.jsonl").read_bytes()).hexdigest()
    assert digest in (HERE / "provenance.json").read_text(encoding="utf-8")
