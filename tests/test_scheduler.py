"""Threads of several callers on one backend: shared microbatches, failures, limits, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gguf_embed.engine.backend import BatchLimits, Head, Outcome
from gguf_embed.engine.scheduler import Scheduler, Ticket
from gguf_embed.engine.turns import Caller, Priority
from gguf_embed.errors import BadInput, NativeFailed
from gguf_embed.native.model import Tokens
from gguf_embed.testing import FakeBackend

POISON = 666


class Gated(FakeBackend):
    """Computes a microbatch when `gate` lets it; fails where POISON is in it."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits=limits)
        self.gate = threading.Semaphore(0)
        self.is_open = False
        self.busy = threading.Semaphore(0)  # released when a microbatch waits at the gate

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        self.busy.release()
        if not self.is_open:
            assert self.gate.acquire(timeout=20)
        outcome = super().run(sequences, head=head, n_prefix=n_prefix, n_contexts=n_contexts)
        if any(POISON in ids for ids in sequences):
            raise NativeFailed("poison")
        return outcome

    def open(self) -> None:
        """From now on nothing waits at the gate."""
        self.is_open = True
        self.gate.release(100)  # for those who wait at it now


LIMITS = BatchLimits(max_tokens=100, max_seqs=8)


@pytest.fixture
def gated() -> Gated:
    return Gated(LIMITS)


@pytest.fixture
def scheduler(gated: Gated) -> Iterator[Scheduler]:
    with Scheduler(gated, max_waiting_tokens=400) as scheduler:
        yield scheduler
        gated.open()


def rows(*lengths: int, mark: int = 5) -> list[Tokens]:
    return [np.full(n, mark, np.int32) for n in lengths]


def block(scheduler: Scheduler, gated: Gated) -> Ticket:
    """Occupy the only context, so that what comes next must wait."""
    ticket = scheduler.submit(Caller(), rows(100))
    assert gated.busy.acquire(timeout=20)
    return ticket


def vectors(ticket: Ticket) -> np.ndarray:
    results = [
        (i, v) for done in ticket.results() for i, v in zip(done.rows, done.vectors, strict=True)
    ]
    return np.stack([vector for _, vector in sorted(results, key=lambda result: result[0])])


def test_two_callers_share_a_microbatch(scheduler: Scheduler, gated: Gated):
    first = block(scheduler, gated)
    tickets = [scheduler.submit(Caller(), rows(20, 10, mark=mark)) for mark in (7, 8)]
    gated.open()
    vectors(first)
    for mark, ticket in zip((7, 8), tickets, strict=True):
        expected = gated.run(rows(20, 10, mark=mark)).vectors
        np.testing.assert_array_equal(vectors(ticket), expected)
    assert [len(batch) for batch in gated.microbatches][:2] == [1, 4]


def test_a_query_overtakes_a_bulk_job(scheduler: Scheduler, gated: Gated):
    bulk = scheduler.submit(Caller(priority=Priority.BULK), rows(*[50] * 40))
    assert gated.busy.acquire(timeout=20)
    query = scheduler.submit(Caller(priority=Priority.QUERY), rows(9, mark=7))
    gated.open()
    assert vectors(query).shape == (1, 64)
    vectors(bulk)
    marks = [int(batch[0][0]) for batch in gated.microbatches]
    assert marks.index(7) == 1


def test_the_failure_of_one_is_not_that_of_another(scheduler: Scheduler, gated: Gated):
    first = block(scheduler, gated)
    good = scheduler.submit(Caller(), rows(20))
    bad = scheduler.submit(Caller(), rows(20, mark=POISON))
    gated.open()
    vectors(first)
    assert vectors(good).shape == (1, 64)
    with pytest.raises(NativeFailed, match="poison"):
        vectors(bad)
    # They were computed together, then each alone.
    assert [len(batch) for batch in gated.microbatches] == [1, 2, 1, 1]


def test_cancelled_rows_are_not_computed(scheduler: Scheduler, gated: Gated):
    caller = Caller()
    scheduler.submit(caller, rows(*[50] * 40))
    assert gated.busy.acquire(timeout=20)
    assert scheduler.waiting_tokens == 50 * 38
    scheduler.cancel(caller)
    assert scheduler.waiting_tokens == 0
    gated.open()
    vectors(scheduler.submit(Caller(), rows(9, mark=7)))
    assert [len(batch) for batch in gated.microbatches] == [2, 1]


