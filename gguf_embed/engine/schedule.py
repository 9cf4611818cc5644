"""Which rows of one caller are computed together, and in which order.

Pure: no model, no clock, no thread. Whose rows come next is decided in `turns`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.backend import BatchLimits, Head
from gguf_embed.native.model import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Rows decoded in one native call. `n_tokens` leaves out a shared prefix."""

    rows: tuple[int, ...]  # positions in the caller's list
    n_tokens: int
    n_prefix: int = 0  # leading tokens that all rows share and that are computed once


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of one native call on T tokens: fixed_s + token_s * T + pair_s * T * T.

    llama.cpp runs attention over the whole microbatch and masks it, hence the square. With the
    three numbers fitted by the tuner, the cheapest size per token is sqrt(fixed_s / pair_s).
    """

    fixed_s: float
    token_s: float
    pair_s: float

    def seconds(self, n_tokens: int) -> float:
        """Predicted seconds of one call on `n_tokens` tokens."""
        return self.fixed_s + self.token_s * n_tokens + self.pair_s * n_tokens * n_tokens

    def best_tokens(self, max_tokens: int) -> int:
        """The number of tokens with the least cost per token, at most `max_tokens`."""
        if self.pair_s <= 0:
            return max_tokens
        return max(1, min(max_tokens, round(math.sqrt(max(self.fixed_s, 0.0) / self.pair_s))))


def pack_rows(
    tokens: Sequence[Tokens], limits: BatchLimits, head: Head = Head.POOLED
) -> list[Microbatch]:
    """All rows of a caller in microbatches, rows that share a prefix with one another."""
    if head is Head.TOKENS or len(tokens) == 1:
        return [Microbatch(rows=(row,), n_tokens=len(ids)) for row, ids in enumerate(tokens)]
    groups = [Shared(rows=tuple(range(len(tokens))), n_prefix=0)]
    if limits.max_prefix:
        groups = shared_prefixes(tokens, group_cost=prefix_cost(limits))
    batches: list[Microbatch] = []
    for group in groups:
        n_prefix = min(group.n_prefix, limits.max_prefix)
        for batch in pack(
            [len(tokens[row]) - n_prefix for row in group.rows],
            max_tokens=body_tokens(limits, n_prefix),
            max_seqs=limits.max_seqs,
            n_prefix=n_prefix,
            n_contexts=limits.n_contexts,
        ):
            batches.append(replace(batch, rows=tuple(group.rows[i] for i in batch.rows)))
    return batches


def body_tokens(limits: BatchLimits, n_prefix: int) -> int:
    """Tokens of a microbatch beside its prefix.

    Attention runs over the prefix as well; a long one must still leave room for texts.
    """
    return limits.max_tokens - min(n_prefix, limits.max_tokens // 2)


def prefix_cost(limits: BatchLimits) -> int:
    """What the separate call for a prefix costs, in tokens."""
    return limits.max_tokens // 8


LEAST_TOKENS = 128  # of a microbatch made small only to keep another context busy


def pack(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    max_seqs: int,
    n_prefix: int = 0,
    n_contexts: int = 1,
) -> Iterator[Microbatch]:
    """Group rows into microbatches; each row appears once and no batch breaks a limit.

    Longest first: like lengths meet, and the largest allocation comes at the start where a failure
    costs least. A row longer than `max_tokens` gets a microbatch of its own. The others are of
    about equal size and, where that leaves `LEAST_TOKENS` in each, a multiple of `n_contexts` in
    number, so that all contexts end together.
    """
    left_tokens = sum(lengths)
    n_fewest = -(-left_tokens // max_tokens)
    n_even = -(-n_fewest // n_contexts) * n_contexts
    left = max(n_fewest, min(n_even, left_tokens // LEAST_TOKENS))
    rows: list[int] = []
    n_tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        full = n_tokens + lengths[row] > max_tokens or len(rows) == max_seqs
        # Nearer to its even share without this row than with it.
        enough = (2 * n_tokens + lengths[row]) * left > 2 * left_tokens
        if rows and (full or (enough and left > 1)):
            yield Microbatch(rows=tuple(rows), n_tokens=n_tokens, n_prefix=n_prefix)
            left, left_tokens = max(1, left - 1), left_tokens - n_tokens
            rows, n_tokens = [], 0
        rows.append(row)
        n_tokens += lengths[row]
    if rows:
        yield Microbatch(rows=tuple(rows), n_tokens=n_tokens, n_prefix=n_prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Rows that start with the same `n_prefix` tokens; 0 where nothing is worth sharing."""

    rows: tuple[int, ...]
    n_prefix: int


def shared_prefixes(
    texts: Sequence[Sequence[int] | npt.NDArray[np.int32]], *, group_cost: int
) -> list[Shared]:
    """Split rows into groups so that computing each group's common prefix once saves most tokens.

    A group saves (rows - 1) * n_prefix tokens and costs `group_cost`, the separate call for its
    prefix expressed in tokens. Each row keeps at least one token of its own, because its last
    token is the one that is read. Every row is in exactly one group.
    """
    tokens = [np.asarray(text, ">i4") for text in texts]
    # Big-endian bytes sort as the token ids do, at the speed of memcmp.
    keys = [text.tobytes() for text in tokens]
    order = sorted(range(len(texts)), key=keys.__getitem__)
    common = [n_common(tokens[a], tokens[b]) for a, b in pairwise(order)]

    # In sorted order, rows that share a prefix are neighbours, and such runs are nested. A stack
    # closes them from the inside out.
    stack: list[_Run] = []
    for row, n_shared in zip(order, [*common, -1][: len(order)], strict=True):
        run = _Run(common=n_shared, loose=[row], groups=[])
        while stack and stack[-1].common > n_shared:
            inner = stack.pop()
            run.loose[:0] = inner.loose
            run.groups[:0] = inner.groups
            run.settle(inner.common, group_cost)
        if stack and stack[-1].common == n_shared:
            stack[-1].loose += run.loose
            stack[-1].groups += run.groups
        else:
            stack.append(run)
    if not stack:
        return []
    root = stack[0]
    alone = Shared(rows=tuple(sorted(root.loose)), n_prefix=0)
    return [*root.groups, alone] if alone.rows else root.groups


@dataclass(slots=True)
class _Run:
    """Neighbours in sorted order that agree on `common` tokens."""

    common: int
    loose: list[int]  # rows in no group yet
    groups: list[Shared]  # groups formed inside, on longer prefixes

    def settle(self, n_prefix: int, group_cost: int) -> None:
        """Group the loose rows on `n_prefix` tokens, with the inner groups that gain by joining."""
        joining = [
            group
            for group in self.groups
            if (len(group.rows) - 1) * group.n_prefix - group_cost <= len(group.rows) * n_prefix
        ]
        rows = [*self.loose, *(row for group in joining for row in group.rows)]
        lost = sum((len(group.rows) - 1) * group.n_prefix - group_cost for group in joining)
        if (len(rows) - 1) * n_prefix - group_cost > max(lost, 0):
            self.groups = [group for group in self.groups if group not in joining]
            self.groups.append(Shared(rows=tuple(rows), n_prefix=n_prefix))
            self.loose = []


def n_common(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    """Length of the common prefix, leaving each row at least one token of its own."""
    limit = max(min(len(a), len(b)) - 1, 0)
    differs = np.flatnonzero(a[:limit] != b[:limit])
    return int(differs[0]) if len(differs) else limit
