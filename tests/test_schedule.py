"""Packing and prefix groups, as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.engine.schedule import LEAST_TOKENS, Cost, pack, shared_prefixes

lengths = st.lists(st.integers(1, 64), max_size=60)


@given(lengths, st.integers(1, 256), st.integers(1, 8), st.integers(1, 5))
def test_every_row_once_and_no_limit_broken(
    rows: list[int], max_tokens: int, max_seqs: int, n_contexts: int
):
    batches = list(pack(rows, max_tokens=max_tokens, max_seqs=max_seqs, n_contexts=n_contexts))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        assert batch.n_tokens == sum(rows[row] for row in batch.rows)
        assert len(batch.rows) <= max_seqs
        assert batch.n_tokens <= max_tokens or len(batch.rows) == 1


@given(lengths, st.integers(64, 256))
def test_longest_first_so_like_lengths_meet(rows: list[int], max_tokens: int):
    batches = list(pack(rows, max_tokens=max_tokens, max_seqs=8))
    order = [rows[row] for batch in batches for row in batch.rows]
    assert order == sorted(order, reverse=True)


@given(st.lists(st.integers(1, 32), min_size=80, max_size=160), st.integers(1, 4))
def test_contexts_end_together(rows: list[int], n_contexts: int):
    """As many microbatches for each, none much larger than its even share."""
    batches = list(pack(rows, max_tokens=256, max_seqs=256, n_contexts=n_contexts))
    share = sum(rows) / len(batches)
    assert all(batch.n_tokens <= share + 64 for batch in batches)
    fewest = -(-sum(rows) // 256)
    even = -(-fewest // n_contexts) * n_contexts
    if sum(rows) >= even * LEAST_TOKENS and share < 256 - 64:
        assert len(batches) == even


def test_little_work_is_not_cut_small():
    """Four contexts, and not enough for two of them."""
    batches = list(pack([50, 50, 50, 50], max_tokens=512, max_seqs=8, n_contexts=4))
    assert [batch.n_tokens for batch in batches] == [200]


def test_a_long_row_is_alone():
    batches = list(pack([10, 900, 10], max_tokens=512, max_seqs=8))
    assert [batch.rows for batch in batches] == [(1,), (0, 2)]


token_rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=24)


@given(token_rows, st.integers(0, 20))
def test_groups_share_what_they_say_and_pay(rows: list[list[int]], group_cost: int):
    groups = shared_prefixes(rows, group_cost=group_cost)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(rows)))
    for group in groups:
        if group.n_prefix:
            assert len({tuple(rows[row][: group.n_prefix]) for row in group.rows}) == 1
            assert all(len(rows[row]) > group.n_prefix for row in group.rows)
            assert (len(group.rows) - 1) * group.n_prefix > group_cost


@given(token_rows, st.integers(0, 6))
def test_no_single_group_saves_more(rows: list[list[int]], group_cost: int):
    groups = shared_prefixes(rows, group_cost=group_cost)
    saved = sum((len(g.rows) - 1) * g.n_prefix - group_cost for g in groups if g.n_prefix)
    for prefix in {tuple(row[:n]) for row in rows for n in range(1, len(row))}:
        members = sum(
            len(row) > len(prefix) and tuple(row[: len(prefix)]) == prefix for row in rows
        )
        assert saved >= (members - 1) * len(prefix) - group_cost


def test_titles_with_chunks_and_one_instruction():
    instruction = list(range(100, 118))
    queries = [[*instruction, 1000 + i, 7] for i in range(40)]
    chunks = [[*range(300, 330), 2000 + i, 7] for i in range(20)]
    groups = shared_prefixes([*queries, *chunks, [5, 6]], group_cost=64)
    assert sorted((len(g.rows), g.n_prefix) for g in groups) == [(1, 0), (20, 30), (40, 18)]


def test_rows_may_be_arrays():
    rows = [np.array([1, 2, 3, i], np.int32) for i in range(4)]
    assert shared_prefixes(rows, group_cost=0)[0].n_prefix == 3


def test_cost_has_its_least_per_token_where_it_says():
    cost = Cost(fixed_s=0.04, token_s=1e-3, pair_s=1e-6)
    best = cost.best_tokens(4096)
    assert best == 200
    per_token = {n: cost.seconds(n) / n for n in (best // 2, best, best * 2)}
    assert min(per_token, key=per_token.__getitem__) == best
    assert cost.best_tokens(128) == 128


@pytest.mark.parametrize("pair_s", [0.0, -1.0])
def test_without_a_square_term_the_largest_microbatch_is_best(pair_s: float):
    assert Cost(fixed_s=0.1, token_s=1e-3, pair_s=pair_s).best_tokens(512) == 512
