"""Whose rows are next, as properties: every row once, no limit broken, no one starves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.engine.backend import BatchLimits, Head
from gguf_embed.engine.schedule import body_tokens, pack_rows
from gguf_embed.engine.turns import PATIENCE, Caller, Done, Job, Priority, Turns, Work, split
from gguf_embed.native.model import Tokens

PREFIX = np.arange(100, 130, dtype=np.int32)


def row(n_tokens: int, mark: int, *, n_prefix: int = 0) -> Tokens:
    """So many tokens of its own behind some of PREFIX."""
    return np.concatenate([PREFIX[:n_prefix], np.full(n_tokens, mark, np.int32)])


def one_context(n_tokens: int, head: Head) -> int:
    return 1


def nowhere(result: Done | BaseException) -> None:
    pass


def job(caller: Caller, tokens: list[Tokens], limits: BatchLimits, head: Head = Head.POOLED) -> Job:
    planned = deque(pack_rows(tokens, limits, head))
    return Job(caller=caller, tokens=tokens, planned=planned, deliver=nowhere, head=head)


def drain(turns: Turns, n_free: int = 1) -> Iterator[Work]:
    while (work := turns.next(n_free)) is not None:
        yield work


limits_st = st.builds(
    BatchLimits,
    max_tokens=st.integers(16, 128),
    max_seqs=st.integers(1, 8),
    max_prefix=st.sampled_from([0, 64]),
    n_contexts=st.integers(1, 3),
)
row_st = st.tuples(st.integers(1, 60), st.sampled_from([0, 10, 30]))
job_st = st.tuples(
    st.integers(0, 3),  # caller
    st.lists(row_st, max_size=12),
    st.sampled_from([Head.POOLED, Head.POOLED, Head.TOKENS]),
)
# What happens, one after the other: a job comes, a microbatch is computed, a caller gives up.
event_st = st.one_of(job_st, st.just("compute"), st.just("compute"), st.integers(0, 3))
priorities_st = st.lists(st.sampled_from(Priority), min_size=4, max_size=4)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(limits_st, priorities_st, st.lists(event_st, min_size=12, max_size=40))
def test_every_row_once_within_the_limits_and_none_after_a_cancel(
    limits: BatchLimits, priorities: list[Priority], events: list[object]
):
    turns = Turns(limits, one_context)
    callers = [Caller(priority=priority) for priority in priorities]
    expected: set[tuple[Job, int]] = set()  # that still wait
    done: set[tuple[Job, int]] = set()

    def check(work: Work) -> None:
        for part in work.parts:
            assert len(set(part.rows)) == len(part.rows)
            for index in part.rows:
                assert (part.job, index) in expected  # waits: not done before, not cancelled
                expected.remove((part.job, index))
                done.add((part.job, index))
        sequences = work.sequences
        assert {part.job.head for part in work.parts} == {work.head}
        assert len({part.job.caller.priority for part in work.parts}) == 1
        n_tokens = sum(map(len, sequences)) - work.n_prefix * len(sequences)
        assert len(sequences) <= limits.max_seqs
        assert n_tokens <= body_tokens(limits, work.n_prefix) or len(sequences) == 1
        assert work.n_prefix <= limits.max_prefix
        assert len({ids[: work.n_prefix].tobytes() for ids in sequences}) == 1
        assert all(len(ids) > work.n_prefix for ids in sequences)
        if work.head is Head.TOKENS:
            assert len(sequences) == 1

    mark = 0
    for event in events:
        match event:
            case "compute":
                if (work := turns.next(1)) is not None:
                    check(work)
            case int():
                turns.cancel(callers[event])
                expected = {(j, i) for j, i in expected if j.caller is not callers[event]}
            case (int(who), list(rows), Head() as head):
                mark += 1
                tokens = [row(n, mark, n_prefix=n_prefix) for n, n_prefix in rows]
                new = job(callers[who], tokens, limits, head)
                turns.add(new)
                expected |= {(new, i) for i in range(len(tokens))}
            case _:
                raise AssertionError(event)
        assert turns.waiting_tokens == sum(len(j.tokens[i]) for j, i in expected)
        assert bool(turns) is bool(expected)
    for work in drain(turns):
        check(work)
    assert not expected
    assert not turns


@given(limits_st, st.lists(row_st, max_size=40))
def test_a_caller_alone_gets_what_was_packed(limits: BatchLimits, rows: list[tuple[int, int]]):
    tokens = [row(n, 1, n_prefix=n_prefix) for n, n_prefix in rows]
    turns = Turns(limits, one_context)
    caller = Caller()
    # A window behind a window, as `stream` submits them, changes nothing either.
    turns.add(job(caller, tokens, limits))
    turns.add(job(caller, tokens, limits))
    works = list(drain(turns))
    assert all(len(work.parts) == 1 for work in works)
    packed = [(batch.rows, batch.n_prefix) for batch in pack_rows(tokens, limits)]
    assert [(work.parts[0].rows, work.n_prefix) for work in works] == packed * 2


def done_with_equal_shares(jobs: list[tuple[int, int]]) -> list[int]:
    """For jobs (when it comes, tokens), when each is done if every token goes to all in turn."""
    left = [float(n_tokens) for _, n_tokens in jobs]
    done = [0] * len(jobs)
    now = 0
    while any(left):
        here = [i for i, (comes, _) in enumerate(jobs) if comes <= now and left[i]]
        now += 1
        given_away = 1.0  # what one does not need goes to the others
        while here and given_away > 1e-9:
            least = min(given_away / len(here), *(left[i] for i in here))
            for i in here:
                left[i] = left[i] - least if left[i] - least > 1e-9 else 0.0
                done[i] = now
            given_away -= least * len(here)
            here = [i for i in here if left[i]]
    return done


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=12
    )
)
def test_no_caller_is_done_later_than_with_equal_shares(events: list[tuple[int, int, int]]):
    """But for the microbatch that is computed when it comes."""
    limits = BatchLimits(max_tokens=64, max_seqs=64)
    turns = Turns(limits, one_context)
    now = 0
    jobs: list[tuple[int, int]] = []
    done: dict[Job, int] = {}
    order: list[Job] = []

    def compute() -> None:
        nonlocal now
        if (work := turns.next(1)) is not None:
            now += work.n_computed
            done.update({part.job: now for part in work.parts})

    for n_before, n_rows, n_tokens in events:
        for _ in range(n_before):
            compute()
        order.append(job(Caller(), [row(n_tokens, 1)] * n_rows, limits))
        turns.add(order[-1])
        jobs.append((now, n_rows * n_tokens))
    while turns:
        compute()
    for ours, equal in zip(order, done_with_equal_shares(jobs), strict=True):
        assert done[ours] <= equal + limits.max_tokens


def test_equal_callers_are_done_one_after_the_other():
    limits = BatchLimits(max_tokens=64, max_seqs=64)
    turns = Turns(limits, one_context)
    callers = [Caller() for _ in range(5)]
    for caller in callers:
        turns.add(job(caller, [row(60, 1)] * 3, limits))
    order = [work.parts[0].job.caller for work in drain(turns)]
    assert order == [caller for caller in callers for _ in range(3)]


def test_few_texts_overtake_many():
    limits = BatchLimits(max_tokens=64, max_seqs=64)
    turns = Turns(limits, one_context)
    for _ in range(40):
        turns.add(job(Caller(), [row(60, 1)] * 32, limits))
    for _ in range(50):
        turns.next(1)
    ours = Caller()
    turns.add(job(ours, [row(60, 2)], limits))
    work = turns.next(1)
    assert work is not None
    assert work.parts[0].job.caller is ours


def test_streams_have_equal_shares_whatever_the_size_of_their_jobs():
    limits = BatchLimits(max_tokens=64, max_seqs=64)
    turns = Turns(limits, one_context)
    n_rows = {Caller(): 1, Caller(): 8, Caller(): 30}
    got = dict.fromkeys(n_rows, 0)
    for _ in range(900):
        for caller, n in n_rows.items():
            while len(caller.jobs) < 2:
                turns.add(job(caller, [row(60, 1)] * n, limits))
        work = turns.next(1)
        assert work is not None
        got[work.parts[0].job.caller] += 1
    assert max(got.values()) - min(got.values()) <= 2 * max(n_rows.values())


def test_a_caller_that_gave_up_delays_no_one():
    limits = BatchLimits(max_tokens=64, max_seqs=64)
    turns = Turns(limits, one_context)
    gone, long, short = Caller(), Caller(), Caller()
    turns.add(job(gone, [row(60, 1)] * 9, limits))
    turns.cancel(gone)
    turns.add(job(long, [row(60, 1)] * 4, limits))
    for _ in range(2):
        turns.next(1)
    # Half of it is done, since no one shared; the rest is less than these.
    turns.add(job(short, [row(59, 1)] * 3, limits))
    order = [work.parts[0].job.caller for work in drain(turns)]
    assert order == [long] * 2 + [short] * 3


@given(st.lists(st.sampled_from([Priority.QUERY, Priority.NORMAL]), min_size=1, max_size=60))
def test_a_lower_priority_is_not_passed_for_ever(others: list[Priority]):
    """Each time a microbatch is free, more of a higher priority has come."""
    limits = BatchLimits(max_tokens=64, max_seqs=1)
    turns = Turns(limits, one_context)
    bulk = Caller(priority=Priority.BULK)
    turns.add(job(bulk, [row(64, 1)] * 100, limits))
    since = 0
    for priority in others:
        turns.add(job(Caller(priority=priority), [row(64, 2)] * 2, limits))
        work = turns.next(1)
        assert work is not None
        since = 0 if work.parts[0].job.caller is bulk else since + 1
        assert since <= PATIENCE + len(Priority) - 2


@given(st.integers(1, 40), st.integers(0, PATIENCE - 1), st.sampled_from(Priority))
def test_a_query_overtakes_at_the_next_microbatch(n_bulk: int, n_before: int, lower: Priority):
    limits = BatchLimits(max_tokens=64, max_seqs=4)
    turns = Turns(limits, one_context)
    for _ in range(n_bulk):
        turns.add(job(Caller(priority=lower), [row(60, 1)] * 20, limits))
    for _ in range(3):
        turns.next(1)
    if lower is Priority.QUERY:
        return
    for _ in range(n_before):  # queries that came before it do not keep it waiting
        turns.add(job(Caller(priority=Priority.QUERY), [row(5, 2)], limits))
        turns.next(1)
    query = Caller(priority=Priority.QUERY)
    turns.add(job(query, [row(5, 3)], limits))
    work = turns.next(1)
    assert work is not None
    # And on its own: rows of the bulk job would make it wait for them.
    assert [part.job.caller for part in work.parts] == [query]


def test_callers_share_a_microbatch_and_a_prefix():
    limits = BatchLimits(max_tokens=128, max_seqs=8, max_prefix=64)
    turns = Turns(limits, one_context)
    for mark in range(4):
        turns.add(job(Caller(), [row(2, mark, n_prefix=30)], limits))
    (work,) = drain(turns)
    assert (len(work.parts), work.n_prefix) == (4, 30)


def test_a_text_that_is_the_prefix_and_no_more_is_not_computed_behind_it():
    limits = BatchLimits(max_tokens=128, max_seqs=8, max_prefix=64)
    turns = Turns(limits, one_context)
    turns.add(job(Caller(), [row(n, 1, n_prefix=30) for n in (1, 2, 3)], limits))
    turns.add(job(Caller(), [PREFIX] * 4, limits))
    assert [(len(work.parts), work.n_prefix) for work in drain(turns)] == [(1, 30), (1, 29)]


def test_what_another_took_a_part_of_is_filled_up_again():
    """A query's neighbours leave no small microbatches behind them."""
    limits = BatchLimits(max_tokens=64, max_seqs=8)
    turns = Turns(limits, one_context)
    bulk = Caller()
    turns.add(job(Caller(), [row(30, 1)], limits))
    turns.add(job(bulk, [row(16, 2)] * 20, limits))
    works = list(drain(turns))
    assert [[len(part.rows) for part in work.parts] for work in works] == [[1, 2]] + [[4]] * 4 + [
        [2]
    ]


