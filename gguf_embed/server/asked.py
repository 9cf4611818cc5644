"""What is asked of a model and what comes back, in no dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.options import EncodeOptions, FailedRow, OnError, Truncate
from gguf_embed.engine.turns import Priority
from gguf_embed.vectors import Vectors

URGENT_TEXTS: Final = 4
URGENT_CHARS: Final = 2000  # of all texts


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Texts, or lists of token ids of the model, to vectors."""

    texts: Sequence[str] | Sequence[list[int]]
    model: str | None = None  # None: the first that is served
    prompt_name: str | None = None
    # A model that has no prompt of that name gets none, rather than an error.
    prompt_if_known: bool = False
    dimensions: int | None = None
    normalize: bool = True
    truncate: Truncate = "error"
    keep_alive_s: float | None = None  # None: as the server keeps it
    on_error: OnError = "raise"  # "skip": a text without a vector is among `failed`

    @property
    def priority(self) -> Priority:
        """A few short texts are somebody's question, and overtake."""
        n = len(self.texts)
        urgent = n <= URGENT_TEXTS and sum(map(len, self.texts)) <= URGENT_CHARS
        return Priority.QUERY if urgent else Priority.NORMAL

    @property
    def options(self) -> EncodeOptions:
        """As `Embedder.prepare` takes them."""
        return {
            "prompt_name": self.prompt_name,
            "dimensions": self.dimensions,
            "normalize": self.normalize,
            "truncate": self.truncate,
            "priority": self.priority,
            "on_error": self.on_error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Where the time of a request went, in seconds."""

    total_s: float
    load_s: float  # until the model was there
    tokenize_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Vectors in the order of the texts."""

    model: str  # as the request named it
    served: str  # as it is served
    vectors: Vectors  # (n, dim)
    token_counts: npt.NDArray[np.int32]  # (n,), after the cut
    n_truncated: int
    failed: tuple[FailedRow, ...]
    n_chars: int
    times: Times

    @property
    def n_tokens(self) -> int:
        """Of all texts."""
        return int(self.token_counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Documents to scores."""

    query: str
    documents: Sequence[str]
    model: str | None = None
    raw_scores: bool = False
    truncate: Truncate = "error"
