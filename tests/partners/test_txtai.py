"""txtai: its `Vectors`, by the name of the class: `pytest -m partners`."""

from __future__ import annotations

import numpy as np
import pytest

from partners.conftest import TEXTS

pytest.importorskip("txtai")

from txtai import Embeddings
from txtai.vectors import VectorsFactory

from gguf_embed import Embedder
from gguf_embed.testing import FakeEmbedder

METHOD = "gguf_embed.integrations.txtai.GgufVectors"

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]


def test_the_vectors_are_those_of_the_engine(direct: np.ndarray):
    config = {"method": METHOD, "path": "minilm", "vectors": {"settings": {"tune": False}}}
    made = VectorsFactory.create(config, None)
    np.testing.assert_array_equal(made.encode(TEXTS), direct)
    np.testing.assert_array_equal(made.encode(TEXTS, "query"), direct)


def test_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Embedder, "open", FakeEmbedder.open)
    made = VectorsFactory.create({"method": METHOD, "path": "fake"}, None)
    with FakeEmbedder.open() as fake:
        np.testing.assert_array_equal(made.encode(["a"], "data"), fake.encode(["document: a"]))
        np.testing.assert_array_equal(made.encode(["a"], "query"), fake.encode(["query: a"]))


def test_an_index_finds_what_is_near(tmp_path):
    index = Embeddings(method=METHOD, path="minilm", content=True)
    index.index([text for text in TEXTS if text])
    assert index.search("baking", 1)[0]["text"] == TEXTS[2]
    index.save(str(tmp_path / "index"))
    again = Embeddings()
    again.load(str(tmp_path / "index"))
    assert again.search("baking", 1)[0]["text"] == TEXTS[2]
