"""LangChain's standard tests, and what they do not look at: `pytest -m partners`."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from partners.conftest import TEXTS

pytest.importorskip("langchain_tests")

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from gguf_embed import BadOption, Embedder
from gguf_embed.integrations.langchain import GgufEmbeddings, GgufReranker
from gguf_embed.testing import FakeEmbedder, FakeReranker

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]


class Ours:
    """What both of LangChain's suites ask for."""

    @property
    def embeddings_class(self) -> type[GgufEmbeddings]:
        return GgufEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, object]:
        return {"model": "all-minilm-l6-v2", "settings": {"tune": False}}


class TestUnit(Ours, EmbeddingsUnitTests):
    """LangChain's own."""


class TestIntegration(Ours, EmbeddingsIntegrationTests):
    """LangChain's own."""


async def test_the_vectors_are_those_of_the_engine(minilm: Embedder, direct: np.ndarray):
    made = GgufEmbeddings(minilm)
    assert made.embed_documents(TEXTS) == direct.tolist()
    assert await made.aembed_documents(TEXTS) == direct.tolist()
    np.testing.assert_allclose(made.embed_query(TEXTS[0]), direct[0], atol=1e-6)
    np.testing.assert_allclose(await made.aembed_query(TEXTS[0]), direct[0], atol=1e-6)
    assert made.embed_documents([]) == []


def test_a_store_finds_what_is_near(minilm: Embedder):
    store = InMemoryVectorStore(GgufEmbeddings(minilm))
    store.add_texts(TEXTS)
    assert store.similarity_search("baking", k=1)[0].page_content == TEXTS[2]


def test_it_travels_by_name():
    made = pickle.loads(pickle.dumps(GgufEmbeddings("minilm", truncate="end")))
    assert made.model.as_dict() == {"model": "minilm", "truncate": "end"}
    with pytest.raises(BadOption, match="no option 'batch_size'"):
        GgufEmbeddings("minilm", batch_size=3)


def test_prompts():
    with FakeEmbedder.open() as fake:
        made = GgufEmbeddings(fake)
        assert made.embed_query("a b") == fake.encode("query: a b").tolist()
        assert made.embed_documents(["a b"]) == fake.encode(["document: a b"]).tolist()


async def test_a_compressor_reranks():
    documents = [Document(text, metadata={"n": n}) for n, text in enumerate(["x", "b", "a b"])]
    with FakeReranker.open() as reranker:
        made = GgufReranker(model=reranker, top_n=2)
        for found in (
            made.compress_documents(documents, "a b"),
            await made.acompress_documents(documents, "a b"),
        ):
            assert [each.page_content for each in found] == ["a b", "b"]
            assert found[0].metadata["n"] == 2
            assert found[0].metadata["relevance_score"] == pytest.approx(0.88, abs=0.01)
        assert documents[2].metadata == {"n": 2}
        assert made.compress_documents([], "a b") == []
