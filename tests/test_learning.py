"""A long run tries ways to compute within its own work, and goes on in the fastest."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from gguf_embed.engine import learning, scheduler, tune_record
from gguf_embed.engine.backend import BatchLimits, Head, Outcome
from gguf_embed.engine.learning import GAIN, ROUNDS, Contest, Learned, Learning, Way, learning_for
from gguf_embed.engine.scheduler import Scheduler
from gguf_embed.engine.tune_record import Target, read_record
from gguf_embed.engine.turns import Caller, Done, Job, Turns
from gguf_embed.gguf.header import Header
from gguf_embed.machine.selftest import SafePaths
from gguf_embed.native.model import Tokens
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.testing import FakeBackend
from gguf_embed.vectors import Pooling

LIMITS = BatchLimits(max_tokens=256, max_seqs=64, n_contexts=2)
START = Way(batch_tokens=256, n_together=1)


# ------------------------------------------------------------------------------------ Contest


def contest(rate: Callable[[Way, int], float], *ways: Way) -> Contest:
    made = Contest(ways)
    while (way := made.turn) is not None:
        made.add(way, rate(way, made.n_slices(way)))
    return made


LARGE, SMALL = replace(START, batch_tokens=512), replace(START, batch_tokens=128)


def test_the_fastest_way_wins_though_the_machine_slows_down():
    speeds = {START: 100.0, LARGE: 140.0, SMALL: 90.0}
    made = contest(lambda way, n: speeds[way] / (1 + n), START, LARGE, SMALL)
    assert made.winner == LARGE


def test_noise_is_no_reason_to_change():
    made = contest(lambda way, _: 100.0 * (GAIN - 0.01 if way == LARGE else 1), START, LARGE)
    assert made.winner == START


def test_ways_take_turns_forwards_and_backwards():
    made, order = Contest([START, LARGE, SMALL]), list[Way]()
    while (way := made.turn) is not None:
        order.append(way)
        made.add(way, 1.0)
    assert order == [START, LARGE, SMALL, SMALL, LARGE, START, START, LARGE, SMALL]
    assert len(order) == 3 * ROUNDS


# ------------------------------------------------------------------------------------ Learning


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass(eq=False)
class Learner:
    learned: list[Learned] = field(default_factory=list[Learned])

    def learning(self, *, same_bits: bool = True) -> Learning:
        return Learning(
            START,
            sizes=(128, 256, 512),
            together=(1, 2),
            same_bits=same_bits,
            on_learned=self.learned.append,
        )


class Timed(FakeBackend):
    """Each microbatch takes as long as `seconds` says, on a clock of its own."""

    def __init__(self, clock: Clock, seconds: Callable[[int, int], float]) -> None:
        super().__init__(limits=replace(LIMITS, n_contexts=1))
        self.clock = clock
        self.seconds = seconds
        self.sizes: list[int] = []

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        n_tokens = sum(map(len, sequences))
        self.sizes.append(n_tokens)
        self.clock.now += self.seconds(n_tokens, n_contexts)
        return super().run(sequences, head=head, n_prefix=n_prefix, n_contexts=n_contexts)


def texts(n: int, n_tokens: int = 16) -> list[Tokens]:
    return [np.full(n_tokens, 5 + i % 50, np.int32) for i in range(n)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(scheduler, "time", made)
    return made


def test_a_long_run_learns_and_loses_no_vector(clock: Clock):
    learner = Learner()
    backend = Timed(clock, lambda n_tokens, _: 0.02 + n_tokens * 1e-4)  # large ones pay
    with Scheduler(backend, learning=learner.learning()) as running:
        rows = texts(8000)
        done = [*running.submit(Caller(), rows).results()]
        assert sorted(row for each in done for row in each.rows) == [*range(len(rows))]
        for each in done:
            alone = FakeBackend().run([rows[row] for row in each.rows]).vectors
            np.testing.assert_array_equal(each.vectors, alone)
        (learned,) = learner.learned
        assert learned.way == LARGE  # of one context, more cannot work together
        assert learned.tokens_per_s > learned.untuned_tokens_per_s > 0
        assert {128, 256, 512} <= {*backend.sizes}
        backend.sizes.clear()
        [*running.submit(Caller(), texts(320)).results()]
        assert {*backend.sizes} == {512}


def computed(running: Scheduler, n_texts: int) -> int:
    """How many of so many texts are delivered; those that are forgotten end in queue.Empty."""
    arrived: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()
    running.submit_to(arrived.put, Caller(), texts(n_texts), repeatable=False)
    n_done = 0
    while n_done < n_texts:
        done = arrived.get(timeout=20)
        if isinstance(done, BaseException):
            raise done
        n_done += len(done.rows)
    return n_done


def test_a_pause_between_calls_teaches_nothing_and_loses_no_vector(clock: Clock):
    """A slice that began while nothing waited had no tokens, and no time to divide them by."""
    learner = Learner()
    backend = Timed(clock, lambda n_tokens, _: 0.02 + n_tokens * 1e-4)
    with Scheduler(backend, learning=learner.learning()) as running:
        for _ in range(40):
            assert computed(running, 600) == 600
            clock.now += 1.0
    assert all(learned.tokens_per_s > 0 for learned in learner.learned)


@pytest.mark.parametrize("method", ["may_begin", "ends"])
def test_a_fault_of_ours_reaches_those_who_wait(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, method: str
):
    def fails(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Learning, method, fails)
    backend = Timed(clock, lambda *_: 0.01)
    with (
        Scheduler(backend, learning=Learner().learning()) as running,
        pytest.raises(ZeroDivisionError, match="a fault of ours"),
    ):
        computed(running, 640)


def test_a_pause_in_the_background_is_no_part_of_a_slice(clock: Clock):
    """Else a way that was computed during a pause would be the slowest."""
    learner, n_begun = Learner(), 0
    backend = Timed(clock, lambda n_tokens, _: 0.02 + n_tokens * 1e-4)

    def wait() -> None:
        nonlocal n_begun
        n_begun += 1
        clock.now += 30.0 if n_begun % 25 == 0 else 0.0

    with Scheduler(backend, learning=learner.learning()) as running:
        running.before_each = wait
        [*running.submit(Caller(), texts(8000)).results()]
    (learned,) = learner.learned
    assert learned.way == LARGE
    assert learned.tokens_per_s == pytest.approx(512 / (0.02 + 0.0512), rel=0.05)
    assert learned.untuned_tokens_per_s == pytest.approx(256 / (0.02 + 0.0256), rel=0.05)


def test_a_short_run_tries_nothing(clock: Clock):
    learner = Learner()
    backend = Timed(clock, lambda n_tokens, _: 0.02)
    with Scheduler(backend, learning=learner.learning()) as running:
        [*running.submit(Caller(), texts(640)).results()]
    assert {*backend.sizes} == {256}
    assert learner.learned == []


def test_what_must_be_repeatable_is_packed_as_ever(clock: Clock):
    """Without the accelerator a text's last bits depend on its company."""
    learner = Learner()
    backend = Timed(clock, lambda n_tokens, _: 0.02 + n_tokens * 1e-4)
    with Scheduler(backend, learning=learner.learning(same_bits=False)) as running:
        [*running.submit(Caller(), texts(8000)).results()]
        assert learner.learned
        backend.sizes.clear()
        arrived: list[object] = []
        ticket = scheduler.Ticket(320)
        running.submit_to(ticket.deliver, Caller(), texts(320))
        arrived += ticket.results()
        assert {*backend.sizes} == {256}


