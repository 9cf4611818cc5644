"""What is asked of a model and what comes back, in no dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.options import (
    EncodeOptions,
    FailedRow,
    OnError,
    RerankOptions,
    Scored,
    Truncate,
)
from gguf_embed.engine.turns import Priority
from gguf_embed.vectors import Vectors

# Of a request that is short.
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
    def is_short(self) -> bool:
        """A few short texts: somebody's question, that overtakes."""
        return _is_short(self.texts)

    @property
    def options(self) -> EncodeOptions:
        """As `Embedder.prepare` takes them."""
        return {
            "prompt_name": self.prompt_name,
            "dimensions": self.dimensions,
            "normalize": self.normalize,
            "truncate": self.truncate,
            "priority": _priority(is_short=self.is_short),
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
class Result:
    """What is told of every request that a model computed."""

    model: str  # as the request named it
    served: str  # as it is served
    token_counts: npt.NDArray[np.int32]  # (n,), after the cut; of pairs, those of the query too
    n_tokens: int  # of all texts
    n_truncated: int
    n_chars: int
    times: Times


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded(Result):
    """Vectors in the order of the texts."""

    vectors: Vectors  # (n, dim)
    failed: tuple[FailedRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranked(Result):
    """Scores in the order of the documents."""

    scores: Vectors  # (n,)
    scored: Scored  # the same with more, as the engine tells it

    def best(self, top: int | None = None) -> list[tuple[int, float]]:
        """Positions with scores, the best first; of equal ones the first given."""
        order = np.argsort(-self.scores, kind="stable")[:top]
        return [(int(row), float(self.scores[row])) for row in order]


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Documents to scores."""

    query: str
    documents: Sequence[str]
    model: str | None = None
    task: str | None = None
    raw_scores: bool = False
    truncate: Literal["end", "error"] = "error"
    on_error: OnError = "raise"  # "skip": a document without a score has NaN

    @property
    def texts(self) -> list[str]:
        """All of them."""
        return [self.query, *self.documents]

    @property
    def is_short(self) -> bool:
        """See `EmbedRequest.is_short`."""
        return _is_short(self.texts)

    @property
    def options(self) -> RerankOptions:
        """As `Reranker.prepare` takes them."""
        return {
            "task": self.task,
            "raw": self.raw_scores,
            "truncate": self.truncate,
            "priority": _priority(is_short=self.is_short),
            "on_error": self.on_error,
        }


def _is_short(texts: Sequence[str] | Sequence[list[int]]) -> bool:
    return len(texts) <= URGENT_TEXTS and sum(map(len, texts)) <= URGENT_CHARS


def _priority(*, is_short: bool) -> Priority:
    return Priority.QUERY if is_short else Priority.NORMAL
