"""txtai: vectors of an index (extra `txtai`).

import gguf_embed.integrations.txtai

embeddings = txtai.Embeddings(
    method="gguf_embed.integrations.txtai.GgufVectors", path="qwen3-embedding-0.6b"
)
"""

# pyright: basic, reportMissingImports=false
# Types are checked where the partner is not installed, and what it defines is unknown then.

from __future__ import annotations

from typing import Any

from txtai.vectors import Vectors

from gguf_embed.catalog import BUILTIN
from gguf_embed.integrations.held import HeldEmbedder


class GgufVectors(Vectors):
    """Data and queries with the model's own prompts; `vectors` holds `TextChoices`."""

    def loadmodel(self, path: str | None) -> HeldEmbedder:
        """The model of `path`, which is opened at its first use."""
        return HeldEmbedder(path or BUILTIN, **self.config.get("vectors", {}))

    def encode(self, data: list[str], category: str | None = None) -> Any:
        """Vectors, shape (n, dim)."""
        return self.model.queries(data) if category == "query" else self.model.documents(data)
