"""Measures of likeness and ranking: definitions by hand, then what must always hold."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gguf_embed.lab import metrics
from gguf_embed.lab.metrics import CosineStats

# Few values, so that ties are common; small integers, so that cosines of ties are equal.
SMALL = arrays(
    np.float32,
    st.tuples(st.integers(2, 12), st.integers(1, 4)),
    elements=st.integers(-2, 2).map(float),
)


def f32(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def test_cosine_of_pairs():
    a = f32([1, 0], [3, 4], [0, 0], [1, 1])
    b = f32([5, 0], [-3, -4], [1, 0], [0, 2])
    np.testing.assert_allclose(metrics.cosines(a, b), [1, -1, 0, math.sqrt(0.5)], atol=1e-12)


def test_cosine_stats():
    angles = np.linspace(0, 1, 101)
    a = np.tile(f32([1, 0]), (101, 1))
    b = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    stats = metrics.cosine_stats(a, b)
    # Of 101 sorted values the 1st percentile is the second.
    expected = CosineStats(mean=np.cos(angles).mean(), p1=math.cos(0.99), min=math.cos(1))
    for name in ("mean", "p1", "min"):
        assert getattr(stats, name) == pytest.approx(getattr(expected, name), abs=1e-6)


def test_rank_by_hand():
    passages = f32([0, 1], [1, 0], [1, 1], [10, 10], [-1, 0])
    found = metrics.rank(f32([2, 0], [0, 3]), passages, k=3)
    # 2 and 3 are equal: the first comes first; length is no merit.
    assert found.tolist() == [[1, 2, 3], [0, 2, 3]]


@given(SMALL, st.integers(1, 15), st.data())
def test_rank_is_a_stable_sort_by_cosine(passages: np.ndarray, k: int, data: st.DataObject):
    n = data.draw(st.integers(1, 3))
    shape = (n, passages.shape[1])
    queries = data.draw(arrays(np.float32, shape, elements=st.integers(-2, 2).map(float)))
    units = metrics.finish(passages, dimensions=None, normalize=True)
    wanted = metrics.finish(queries, dimensions=None, normalize=True) @ units.T
    found = metrics.rank(queries, passages, k=k)
    assert found.shape == (n, min(k, len(passages)))
    for row, scores in zip(found.tolist(), wanted, strict=True):
        assert row == sorted(range(len(passages)), key=lambda i: (-scores[i], i))[:k]


def test_rank_of_none_is_empty():
    assert metrics.rank(f32([1, 0]), f32([1, 0], [0, 1]), k=0).shape == (1, 0)


def test_a_loss_of_few_queries_or_of_nothing_says_nothing():
    ones = np.ones(metrics.MIN_QUERIES)
    assert metrics.loss_of(ones[1:], ones[1:]) is None
    assert metrics.loss_of(ones, 0 * ones) is None
    lost = metrics.loss_of(0 * ones, ones)
    assert lost is not None
    assert (lost.mean, lost.low, lost.high) == (1, 1, 1)


@given(SMALL, st.integers(1, 15))
def test_neighbours_are_the_ranking_without_the_row_itself(vectors: np.ndarray, k: int):
    everything = metrics.rank(vectors, vectors, k=len(vectors)).tolist()
    found = metrics.neighbours(vectors, k=k)
    assert found.shape == (len(vectors), min(k, len(vectors) - 1))
    for row, (got, all_of_them) in enumerate(zip(found.tolist(), everything, strict=True)):
        assert got == [other for other in all_of_them if other != row][:k]


def test_rank_in_blocks_is_the_same_ranking(monkeypatch: pytest.MonkeyPatch):
    vectors = np.random.RandomState(0).normal(size=(50, 8)).astype(np.float32)
    whole = metrics.rank(vectors[:23], vectors, k=10), metrics.neighbours(vectors, k=10)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    assert np.array_equal(metrics.rank(vectors[:23], vectors, k=10), whole[0])
    assert np.array_equal(metrics.neighbours(vectors, k=10), whole[1])


def test_overlap_by_hand():
    a = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    b = np.array([[4, 3, 2, 1], [1, 2, 9, 8], [9, 8, 7, 6]])
    assert metrics.overlap(a, b).tolist() == [1, 0.5, 0]


def test_recall_by_hand():
    found = np.array([[5, 3, 1], [5, 3, 1], [5, 3, 1]])
    assert metrics.recall(found, [{1, 2}, [3], []]).tolist() == [0.5, 1, 0]


def test_ndcg_by_hand():
    found = np.array([[7, 8, 9]] * 6)
    qrels = [
        {7: 1},  # found first
        {9: 1},  # found third: 1 / log2(4)
        {8: 2, 7: 1, 5: 3},  # (1 + 2 / log2(3)) / (3 + 2 / log2(3) + 1 / log2(4))
        {4: 1},  # not found
        {7: 0, 8: -1},  # none is relevant
        {7: -1, 8: 1},  # a negative judgement is no gain: 1 / log2(3)
    ]
    third = math.log2(3)
    expected = [1, 0.5, (1 + 2 / third) / (3 + 2 / third + 0.5), 0, 0, 1 / third]
    np.testing.assert_allclose(metrics.ndcg(found, qrels), expected)


def test_ndcg_is_that_of_the_whole_judgement_not_of_what_fits_the_cut():
    # One place, two relevant passages: the ideal has one place as well.
    assert metrics.ndcg(np.array([[1]]), [{1: 1, 2: 1}]).tolist() == [1]


@given(st.dictionaries(st.integers(0, 9), st.integers(0, 3).map(float), min_size=1))
def test_no_order_beats_the_ideal_one(judged: dict[int, float]):
    ideal = sorted(range(10), key=lambda i: -judged.get(i, 0))[:4]
    orders = np.array(list(permutations(range(4), 4)))
    found = np.array(ideal)[orders]
    values = metrics.ndcg(found, [judged] * len(found))
    assert values.max() == pytest.approx(1 if any(judged.values()) else 0)
    assert values.argmax() == 0


@given(st.permutations(range(8)), st.permutations(range(8)))
def test_the_reference_has_the_best_ndcg_of_itself(one: list[int], other: list[int]):
    a, b = np.array([one[:5]]), np.array([other[:5]])
    (same,), (value,) = metrics.ndcg_of_reference(a, a), metrics.ndcg_of_reference(b, a)
    assert same == pytest.approx(1)
    assert 0 <= value <= 1 + 1e-12
    assert (value == pytest.approx(1)) == (one[:5] == other[:5])


def test_a_miss_at_the_top_costs_more_than_one_at_the_end():
    reference = np.array([[0, 1, 2, 3]])
    top, end = np.array([[9, 1, 2, 3]]), np.array([[0, 1, 2, 9]])
    worse, better = (
        metrics.ndcg_of_reference(top, reference),
        metrics.ndcg_of_reference(end, reference),
    )
    assert worse < better < 1


def test_spearman_by_hand():
    a = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 2, 4], [1, 1, 1, 1]], float)
    b = np.array([[10, 20, 30, 99], [4, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4]], float)
    values = metrics.spearman(a, b)
    # Third row: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    np.testing.assert_allclose(values, [1, -1, 4.5 / math.sqrt(4.5 * 5), np.nan])


@given(st.permutations(range(9)), st.permutations(range(9)))
def test_spearman_of_orders_is_the_formula(one: list[int], other: list[int]):
    """Without ties: 1 - 6 sum(d^2) / (n (n^2 - 1))."""
    d = np.array(one) - np.array(other)
    expected = 1 - 6 * (d @ d) / (9 * 80)
    (value,) = metrics.spearman(np.array([one], float), np.array([other], float))
    assert value == pytest.approx(expected)


@given(
    arrays(np.float64, 7, elements=st.floats(-9, 9, width=16)),
    arrays(np.float64, 7, elements=st.floats(-9, 9, width=16)),
)
def test_spearman_knows_order_only(x: np.ndarray, y: np.ndarray):
    (value,) = metrics.spearman(x[None], y[None])
    (of_cubes,) = metrics.spearman((x**3)[None], y[None] * 2 + 5)
    np.testing.assert_allclose(of_cubes, value, atol=1e-12)
