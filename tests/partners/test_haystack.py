"""Haystack: components, their sockets, and their round trip: `pytest -m partners`."""

from __future__ import annotations

import numpy as np
import pytest

from partners.conftest import TEXTS

pytest.importorskip("haystack")

from haystack import Document, Pipeline
from haystack.components.embedders.types import DocumentEmbedder, TextEmbedder
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.core.serialization import component_from_dict, component_to_dict
from haystack.document_stores.in_memory import InMemoryDocumentStore

from gguf_embed import BadOption, Embedder, Settings
from gguf_embed.integrations.haystack import GgufDocumentEmbedder, GgufRanker, GgufTextEmbedder
from gguf_embed.testing import FakeEmbedder, FakeReranker

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]


async def test_the_vectors_are_those_of_the_engine(minilm: Embedder, direct: np.ndarray):
    documents = [Document(content=text, meta={"n": n}) for n, text in enumerate(TEXTS)]
    made: DocumentEmbedder = GgufDocumentEmbedder(minilm)
    for found in (made.run(documents), await made.run_async(documents)):
        assert [each.embedding for each in found["documents"]] == direct.tolist()
        assert [each.meta for each in found["documents"]] == [each.meta for each in documents]
    assert documents[0].embedding is None
    text: TextEmbedder = GgufTextEmbedder(minilm)
    for found in (text.run(TEXTS[0]), await text.run_async(TEXTS[0])):
        np.testing.assert_allclose(found["embedding"], direct[0], atol=1e-6)


def test_a_pipeline_finds_what_is_near_and_is_written_down(minilm: Embedder):
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    documents = [Document(content=text) for text in TEXTS if text]
    store.write_documents(
        GgufDocumentEmbedder(minilm).run(documents)["documents"], policy="overwrite"
    )
    pipeline = Pipeline()
    pipeline.add_component("embed", GgufTextEmbedder("minilm", settings=Settings(tune=False)))
    pipeline.add_component("retrieve", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embed.embedding", "retrieve.query_embedding")
    text = pipeline.dumps()
    assert "gguf_embed.integrations.haystack.GgufTextEmbedder" in text
    again = Pipeline.loads(text, allowed_modules=["gguf_embed.integrations.haystack"])
    for one in (pipeline, again):
        found = one.run({"embed": {"text": "baking"}})["retrieve"]["documents"]
        if one is pipeline:  # a store in memory is empty when it is read again
            assert found[0].content == TEXTS[2]


@pytest.mark.parametrize(
    "made",
    [
        GgufTextEmbedder("minilm", truncate="end", settings=Settings(n_ctx=99)),
        GgufDocumentEmbedder("minilm", meta_fields_to_embed=["title"], dimensions=64),
        GgufRanker("bge-reranker-v2-m3", top_k=3, isolated=True),
    ],
    ids=lambda made: type(made).__name__,
)
def test_round_trips(made: GgufTextEmbedder | GgufDocumentEmbedder | GgufRanker):
    written = component_to_dict(made, "made")
    again = component_from_dict(type(made), written, "made")
    assert component_to_dict(again, "made") == written
    assert again.model.as_dict() == made.model.as_dict()


def test_an_open_model_is_not_written_down():
    with FakeEmbedder.open() as fake, pytest.raises(BadOption, match="give the name of a model"):
        GgufTextEmbedder(fake).to_dict()


def test_prompts_and_fields():
    with FakeEmbedder.open() as fake:
        assert GgufTextEmbedder(fake).run("a")["embedding"] == fake.encode("query: a").tolist()
        document = Document(content="a", meta={"title": "b", "n": None})
        made = GgufDocumentEmbedder(fake, meta_fields_to_embed=["title", "n", "other"])
        (found,) = made.run([document])["documents"]
        assert found.embedding == fake.encode("document: b\na").tolist()


async def test_a_ranker_reranks():
    documents = [Document(content=text) for text in ("x", "b", "a b")]
    with FakeReranker.open() as reranker:
        made = GgufRanker(reranker, top_k=2)
        made.warm_up()
        for found in (made.run("a b", documents), await made.run_async("a b", documents)):
            assert [each.content for each in found["documents"]] == ["a b", "b"]
            assert found["documents"][0].score == pytest.approx(0.88, abs=0.01)
        assert len(made.run("a b", documents, top_k=1)["documents"]) == 1
