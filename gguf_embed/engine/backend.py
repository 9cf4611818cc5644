"""What the engine needs of whatever computes: the seam between texts and native code.

Above it are prompts, order, packing, turns and errors; below it llama.cpp, or a fake
(`gguf_embed.testing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from gguf_embed.native.model import Tokens
from gguf_embed.vectors import Vectors


class Head(Enum):
    """What a call asks of a text: the head is chosen by each call, not by the model."""

    POOLED = "pooled"  # one vector per text
    TOKENS = "tokens"  # one vector per token, before any pooling
    RANK = "rank"  # the scores of a reranker


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How large a microbatch may be, and how many are computed at a time."""

    max_tokens: int  # texts are packed up to this; a longer one is alone
    max_seqs: int
    max_prefix: int = 0  # tokens of a shared prefix that is computed once; 0: none is shared
    n_contexts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Vectors of one microbatch, shape (rows, dim), for Head.TOKENS (tokens, dim).

    `bad` are the rows without a usable vector; `died` those of them that killed the computing
    process.
    """

    vectors: Vectors
    bad: tuple[int, ...] = ()
    died: tuple[int, ...] = ()


class Backend(Protocol):
    """A model that computes microbatches. All of it may be called from several threads."""

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    @property
    def specials(self) -> frozenset[int]:
        """Tokens at the start or the end of a text that no cut may take away."""
        ...

    @property
    def limits(self) -> BatchLimits:
        """What `run` computes best."""
        ...

    def tokenize(self, text: str) -> Tokens:
        """Token ids, shape (n,). Raises UnicodeEncodeError for a lone surrogate."""
        ...

    def contexts_for(self, n_tokens: int, head: Head) -> int:
        """How many of the contexts a microbatch of so many tokens occupies."""
        ...

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        """Compute one microbatch; the first `n_prefix` tokens are the same in all sequences.

        `n_contexts` says how many contexts' threads may work on it. Head.TOKENS takes one text.
        """
        ...

    def close(self) -> None:
        """Free what is held; a second call does nothing."""
        ...
