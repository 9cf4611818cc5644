"""Values of the cache of vectors: what goes in, what comes out, how much of it there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from gguf_embed.vectors import Vectors

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.options import EncodeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A vector space, as the cache knows it."""

    fingerprint: str  # the id of a `Fingerprint`
    dim: int
    label: str  # for people: model and quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A vector to keep."""

    text: str
    vector: Vectors  # (dim,)
    n_tokens: int  # of the text, prompt and special tokens included


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A vector that was kept."""

    vector: Vectors  # (dim,), not writable
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceUse:
    """How much of the cache is of one space."""

    space: Space
    n_vectors: int
    n_bytes: int  # about
    used_at: float  # last, as time.time() says it


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """What is in a cache."""

    path: Path
    n_bytes: int  # that vectors take in the file
    limit_bytes: int
    spaces: tuple[SpaceUse, ...]


def space_of(embedder: Embedder, **options: Unpack[EncodeOptions]) -> Space:
    """The space of the vectors that such a call of `embedder` gives."""
    fingerprint = embedder.fingerprint(**options)
    label = f"{embedder.model_id} {embedder.quant}"
    return Space(fingerprint=fingerprint.id, dim=fingerprint.dim, label=label)
