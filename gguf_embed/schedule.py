"""Which rows are decoded together, and in which order. Pure: no model, no clock, no thread."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


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


def pack(
    lengths: Sequence[int], *, max_tokens: int, max_seqs: int, n_prefix: int = 0
) -> Iterator[Microbatch]:
    """Group rows into microbatches; each row appears once and no batch breaks a limit.

    Longest first: like lengths meet, the largest allocation comes at the start where a failure
    costs least, and the short batches at the end keep several contexts evenly busy. A row longer
    than `max_tokens` gets a microbatch of its own.
    """
    rows: list[int] = []
    n_tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if rows and (n_tokens + lengths[row] > max_tokens or len(rows) == max_seqs):
            yield Microbatch(rows=tuple(rows), n_tokens=n_tokens, n_prefix=n_prefix)
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
    texts: Sequence[Sequence[int] | npt.NDArray[np.int32]], *, min_saved: int
) -> list[Shared]:
    """Split rows into groups so that computing each group's common prefix once saves most tokens.

    A group must save at least `min_saved` tokens, (rows - 1) * n_prefix, which pays for the
    separate call that computes the prefix. Each row keeps at least one token of its own, because
    its last token is the one that is read. Every row is in exactly one group.
    """
    tokens = [np.asarray(text, ">i4") for text in texts]
    # Big-endian bytes sort as the token ids do, at the speed of memcmp.
    keys = [text.tobytes() for text in tokens]
    order = sorted(range(len(texts)), key=keys.__getitem__)
    common = [_common(tokens[a], tokens[b]) for a, b in pairwise(order)]

    grouped: list[Shared] = []
    for low, high, n_prefix in _best_intervals(common, min_saved=min_saved):
        grouped.append(Shared(rows=tuple(order[low:high]), n_prefix=n_prefix))
    taken = {row for group in grouped for row in group.rows}
    alone = tuple(row for row in range(len(texts)) if row not in taken)
    return [*grouped, Shared(rows=alone, n_prefix=0)] if alone else grouped


@dataclass(slots=True)
class _Interval:
    """Neighbours in sorted order that agree on `common` tokens, and the best way to split them."""

    common: int
    low: int
    saved: int
    groups: list[tuple[int, int, int]]


def _best_intervals(common: Sequence[int], *, min_saved: int) -> list[tuple[int, int, int]]:
    """(low, high, n_prefix) of the disjoint groups that save most.

    `common[i]` is what the sorted rows i and i+1 share. The nested intervals of equal sharing are
    closed from the inside out with a stack; each keeps the better of one group and its parts.
    """
    stack: list[_Interval] = []
    for i, shared in enumerate((*common, -1)):
        low, saved, groups = i, 0, list[tuple[int, int, int]]()
        while stack and stack[-1].common > shared:
            inner = stack.pop()
            low, saved, groups = inner.low, inner.saved + saved, inner.groups + groups
            together = (i - low) * inner.common
            if together >= max(saved, min_saved, 1):
                saved, groups = together, [(low, i + 1, inner.common)]
        if stack and stack[-1].common == shared:
            stack[-1].saved += saved
            stack[-1].groups += groups
        else:
            stack.append(_Interval(shared, low, saved, groups))
    return stack[0].groups


def _common(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    """Length of the common prefix, leaving each row at least one token of its own."""
    limit = max(min(len(a), len(b)) - 1, 0)
    differs = np.flatnonzero(a[:limit] != b[:limit])
    return int(differs[0]) if len(differs) else limit