def test_work_that_runs_dry_teaches_nothing():
    learner = Learner()
    made = learner.learning()
    now = 0.0
    for _ in range(10):  # before anything is tried
        assert made.may_begin(now, 10_000)
        made.begins()
        now += 0.3
        made.ends(now, 1000, 0.3)
    for _ in range(learning.MAX_VOID + 1):
        assert made.may_begin(now, 10_000)
        made.begins()
        made.runs_dry()
        now += 0.1
        made.ends(now, 10, 0.1)
    assert made.done
    assert made.way == START
    assert learner.learned == []


def test_contexts_that_compute_together_are_tried_with_all_of_them():
    """What runs is waited for before each slice, and at its end."""
    learner = Learner()
    made = learner.learning()
    made.begins()
    made.ends(5.0, 10_000, 5.0)
    made.begins()  # still in the usual way
    assert not made.may_begin(5.0, 10_000)
    made.ends(5.1, 256, 0.1)
    assert made.may_begin(5.1, 10_000)
    made.begins()
    made.begins()
    made.ends(5.5, 256, 0.4)
    assert not made.may_begin(5.5, 10_000)  # it was long enough, and one of it still runs
    made.ends(5.6, 256, 0.5)
    assert made.may_begin(5.6, 10_000)
    assert made.way != START