def test_a_long_text_waits_until_all_contexts_are_free_and_a_query_does_not():
    limits = BatchLimits(max_tokens=64, max_seqs=8, n_contexts=3)
    turns = Turns(limits, lambda n_tokens, head: 3 if n_tokens > 64 else 1)
    turns.add(job(Caller(), [row(100, 1)], limits))
    turns.add(job(Caller(), [row(60, 2)] * 2, limits))
    assert turns.next(2) is None  # nor may those that come later keep it waiting
    turns.add(job(Caller(priority=Priority.QUERY), [row(9, 3)], limits))
    for n_free, mark, n_contexts in ((2, 3, 1), (3, 1, 3), (1, 2, 1), (1, 2, 1)):
        work = turns.next(n_free)
        assert work is not None
        assert (work.sequences[0][0], work.n_contexts) == (mark, n_contexts)


def test_threads_of_idle_contexts_are_lent():
    limits = BatchLimits(max_tokens=64, max_seqs=8, n_contexts=4)
    turns = Turns(limits, one_context)
    alone = job(Caller(), [row(60, 1)] * 2, limits)
    alone.n_contexts = 2
    turns.add(alone)
    first, second = turns.next(4), turns.next(1)
    assert first is not None
    assert second is not None
    assert (first.n_contexts, second.n_contexts) == (2, 1)
    alone = job(Caller(), [row(60, 1)] * 2, limits)
    alone.n_contexts = 2
    turns.add(alone)
    turns.add(job(Caller(), [row(60, 1)], limits))
    first = turns.next(4)
    assert first is not None
    assert first.n_contexts == 1  # another caller wants one


def test_results_go_back_to_their_jobs():
    limits = BatchLimits(max_tokens=64, max_seqs=8)
    turns = Turns(limits, one_context)
    jobs = [job(Caller(), [row(n, n), row(n + 1, n)], limits) for n in (3, 5)]
    for each in jobs:
        turns.add(each)
    (work,) = drain(turns)
    vectors = np.array([[len(ids)] for ids in work.sequences], np.float32)
    results = dict(split(work, vectors, bad=[1, 2]))
    for each in jobs:
        done = results[each]
        assert [len(each.tokens[i]) for i in done.rows] == done.vectors[:, 0].tolist()
        assert done.n_tokens == sum(map(len, each.tokens))
    assert [results[each].bad for each in jobs] == [(0,), (1,)]
