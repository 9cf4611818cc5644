"""What a call that embeds takes by keyword, and what it gives back beside vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.turns import Priority
from gguf_embed.vectors import Vectors

Truncate: TypeAlias = Literal["error", "end", "start"]
OnError: TypeAlias = Literal["raise", "skip"]
# Texts and tokens done since the last call; called in the thread that takes the results.
OnProgress: TypeAlias = Callable[[int, int], None]


class VectorOptions(TypedDict, total=False):
    """What may be said of the vectors of any call, by keyword.

    `dimensions` keeps the first values (MRL) before normalizing. A text longer than `n_ctx` is an
    error unless `truncate` says which end to cut; the end token is kept. `max_tokens` sets a lower
    limit than `n_ctx`; prompt and special tokens count. A call of a higher `priority` overtakes
    others at the next microbatch.
    """

    dimensions: int | None
    normalize: bool
    truncate: Truncate
    max_tokens: int | None
    priority: Priority


class EncodeOptions(VectorOptions, total=False):
    """What `encode` and `stream` take by keyword.

    `prompt_name` puts one of the model's `prompts` in front of each text, `prompt` any string.
    A text that has no vector (NaN on every path, or it kills the child of an isolated engine) is an
    error; with `on_error="skip"` its vector is all NaN and the block names it.
    """

    prompt_name: str | None
    prompt: str | None
    on_error: OnError


class RerankOptions(TypedDict, total=False):
    """What `Reranker.score` and `Reranker.rank` take by keyword.

    `task` replaces the instruction of a model that takes one. A document that does not fit beside
    the query loses its end, which is logged; with `truncate="error"` it is an error. `raw` gives
    logits in place of scores from 0 to 1. A document without a score (NaN on every path, or it
    kills the child of an isolated engine) is an error; with `on_error="skip"` its score is NaN.
    """

    task: str | None
    truncate: Literal["end", "error"]
    raw: bool
    priority: Priority
    on_error: OnError
    on_progress: OnProgress | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Documents with their scores, in the order as given."""

    scores: Vectors  # (n,)
    n_tokens: Sequence[int]  # of the pairs, as computed
    truncated: Sequence[bool]  # whose ends were cut
    failed: Sequence[FailedRow] = ()  # with on_error="skip": those without a score


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A document with its score."""

    index: int  # its position in the documents as given
    score: float
    document: str
    n_tokens: int  # of the pair, as computed
    truncated: bool  # its end was cut


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRow:
    """A text without a vector, or a document without a score."""

    row: int
    n_tokens: int | None  # None: it cannot be tokenized
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive results of `stream`; row i of each array is text `start + i`."""

    start: int
    vectors: Vectors  # (n, dim)
    token_counts: npt.NDArray[
        np.int32
    ]  # (n,), after truncation; 0 of a text that cannot be tokenized
    truncated: npt.NDArray[np.bool_]  # (n,)
    failed: tuple[FailedRow, ...] = ()  # with on_error="skip"; their vectors are all NaN
