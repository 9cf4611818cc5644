"""Chroma: its protocol, and what a collection writes down: `pytest -m partners`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from partners.conftest import TEXTS

pytest.importorskip("chromadb")

import chromadb
from chromadb.api.types import EmbeddingFunction
from chromadb.utils.embedding_functions import config_to_embedding_function

from gguf_embed import BadOption, Embedder
from gguf_embed.integrations.chroma import GgufEmbeddingFunction
from gguf_embed.testing import FakeEmbedder

CHOICES = {"model": "minilm", "truncate": "end", "settings": {"tune": False}}

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]


def test_the_vectors_are_those_of_the_engine(minilm: Embedder, direct: np.ndarray):
    made = GgufEmbeddingFunction(minilm)
    np.testing.assert_array_equal(made(TEXTS), direct)
    np.testing.assert_array_equal(made.embed_query(TEXTS), direct)
    assert isinstance(made, EmbeddingFunction)
    assert not GgufEmbeddingFunction(**CHOICES).is_legacy()


def test_prompts():
    with FakeEmbedder.open() as fake:
        made = GgufEmbeddingFunction(fake)
        np.testing.assert_array_equal(made(["a"]), fake.encode(["document: a"]))
        np.testing.assert_array_equal(made.embed_query(["a"]), fake.encode(["query: a"]))


def test_the_config_makes_the_same_again():
    made = GgufEmbeddingFunction(**CHOICES)
    assert made.get_config() == CHOICES
    again = config_to_embedding_function({"name": made.name(), "config": made.get_config()})
    assert isinstance(again, GgufEmbeddingFunction)
    assert again.get_config() == CHOICES
    made.validate_config(CHOICES)
    with pytest.raises(BadOption, match="no option 'trunctate'"):
        made.validate_config({"trunctate": "end"})
    made.validate_config_update(CHOICES, {**CHOICES, "truncate": "start"})
    with pytest.raises(BadOption, match="make a new collection"):
        made.validate_config_update(CHOICES, {**CHOICES, "model": "bge-m3"})


def test_a_collection_remembers_it(tmp_path: Path):
    client = chromadb.PersistentClient(str(tmp_path))
    notes = client.create_collection("notes", embedding_function=GgufEmbeddingFunction(**CHOICES))
    notes.add(ids=["0", "1", "2"], documents=[text for text in TEXTS[:4] if text])
    again = chromadb.PersistentClient(str(tmp_path)).get_collection("notes")  # by its name
    found = again.query(query_texts=["baking"], n_results=1)
    assert found["documents"] == [[TEXTS[2]]]
    assert again.configuration["hnsw"]["space"] == "cosine"
