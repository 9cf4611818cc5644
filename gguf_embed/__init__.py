"""Text embeddings from GGUF models through llama.cpp.

    from gguf_embed import Embedder

    with Embedder.open("all-minilm-l6-v2") as embedder:
        vectors = embedder.encode(["one text", "another"])  # float32, shape (2, 384)

Importing this package loads no native library, reads no environment and opens no socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gguf_embed.engine import Embedder as Embedder

__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Embedder":
        from gguf_embed.engine import Embedder

        return Embedder
    raise AttributeError(f"module 'gguf_embed' has no attribute {name!r}")