# ------------------------------------------------------------------------------------ packing


def test_rows_packed_for_another_size_are_cut_and_joined():
    rows = texts(64)
    for packed, now in ((512, 128), (128, 512)):
        turns = Turns(replace(LIMITS, max_tokens=now), lambda *_: 1)
        planned = scheduler.pack_rows(rows, replace(LIMITS, max_tokens=packed))
        caller = Caller()
        job = Job(
            caller=caller,
            tokens=rows,
            planned=scheduler.deque(planned),
            deliver=lambda _: None,
            packed_tokens=packed,
        )
        turns.add(job)
        works = []
        while (work := turns.next(2)) is not None:
            works.append(work)
        sizes = [sum(map(len, work.sequences)) for work in works]
        assert sum(sizes) == 64 * 16
        assert max(sizes) == now
        assert len(sizes) == 64 * 16 // now
        assert caller.waiting_tokens == 0


# ---------------------------------------------------------------------------------- learning_for


RUN = RunSettings(n_contexts=2, max_batch_tokens=512, batch_tokens=256, accelerator=True)


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))
    monkeypatch.setattr(tune_record.library, "build_id", lambda: "a build")
    header = Header(
        source="x",
        version=3,
        metadata={"general.architecture": "bert"},
        tensors=(),
        header_bytes=0,
        file_bytes=1,
    )
    return Target(
        path=Path("x.gguf"),
        header=header,
        mode=EmbedMode(pooling=Pooling.MEAN, causal=False, encoder=True),
        safe=SafePaths(flash=True, repack=True, remark=None),
        n_cores=2,
        start=RUN,
    )


def test_what_was_learned_is_kept_and_not_learned_again(target: Target):
    made = learning_for(target, RUN, Settings())
    assert made is not None
    now = 0.0
    while not made.done:
        assert made.may_begin(now, 1 << 20)
        made.begins()
        seconds = (0.02 + made.way.batch_tokens * 1e-4) / made.way.n_together
        now += seconds
        made.ends(now, made.way.batch_tokens, seconds)
    kept = read_record(target)
    assert kept is not None
    assert (kept.by, kept.settings.batch_tokens) == ("run", 512)
    assert (kept.settings.n_contexts, kept.settings.n_threads) == (1, 2)
    assert learning_for(target, RUN, Settings()) is None


@pytest.mark.parametrize(
    ("run", "settings", "tier"),
    [
        (RUN, Settings(tune=False), "cpu"),
        (RUN, Settings(n_contexts=1), "cpu"),
        (RUN, Settings(), "gpu"),
        (replace(RUN, accelerator=False), Settings(exact=True), "cpu"),
    ],
)
def test_nothing_is_tried_where_nothing_is_to_be_chosen(
    run: RunSettings, settings: Settings, tier: str, target: Target
):
    assert learning_for(replace(target, tier=tier), run, settings) is None
