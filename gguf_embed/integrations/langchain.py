"""LangChain: embeddings, and a compressor that reranks (extra `langchain`).

from gguf_embed.integrations.langchain import GgufEmbeddings, GgufReranker

store = InMemoryVectorStore(GgufEmbeddings("qwen3-embedding-0.6b", truncate="end"))
retriever = ContextualCompressionRetriever(
    base_compressor=GgufReranker(top_n=3), base_retriever=store.as_retriever()
)
"""

# pyright: basic, reportMissingImports=false
# Types are checked where the partner is not installed, and what it defines is unknown then.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from pydantic import PrivateAttr

from gguf_embed.catalog import BUILTIN, RERANKER
from gguf_embed.engine.embedder import Embedder
from gguf_embed.integrations.held import HeldEmbedder, HeldReranker, TextChoices


class GgufEmbeddings(Embeddings):
    """Documents and queries with the model's own prompts; see `TextChoices` for the choices."""

    def __init__(
        self, model: str | Path | Embedder = BUILTIN, **choices: Unpack[TextChoices]
    ) -> None:
        """The name of a model, which is opened at its first use, or an open Embedder."""
        self.model = HeldEmbedder(model, **choices)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text."""
        return self.model.documents(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return self.model.queries([text])[0].tolist()

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents`, awaited."""
        return (await self.model.adocuments(texts)).tolist()

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query`, awaited."""
        return (await self.model.aqueries([text]))[0].tolist()


class GgufReranker(BaseDocumentCompressor):
    """The `top_n` documents that answer a query best; `relevance_score` is in their metadata."""

    model: Any = RERANKER  # a name or file, or an open Reranker
    top_n: int | None = 3
    task: str | None = None
    truncate: Literal["end", "error"] = "end"
    settings: Any = None
    isolated: bool = False

    _held: HeldReranker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Nothing is opened yet."""
        self._held = HeldReranker(
            self.model,
            task=self.task,
            truncate=self.truncate,
            settings=self.settings,
            isolated=self.isolated,
        )

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The best first."""
        best = self._held.best(query, [each.page_content for each in documents], self.top_n)
        return _with_scores(documents, best)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """`compress_documents`, awaited."""
        best = await self._held.abest(query, [each.page_content for each in documents], self.top_n)
        return _with_scores(documents, best)


def _with_scores(documents: Sequence[Document], best: list[tuple[int, float]]) -> list[Document]:
    return [
        documents[row].model_copy(
            update={"metadata": {**documents[row].metadata, "relevance_score": score}}
        )
        for row, score in best
    ]
