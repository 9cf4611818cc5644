"""How good vectors are: against a reference's, and against the truth where it is known.

meter = QualityMeter(task, reference)      # its own rankings, once
meter.quality(vectors)              # of another level, prompt, engine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf_embed.catalog.card import ModelCard
from gguf_embed.lab.metrics import (
    CosineStats,
    Ranking,
    Values,
    as_good,
    cosine_stats,
    loss_of,
    ndcg,
    ndcg_of_reference,
    neighbours,
    overlap,
    rank,
    recall,
)
from gguf_embed.lab.parallel import matching_accuracy, parallel_sentences
from gguf_embed.lab.tasks import Task
from gguf_embed.machine.measured import Loss
from gguf_embed.vectors import Vectors, finish

TOP = 10  # of rankings: overlap@10, recall@10, nDCG@10
MIN_DIM = 32  # vectors shorter than that are not asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A level's vectors against the reference's, and against the truth where it is known."""

    n_passages: int  # that were searched
    cosine: CosineStats  # of each text to itself in the reference
    overlap: float  # of the ten nearest texts of each text, share that is the reference's
    recall: float | None  # of the reference's ten best passages of a query; None: no queries
    ndcg_of_reference: float  # @10, the reference's ranking being the truth
    ndcg: float | None  # @10, by the qrels
    loss: Loss | None  # of that
    matching: float | None  # accuracy@1 of finding translations, mean over the language pairs
    by_dim: Mapping[int, float]  # nDCG@10 (by the qrels, else of the reference) of cut vectors
    n_truncated: int  # texts longer than the model takes

    @property
    def as_good(self) -> bool | None:
        """Whether it finds as well as the reference; None where the figures leave it open."""
        return as_good(self.loss, self.overlap, self.n_passages)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelVectors:
    """Vectors of one level (or prompt, or engine), shape (n, dim) each, of any length."""

    passages: Vectors
    queries: Vectors
    parallel: Vectors  # of `Parallel.texts`; no rows: not asked for


class QualityMeter:
    """Compares vectors with the reference's, whose own rankings are made once."""

    def __init__(self, task: Task, reference: LevelVectors, dims: Sequence[int]) -> None:
        """`dims`: lengths to which vectors are cut for `Quality.by_dim`."""
        self.task = task
        self.reference = reference
        self.dims = dims
        self.languages = tuple(parallel_sentences().sentences)
        self.neighbours = neighbours(reference.passages, k=TOP)
        self.ranking = self._ranking(reference, None)
        self.by_qrels = None if task.qrels is None else ndcg(self.ranking, task.qrels)

    def quality(self, level: LevelVectors, *, n_truncated: int) -> Quality:
        """The figures of one level."""
        found = self._ranking(level, None)
        by_qrels = None if self.task.qrels is None else ndcg(found, self.task.qrels)
        matching = None
        if len(level.parallel):
            pairs = matching_accuracy(level.parallel, self.languages)
            matching = sum(pairs.values()) / len(pairs)
        return Quality(
            n_passages=len(level.passages),
            cosine=cosine_stats(level.passages, self.reference.passages),
            overlap=_mean(overlap(neighbours(level.passages, k=TOP), self.neighbours)),
            recall=_mean(recall(found, [row.tolist() for row in self.ranking]))
            if self.task.queries
            else None,
            ndcg_of_reference=_mean(ndcg_of_reference(found, self.ranking)),
            ndcg=None if by_qrels is None else _mean(by_qrels),
            loss=None
            if by_qrels is None or self.by_qrels is None
            else loss_of(by_qrels, self.by_qrels),
            matching=matching,
            by_dim={dim: self._at(level, dim) for dim in self.dims},
            n_truncated=n_truncated,
        )

    def _at(self, level: LevelVectors, dim: int) -> float:
        """nDCG@10 with vectors cut to `dim` values."""
        found = self._ranking(level, dim)
        if self.task.qrels is not None:
            return _mean(ndcg(found, self.task.qrels))
        return _mean(ndcg_of_reference(found, self.ranking))

    def _ranking(self, level: LevelVectors, dim: int | None) -> Ranking:
        passages = finish(level.passages, dimensions=dim, normalize=True)
        if not self.task.queries:
            return neighbours(passages, k=TOP)
        return rank(finish(level.queries, dimensions=dim, normalize=True), passages, k=TOP)


def _mean(values: Values) -> float:
    return float(values.mean())


def dims_of(card: ModelCard | None, dim: int) -> tuple[int, ...]:
    """Vector lengths to try, longest first: the card's, else halves down to what it allows."""
    if card is not None and card.mrl_dims:
        return (dim, *(d for d in card.mrl_dims if d < dim))
    least = max(MIN_DIM, (card.mrl_min or 1) if card else 1)
    powers = [2**n for n in range(dim.bit_length(), 0, -1)]
    return (dim, *(power for power in powers if least <= power < dim))
