"""How alike two sets of vectors are, and how good rankings are. Pure numpy.

A ranking has shape (n queries, k): positions of passages, best first. Every measure but
`cosine_stats` gives one float64 per query, so that the caller can take means, percentiles or
paired differences; `loss_of` and `as_good` make a verdict of those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_embed.machine.measured import Loss
from gguf_embed.vectors import Vectors, finish

Ranking: TypeAlias = npt.NDArray[np.intp]
Values: TypeAlias = npt.NDArray[np.float64]

MIN_QUERIES = 30  # fewer give no interval to be trusted
MIN_PASSAGES = 100  # of fewer the ten nearest are the same by chance, or for want of others
Z95 = 1.96  # half a 95 % interval of a mean, in standard errors
AS_GOOD = 0.01  # quality lost, at most, by vectors that are "as good"
SAME_RESULTS, MOSTLY_SAME = 0.95, 0.85  # share of the reference's ten nearest, without qrels

_BLOCK = 256  # queries scored at one time: memory stays at _BLOCK x passages


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineStats:
    """Cosines of pairs of vectors: their mean, 1st percentile and minimum."""

    mean: float
    p1: float
    min: float


def cosines(a: Vectors, b: Vectors) -> Values:
    """Cosine of each row of `a` with the same row of `b`, shape (n,); 0 where a row is zero."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    assert left.shape == right.shape, f"{left.shape} and {right.shape}"
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.einsum("nd,nd->n", left, right) / np.maximum(norms, np.finfo(np.float64).tiny)


def cosine_stats(a: Vectors, b: Vectors) -> CosineStats:
    """`cosines` in three numbers; there must be at least one row."""
    values = cosines(a, b)
    return CosineStats(
        mean=float(values.mean()), p1=float(np.percentile(values, 1)), min=float(values.min())
    )


def rank(queries: Vectors, passages: Vectors, *, k: int) -> Ranking:
    """The `k` passages of highest cosine for each query (all, where there are fewer).

    Of equal ones the first comes first.
    """
    return _rank(queries, passages, k=k, others_only=False)


def neighbours(vectors: Vectors, *, k: int) -> Ranking:
    """The `k` other rows of highest cosine for each row (all others, where there are fewer)."""
    return _rank(vectors, vectors, k=k, others_only=True)


def _rank(queries: Vectors, passages: Vectors, *, k: int, others_only: bool) -> Ranking:
    left = finish(queries, dimensions=None, normalize=True)
    right = finish(passages, dimensions=None, normalize=True)
    k = min(k, len(right) - others_only)
    found = np.empty((len(left), k), np.intp)
    for start in range(0, len(left), _BLOCK):
        scores = left[start : start + _BLOCK] @ right.T
        for row, of_one in enumerate(scores, start):
            if others_only:
                of_one[row] = -np.inf
            found[row] = _best(of_one, k)
    return found


def _best(scores: npt.NDArray[np.float32], k: int) -> Ranking:
    """Positions of the `k` highest scores, best first, shape (k,)."""
    if k == 0:
        return np.empty(0, np.intp)
    # A partition alone would take any of those that tie at the end.
    last = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= last)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def overlap(a: Ranking, b: Ranking) -> Values:
    """Share of `a` that is in `b` too, whatever the order, shape (n,); both of one shape."""
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    shared = (a[:, :, None] == b[:, None, :]).any(axis=2)
    return shared.mean(axis=1) if a.shape[1] else np.ones(len(a))


def recall(found: Ranking, relevant: Sequence[Collection[int]]) -> Values:
    """Share of each query's relevant passages that were found, shape (n,).

    0 for a query without relevant passages, as in trec_eval: leave such queries out.
    """
    shares = (
        len(set(relevant_to).intersection(row.tolist())) / max(len(set(relevant_to)), 1)
        for row, relevant_to in zip(found, relevant, strict=True)
    )
    return np.fromiter(shares, np.float64, len(found))


def ndcg(found: Ranking, qrels: Sequence[Mapping[int, float]]) -> Values:
    """nDCG of each ranking at its length, shape (n,); `qrels[i]` maps passages to relevance.

    As trec_eval, hence BEIR and MTEB: the gain is the relevance itself, the discount
    log2(rank + 1), and the ideal ranking is made of all judged passages. 0 where none is relevant.
    """
    discounts = _discounts(found.shape[1])
    values = np.zeros(len(found))
    for query, (row, judged) in enumerate(zip(found, qrels, strict=True)):
        gains = np.array([max(judged.get(int(passage), 0.0), 0.0) for passage in row])
        ideal = np.sort([gain for gain in judged.values() if gain > 0])[::-1][: len(row)]
        if len(ideal):
            values[query] = gains @ discounts / (ideal @ discounts[: len(ideal)])
    return values


def ndcg_of_reference(found: Ranking, reference: Ranking) -> Values:
    """nDCG of each ranking where another ranking of the same length is the truth, shape (n,).

    The reference's first passage has gain k, its last gain 1: 1.0 is the same order, and a swap
    far down costs little.
    """
    n_best = reference.shape[1]
    truth = [
        {int(passage): float(n_best - at) for at, passage in enumerate(row)} for row in reference
    ]
    return ndcg(found, truth)


def _discounts(k: int) -> Values:
    return 1 / np.log2(np.arange(2, k + 2))


def loss_of(level: Values, reference: Values) -> Loss | None:
    """What a level loses of the reference's mean, from paired figures per query, shape (n,) each.

    The interval is that of the mean difference: the two rank for the same queries, so what makes
    a query hard cancels out. None where the reference finds nothing, and for few queries, which
    can agree by chance.
    """
    mean = float(reference.mean())
    if mean == 0 or len(reference) < MIN_QUERIES:
        return None
    lost = reference - level
    middle, error = float(lost.mean()), float(lost.std(ddof=1)) / sqrt(len(lost))
    return Loss(
        mean=middle / mean, low=(middle - Z95 * error) / mean, high=(middle + Z95 * error) / mean
    )


def as_good(loss: Loss | None, overlap: float, n_passages: int) -> bool | None:
    """Whether vectors find as well as the reference's; None where the figures leave it open.

    By the loss where there are qrels: within AS_GOOD either way, or surely lost and more than that.
    Else by the `overlap` of the ten nearest of `n_passages`.
    """
    if loss is not None:
        if loss.bound <= AS_GOOD:
            return True
        return False if loss.low > 0 and loss.mean > AS_GOOD else None
    if n_passages < MIN_PASSAGES or MOSTLY_SAME <= overlap < SAME_RESULTS:
        return None
    return overlap >= SAME_RESULTS


def spearman(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> Values:
    """Rank correlation of each row of `a` with the same row of `b`, shape (n,); ties share ranks.

    NaN for a row of one value only: it has no order.
    """
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    rows = (_correlation(_ranks(x), _ranks(y)) for x, y in zip(a, b, strict=True))
    return np.fromiter(rows, np.float64, len(a))


def _ranks(values: npt.NDArray[np.floating]) -> Values:
    """Ranks from 1; equal values get the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _correlation(x: Values, y: Values) -> float:
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread else float("nan")
