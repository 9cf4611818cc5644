"""LlamaIndex: its base classes and its own round trip: `pytest -m partners`."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from partners.conftest import TEXTS

pytest.importorskip("llama_index.core")

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import NodeWithScore, TextNode

from gguf_embed import BadOption, Embedder, Settings
from gguf_embed.integrations.llama_index import GgufEmbedding, GgufRerank
from gguf_embed.testing import FakeEmbedder, FakeReranker

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]


async def test_the_vectors_are_those_of_the_engine(minilm: Embedder, direct: np.ndarray):
    made = GgufEmbedding(minilm)
    assert isinstance(made, BaseEmbedding)
    assert made.model_name == "all-minilm-l6-v2"
    assert made.get_text_embedding_batch(TEXTS) == direct.tolist()
    assert await made.aget_text_embedding_batch(TEXTS) == direct.tolist()
    for vector in (
        made.get_query_embedding(TEXTS[0]),
        await made.aget_query_embedding(TEXTS[0]),
        made.get_text_embedding(TEXTS[0]),
        await made.aget_text_embedding(TEXTS[0]),
    ):
        np.testing.assert_allclose(vector, direct[0], atol=1e-6)


def test_it_is_written_down_and_read():
    made = GgufEmbedding("minilm", truncate="end", settings=Settings(tune=False))
    again = GgufEmbedding.from_dict(made.to_dict())
    assert again.to_dict() == made.to_dict()
    assert again.choices == {"truncate": "end", "settings": {"tune": False}}
    for same in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert same.to_dict() == made.to_dict()
    assert GgufEmbedding.from_json(made.to_json()).to_dict() == made.to_dict()
    with pytest.raises(BadOption, match="no option 'trunctate'"):
        GgufEmbedding("minilm", trunctate="end")


def test_an_index_finds_what_is_near(minilm: Embedder):
    nodes = [TextNode(text=text) for text in TEXTS if text]
    index = VectorStoreIndex(nodes, embed_model=GgufEmbedding(minilm))
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("baking")
    assert found.node.get_content() == TEXTS[2]


def test_prompts_and_whole_batches():
    with FakeEmbedder.open() as fake:
        made = GgufEmbedding(fake)
        assert made.get_query_embedding("a b") == fake.encode("query: a b").tolist()
        fake.backend.microbatches.clear()
        many = [f"text {n}" for n in range(50)]
        assert made.get_text_embedding_batch(many) == fake.encode_document(many).tolist()
        assert len(fake.backend.microbatches) == 2  # of two calls


async def test_a_postprocessor_reranks():
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in ("x", "b", "a b")]
    with FakeReranker.open() as reranker:
        made = GgufRerank(reranker, top_n=2)
        for found in (
            made.postprocess_nodes(nodes, query_str="a b"),
            await made.apostprocess_nodes(nodes, query_str="a b"),
        ):
            assert [each.node.get_content() for each in found] == ["a b", "b"]
            assert found[0].score == pytest.approx(0.88, abs=0.01)
        with pytest.raises(ValueError, match="needs the query"):
            made.postprocess_nodes(nodes)
    named = GgufRerank("bge-reranker-v2-m3", top_n=5)
    assert GgufRerank.from_dict(named.to_dict()).to_dict() == named.to_dict()
