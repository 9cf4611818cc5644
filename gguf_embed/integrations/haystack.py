"""Haystack: embedders of texts and documents, and a ranker (extra `haystack`).

from gguf_embed.integrations.haystack import GgufDocumentEmbedder, GgufRanker, GgufTextEmbedder

pipeline.add_component("embedder", GgufTextEmbedder("qwen3-embedding-0.6b", truncate="end"))
"""

# pyright: basic, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false, reportArgumentType=false
# Types are checked where the partner is not installed, and `haystack` is
# taken for this file.

# Haystack reads the types of sockets when a class is made, so they are no strings here.

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from haystack import Document, component, default_from_dict, default_to_dict

from gguf_embed.catalog import BUILTIN, RERANKER
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.reranker import Reranker
from gguf_embed.integrations.held import HeldEmbedder, HeldReranker, PairChoices, TextChoices


@component
class GgufTextEmbedder:
    """The vector of a query, with the model's query prompt; `TextChoices` are the choices."""

    def __init__(
        self, model: str | Path | Embedder = BUILTIN, **choices: Unpack[TextChoices]
    ) -> None:
        """The name of a model, which is opened at its first use, or an open Embedder."""
        self.model = HeldEmbedder(model, **choices)

    def warm_up(self) -> None:
        """Open the model."""
        _ = self.model.opened

    def to_dict(self) -> dict[str, Any]:
        """As Haystack writes it down."""
        return default_to_dict(self, **self.model.as_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "GgufTextEmbedder":
        """As Haystack reads it."""
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """`embedding` of the text."""
        return {"embedding": self.model.queries([text])[0].tolist()}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, Any]:
        """`run`, awaited."""
        return {"embedding": (await self.model.aqueries([text]))[0].tolist()}


@component
class GgufDocumentEmbedder:
    """Documents with their vectors, which have the model's document prompt.

    The fields of the metadata in `meta_fields_to_embed` come in front of the content.
    """

    def __init__(
        self,
        model: str | Path | Embedder = BUILTIN,
        *,
        meta_fields_to_embed: Sequence[str] = (),
        embedding_separator: str = "\n",
        progress_bar: bool | None = None,
        **choices: Unpack[TextChoices],
    ) -> None:
        """The name of a model, which is opened at its first use, or an open Embedder."""
        self.model = HeldEmbedder(model, **choices)
        self.meta_fields_to_embed = [*meta_fields_to_embed]
        self.embedding_separator = embedding_separator
        self.progress_bar = progress_bar

    def warm_up(self) -> None:
        """Open the model."""
        _ = self.model.opened

    def to_dict(self) -> dict[str, Any]:
        """As Haystack writes it down."""
        return default_to_dict(
            self,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            progress_bar=self.progress_bar,
            **self.model.as_dict(),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "GgufDocumentEmbedder":
        """As Haystack reads it."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """`documents`, each with its `embedding`."""
        vectors = self.model.documents(self._texts(documents), progress=self.progress_bar)
        return {"documents": _with_vectors(documents, vectors.tolist())}

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """`run`, awaited."""
        vectors = await self.model.adocuments(self._texts(documents))
        return {"documents": _with_vectors(documents, vectors.tolist())}

    def _texts(self, documents: list[Document]) -> list[str]:
        fields = self.meta_fields_to_embed
        return [
            self.embedding_separator.join(
                [
                    *(str(each.meta[name]) for name in fields if each.meta.get(name) is not None),
                    each.content or "",
                ]
            )
            for each in documents
        ]


@component
class GgufRanker:
    """The `top_k` documents that answer a query best, with the reranker's scores."""

    def __init__(
        self,
        model: str | Path | Reranker = RERANKER,
        *,
        top_k: int | None = 10,
        **choices: Unpack[PairChoices],
    ) -> None:
        """The name of a model, which is opened at its first use, or an open Reranker."""
        self.model = HeldReranker(model, **choices)
        self.top_k = top_k

    def warm_up(self) -> None:
        """Open the model."""
        _ = self.model.opened

    def to_dict(self) -> dict[str, Any]:
        """As Haystack writes it down."""
        return default_to_dict(self, top_k=self.top_k, **self.model.as_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "GgufRanker":
        """As Haystack reads it."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, Any]:
        """`documents`, the best first, each with its `score`."""
        texts = [each.content or "" for each in documents]
        best = self.model.best(query, texts, self._top(top_k))
        return {"documents": _with_scores(documents, best)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, Any]:
        """`run`, awaited."""
        texts = [each.content or "" for each in documents]
        best = await self.model.abest(query, texts, self._top(top_k))
        return {"documents": _with_scores(documents, best)}

    def _top(self, top_k: int | None) -> int | None:
        return self.top_k if top_k is None else top_k


def _with_vectors(documents: list[Document], vectors: list[list[float]]) -> list[Document]:
    return [
        replace(each, embedding=vector) for each, vector in zip(documents, vectors, strict=True)
    ]


def _with_scores(documents: list[Document], best: list[tuple[int, float]]) -> list[Document]:
    return [replace(documents[row], score=score) for row, score in best]
