"""LlamaIndex: an embedding model, and a node postprocessor that reranks (extra `llama-index`).

from gguf_embed.integrations.llama_index import GgufEmbedding, GgufRerank

Settings.embed_model = GgufEmbedding("qwen3-embedding-0.6b", truncate="end")
engine = index.as_query_engine(node_postprocessors=[GgufRerank(top_n=3)])
"""

# pyright: basic, reportMissingImports=false
# Where the partner is not installed, what it defines is unknown to the check of types.

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from gguf_embed.catalog import BUILTIN, RERANKER
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.reranker import Reranker
from gguf_embed.integrations.held import HeldEmbedder, HeldReranker


class GgufEmbedding(BaseEmbedding):
    """Documents and queries with the model's own prompts.

    `choices` are those of `TextChoices`. A call of LlamaIndex holds `embed_batch_size` texts, which
    the engine packs by their tokens.
    """

    embed_batch_size: int = Field(default=2048, gt=0, le=2048)
    choices: dict[str, Any] = Field(default_factory=dict)

    _held: HeldEmbedder = PrivateAttr()

    def __init__(
        self, model_name: str | Path | Embedder = BUILTIN, *, choices: Any = None, **more: Any
    ) -> None:
        """The name of a model, which is opened at its first use, or an open Embedder."""
        own = {name: more.pop(name) for name in [*more] if name not in type(self).model_fields}
        held = HeldEmbedder(model_name, **{**(choices or {}), **own})
        said = held.as_dict() if held.name is not None else {"model": held.opened.model_id}
        # As a dict, since the base's own signature has no fields of ours.
        fields = {"model_name": said.pop("model"), "choices": said, **more}
        super().__init__(**fields)
        self._held = held

    @classmethod
    def class_name(cls) -> str:
        """As LlamaIndex writes it down."""
        return "GgufEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._held.queries([query])[0].tolist()

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._held.aqueries([query]))[0].tolist()

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._held.documents([text])[0].tolist()

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._held.adocuments([text]))[0].tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._held.documents(texts).tolist()

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return (await self._held.adocuments(texts)).tolist()


class GgufRerank(BaseNodePostprocessor):
    """The `top_n` nodes that answer the query best, by the reranker's scores."""

    model: str = RERANKER
    top_n: int | None = 3
    task: str | None = None
    truncate: Literal["end", "error"] = "end"
    choices: dict[str, Any] = Field(default_factory=dict)

    _held: HeldReranker = PrivateAttr()

    def __init__(self, model: str | Path | Reranker = RERANKER, **more: Any) -> None:
        """The name of a model, which is opened at its first use, or an open Reranker."""
        name = model.model_id if isinstance(model, Reranker) else str(model)
        fields = {"model": name, **more}
        super().__init__(**fields)
        self._held = HeldReranker(model, task=self.task, truncate=self.truncate, **self.choices)

    @classmethod
    def class_name(cls) -> str:
        """As LlamaIndex writes it down."""
        return "GgufRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, texts = _asked(nodes, query_bundle)
        return _with_scores(nodes, self._held.best(query, texts, self.top_n))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, texts = _asked(nodes, query_bundle)
        return _with_scores(nodes, await self._held.abest(query, texts, self.top_n))


def _asked(nodes: list[NodeWithScore], query: QueryBundle | None) -> tuple[str, list[str]]:
    if query is None:
        raise ValueError("a reranker needs the query; pass query_str or query_bundle")
    return query.query_str, [each.node.get_content(MetadataMode.EMBED) for each in nodes]


def _with_scores(nodes: list[NodeWithScore], best: list[tuple[int, float]]) -> list[NodeWithScore]:
    return [NodeWithScore(node=nodes[row].node, score=score) for row, score in best]
