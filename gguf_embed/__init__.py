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
    from gguf_embed.engine.embedder import Embedder as Embedder
    from gguf_embed.engine.fingerprint import Fingerprint as Fingerprint
    from gguf_embed.engine.options import Block as Block
    from gguf_embed.engine.options import EncodeOptions as EncodeOptions
    from gguf_embed.engine.options import FailedRow as FailedRow
    from gguf_embed.engine.options import Ranked as Ranked
    from gguf_embed.engine.options import RerankOptions as RerankOptions
    from gguf_embed.engine.reranker import Reranker as Reranker
    from gguf_embed.engine.turns import Priority as Priority
    from gguf_embed.errors import BadInput as BadInput
    from gguf_embed.errors import BadModelFile as BadModelFile
    from gguf_embed.errors import BadOption as BadOption
    from gguf_embed.errors import BadText as BadText
    from gguf_embed.errors import DoesNotFit as DoesNotFit
    from gguf_embed.errors import FetchFailed as FetchFailed
    from gguf_embed.errors import GgufEmbedError as GgufEmbedError
    from gguf_embed.errors import ModelNotFound as ModelNotFound
    from gguf_embed.errors import NativeFailed as NativeFailed
    from gguf_embed.errors import OutputFailed as OutputFailed
    from gguf_embed.errors import TextTooLong as TextTooLong
    from gguf_embed.index.index import Hit as Hit
    from gguf_embed.index.index import Index as Index
    from gguf_embed.io.stored import StoredVectors as StoredVectors
    from gguf_embed.io.stored import read_vectors as read_vectors
    from gguf_embed.plan.settings import Settings as Settings
    from gguf_embed.vectors import Pooling as Pooling

# Where each name is; it is imported when it is first asked for.
_PLACES = {
    "Block": "gguf_embed.engine.options",
    "Embedder": "gguf_embed.engine.embedder",
    "EncodeOptions": "gguf_embed.engine.options",
    "FailedRow": "gguf_embed.engine.options",
    "Fingerprint": "gguf_embed.engine.fingerprint",
    "Hit": "gguf_embed.index.index",
    "Index": "gguf_embed.index.index",
    "Priority": "gguf_embed.engine.turns",
    "Ranked": "gguf_embed.engine.options",
    "RerankOptions": "gguf_embed.engine.options",
    "Reranker": "gguf_embed.engine.reranker",
    "Settings": "gguf_embed.plan.settings",
    "StoredVectors": "gguf_embed.io.stored",
    "read_vectors": "gguf_embed.io.stored",
    "Pooling": "gguf_embed.vectors",
    "BadInput": "gguf_embed.errors",
    "BadModelFile": "gguf_embed.errors",
    "BadOption": "gguf_embed.errors",
    "BadText": "gguf_embed.errors",
    "DoesNotFit": "gguf_embed.errors",
    "FetchFailed": "gguf_embed.errors",
    "GgufEmbedError": "gguf_embed.errors",
    "ModelNotFound": "gguf_embed.errors",
    "NativeFailed": "gguf_embed.errors",
    "OutputFailed": "gguf_embed.errors",
    "TextTooLong": "gguf_embed.errors",
}

__all__ = [
    "BadInput",
    "BadModelFile",
    "BadOption",
    "BadText",
    "Block",
    "DoesNotFit",
    "Embedder",
    "EncodeOptions",
    "FailedRow",
    "FetchFailed",
    "Fingerprint",
    "GgufEmbedError",
    "Hit",
    "Index",
    "ModelNotFound",
    "NativeFailed",
    "OutputFailed",
    "Pooling",
    "Priority",
    "Ranked",
    "RerankOptions",
    "Reranker",
    "Settings",
    "StoredVectors",
    "TextTooLong",
    "__version__",
    "read_vectors",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'gguf_embed' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