def test_a_caller_with_much_that_waits_must_wait_and_another_need_not(
    scheduler: Scheduler, gated: Gated
):
    """A job that is larger than the limit is taken: else it could never be."""
    caller = Caller()
    scheduler.submit(caller, rows(*[100] * 6))
    assert gated.busy.acquire(timeout=20)
    with ThreadPoolExecutor(1) as thread:
        more = thread.submit(scheduler.submit, caller, rows(10))
        scheduler.submit(Caller(), rows(10))
        with pytest.raises(TimeoutError):
            more.result(0.05)
        gated.gate.release(3)  # two turns of ours, one of the other: 300 tokens wait
        ticket = more.result(20)
        gated.open()
        assert vectors(ticket).shape == (1, 64)


def test_head_is_chosen_by_the_call(scheduler: Scheduler, gated: Gated):
    gated.open()
    caller = Caller()
    tokens = scheduler.submit(caller, rows(7), Head.TOKENS)
    pooled = scheduler.submit(caller, rows(7))
    assert next(tokens.results()).vectors.shape == (7, 64)
    assert next(pooled.results()).vectors.shape == (1, 64)


def test_closing_refuses_what_waits_and_finishes_what_is_computed(
    scheduler: Scheduler, gated: Gated
):
    first = block(scheduler, gated)
    waiting = scheduler.submit(Caller(), rows(9))
    with ThreadPoolExecutor(1) as thread:
        closing = thread.submit(scheduler.close)
        with pytest.raises(BadInput, match="closed before all texts were done"):
            vectors(waiting)
        assert not closing.done()
        gated.open()
        closing.result(20)
    assert vectors(first).shape == (1, 64)
    with pytest.raises(BadInput, match="closed"):
        vectors(scheduler.submit(Caller(), rows(9)))


def test_all_contexts_work():
    many = Gated(BatchLimits(max_tokens=100, max_seqs=8, n_contexts=3))
    with Scheduler(many) as scheduler:
        ticket = scheduler.submit(Caller(), rows(*[100] * 9))
        for _ in range(3):
            assert many.busy.acquire(timeout=20)
        assert not many.busy.acquire(timeout=0.05)
        many.open()
        assert vectors(ticket).shape == (9, 64)


def test_texts_that_come_one_by_one_are_computed_by_one_thread():
    """OpenMP has a team of threads for each thread that computed with several."""
    used: list[int] = []

    class Recorder(FakeBackend):
        def run(self, sequences: Sequence[Tokens], **options: Any) -> Outcome:
            used.append(threading.get_ident())
            time.sleep(0.001)
            return super().run(sequences, **options)

    limits = BatchLimits(max_tokens=100, max_seqs=8, n_contexts=3)
    with Scheduler(Recorder(limits=limits)) as scheduler:
        vectors(scheduler.submit(Caller(), rows(*[100] * 99)))  # all of them work
        assert len(set(used)) == 3
        used.clear()
        for _ in range(50):
            time.sleep(0.002)  # all of them are idle
            vectors(scheduler.submit(Caller(), rows(9)))
    assert len(used) == 50
    assert len(set(used)) == 1


def test_many_callers_in_many_threads():
    backend = FakeBackend(limits=BatchLimits(max_tokens=64, max_seqs=4, n_contexts=3))
    rng = np.random.default_rng(0)

    def embed(seed: int) -> None:
        caller = Caller(priority=Priority(seed % 3))
        texts = [rng.integers(2, 99, 1 + (seed + i) % 40).astype(np.int32) for i in range(20)]
        for _ in range(5):
            got = vectors(scheduler.submit(caller, texts))
            expected = np.concatenate([backend.run([text]).vectors for text in texts])
            np.testing.assert_array_equal(got, expected)

    with Scheduler(backend) as scheduler, ThreadPoolExecutor(12) as threads:
        for future in [threads.submit(embed, seed) for seed in range(24)]:
            future.result(30)
