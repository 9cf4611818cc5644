"""A plugin of `llm`: `llm embed -m gguf/qwen3-embedding:0.6b -c "a text"` (extra `llm`).

llm finds it by itself where both are installed. Each model of the catalog is there as `gguf/NAME`.
llm cannot ask for an end to cut, so longer texts are cut at theirs, and the log tells it.
"""

# pyright: basic, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false, reportArgumentType=false
# Types are checked where the partner is not installed, and `llm` is
# taken for this file.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import llm

from gguf_embed.catalog import catalog
from gguf_embed.integrations.held import HeldEmbedder


class GgufModel(llm.EmbeddingModel):
    """A model of the catalog, which is opened at its first use."""

    batch_size = 2048  # texts of a call; the engine packs them by their tokens

    def __init__(self, name: str) -> None:
        """Nothing is opened yet."""
        self.model_id = f"gguf/{name}"
        self._held = HeldEmbedder(name, truncate="end")

    def embed_batch(self, items: Iterable[str | bytes]) -> Iterator[list[float]]:
        """A vector for each text, with the document prompt."""
        yield from self._held.documents([*items]).tolist()


@llm.hookimpl
def register_embedding_models(register: Callable[..., None]) -> None:
    """What llm calls at its start."""
    for card in catalog.cards():
        if card.kind == "embedder":
            aliases = tuple(f"gguf/{alias}" for alias in card.aliases)
            register(GgufModel(card.id), aliases=aliases)
