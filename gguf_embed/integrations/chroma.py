"""Chroma: an embedding function, which a collection writes down by itself (extra `chroma`).

from gguf_embed.integrations.chroma import GgufEmbeddingFunction

notes = client.create_collection("notes", embedding_function=GgufEmbeddingFunction())
"""

# pyright: basic, reportMissingImports=false
# Types are checked where the partner is not installed, and what it defines is unknown then.

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from gguf_embed.catalog import BUILTIN
from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadOption
from gguf_embed.integrations.held import HeldEmbedder, TextChoices


@register_embedding_function
class GgufEmbeddingFunction(EmbeddingFunction[Documents]):
    """Documents and queries with the model's own prompts; see `TextChoices` for the choices."""

    def __init__(
        self, model: str | Path | Embedder = BUILTIN, **choices: Unpack[TextChoices]
    ) -> None:
        """The name of a model, which is opened at its first use, or an open Embedder."""
        self.model = HeldEmbedder(model, **choices)

    def __call__(self, input: Documents) -> Embeddings:
        """Vectors of documents."""
        return [*self.model.documents(input)]

    def embed_query(self, input: Documents) -> Embeddings:
        """Vectors of queries."""
        return [*self.model.queries(input)]

    @staticmethod
    def name() -> str:
        """As Chroma writes it down."""
        return "gguf_embed"

    def default_space(self) -> Space:
        """Vectors have length 1."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """As Chroma writes it down."""
        return self.model.as_dict()

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> GgufEmbeddingFunction:
        """As Chroma reads it."""
        return GgufEmbeddingFunction(**config)

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Refuse what is no choice; nothing is opened."""
        HeldEmbedder.of(config)

    def validate_config_update(
        self, old_config: dict[str, Any], new_config: dict[str, Any]
    ) -> None:
        """Refuse what would mix vectors that cannot be compared."""
        for name in ("model", "task", "dimensions"):
            if old_config.get(name) != new_config.get(name):
                raise BadOption(
                    f"{name}: the collection has vectors of {old_config.get(name)!r}, which cannot "
                    f"be compared with those of {new_config.get(name)!r}; make a new collection"
                )
