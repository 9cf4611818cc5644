"""Which way to run a model is the fastest here: found out by a long run, inside its own work.

A run that lasts computes slices of its microbatches in one way and in another, in turn, and goes on
in the fastest. Every vector counts. What was learned is kept for the next opening, with the load
of the machine meanwhile.

Only what leaves the vectors as they are is tried: how many tokens go into a microbatch, and how
many contexts' threads compute one together. `tune` searches further.

Pure but for the load of the machine: times come in as numbers, and the scheduler holds its lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from gguf_embed.engine.tune_record import Target, Tuned, keep_record, read_record
from gguf_embed.machine.load import BusyMeter, Load
from gguf_embed.plan.settings import RunSettings, Settings

_log = logging.getLogger(__name__)

BATCH_TOKENS: Final = (128, 256, 512)
BEFORE_S: Final = 2.0  # of work that is done before anything is tried: most runs are shorter
SLICE_S: Final = 0.3  # in one way, then in the next
ROUNDS: Final = 3
GAIN: Final = 1.03  # a way must be this much faster: less is noise
MAX_WAITED_S: Final = 0.01  # in a slice; to ask whether to wait takes less
MAX_VOID: Final = 20  # slices in which work ran out, before it is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How microbatches are computed."""

    batch_tokens: int  # packed into one
    n_together: int  # contexts whose threads compute one

    def of(self, run: RunSettings) -> RunSettings:
        """The same as settings of a run that was planned otherwise."""
        return replace(
            run,
            batch_tokens=self.batch_tokens,
            n_contexts=run.n_contexts // self.n_together,
            n_threads=run.n_threads * self.n_together,
        )


class Contest:
    """Ways that are timed in turn, the first of which is the one to beat."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = list(ways)
        self.first = ways[0]
        self._rates: dict[Way, list[float]] = {way: [] for way in ways}

    @property
    def turn(self) -> Way | None:
        """Whose slice is next, each round in the order opposite to the last one; None: all done."""
        n_round = min(map(len, self._rates.values()))
        if n_round == ROUNDS:
            return None
        waiting = [way for way in self._ways if len(self._rates[way]) == n_round]
        return waiting[-1 if n_round % 2 else 0]

    def add(self, way: Way, rate: float) -> None:
        """One slice of a way, in tokens/s."""
        self._rates[way].append(rate)

    def n_slices(self, way: Way) -> int:
        """So far."""
        return len(self._rates[way])

    def rate(self, way: Way) -> float:
        """Of its slices, the one in the middle."""
        return float(np.median(self._rates[way]))

    @property
    def winner(self) -> Way:
        """The first, unless another was faster beside it by GAIN, in most rounds."""
        beside = {
            way: np.median([a / b for a, b in zip(rates, self._rates[self.first], strict=True)])
            for way, rates in self._rates.items()
        }
        best = max(beside, key=beside.__getitem__)
        return best if beside[best] >= GAIN else self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What a run has found out."""

    way: Way
    tokens_per_s: float
    untuned_tokens_per_s: float  # in the way that it began with
    seconds: float  # of work in slices
    load: Load | None


class Learning:
    """What the scheduler asks before each microbatch, and tells after it."""

    def __init__(
        self,
        start: Way,
        *,
        sizes: Iterable[int],
        together: Iterable[int],
        same_bits: bool,
        on_learned: Callable[[Learned], None],
        meter: BusyMeter | None = None,
    ) -> None:
        """`same_bits`: a text has the same bits in any company; `on_learned` keeps the winner."""
        self.way = start
        self.same_bits = same_bits
        self._start = start
        self._sizes = [size for size in sizes if size != start.batch_tokens]
        self._together = [n for n in together if n != start.n_together]
        self._on_learned = on_learned
        self._meter = meter
        self._contest: Contest | None = None
        self._n_contests = 0
        self._worked_s = 0.0
        self._worked_tokens = 0
        self._seconds = 0.0  # of all slices
        self._first_rate = self._rate = 0.0  # of the way that it began with, and of the best one
        self._n_void = 0
        self._began_at: float | None = None  # of the slice, if one runs
        self._ended_at = 0.0  # of the last microbatch
        self._slice_tokens = 0
        self._n_running = 0
        self.done = not (self._sizes or self._together)

    def may_begin(self, now: float, waiting_tokens: int) -> bool:
        """Whether a microbatch may begin, in the `way` of now; so many tokens wait.

        Before a way is timed, and at the end of that, what runs is waited for.
        """
        if self._began_at is not None and now - self._began_at >= SLICE_S:
            if self._n_running:
                return False
            self._end_slice()
        if self._contest is None and not self.done and self._worked_s >= BEFORE_S:
            lasts_s = waiting_tokens * self._worked_s / max(1, self._worked_tokens)
            if lasts_s > SLICE_S:
                self._next_contest()
        if self._contest is not None and self._began_at is None:
            if self._n_running:
                return False
            self._began_at, self._slice_tokens = now, 0
        return True

    def begins(self) -> None:
        """A microbatch begins."""
        self._n_running += 1

    def ends(self, now: float, n_tokens: int, seconds: float, waited_s: float = 0.0) -> None:
        """It has ended, after so many seconds; before, work in the background may have waited."""
        self._n_running -= 1
        self._slice_tokens += n_tokens
        self._ended_at = now
        if self._contest is None:
            self._worked_s += seconds
            self._worked_tokens += n_tokens
        if waited_s > MAX_WAITED_S:
            self._began_at = None  # a pause says nothing of a way: the slice is done again

    def runs_dry(self) -> None:
        """Nothing waits: what runs now tells nothing of a way."""
        if self._began_at is not None:
            self._began_at = None
            self._n_void += 1
            if self._n_void > MAX_VOID:  # too little work at a time to learn from
                self._contest, self.done, self.way = None, True, self._start

    def _end_slice(self) -> None:
        assert self._contest is not None, "slices belong to one"
        assert self._began_at is not None, "it has begun"
        lasted_s = self._ended_at - self._began_at
        self._began_at = None
        self._seconds += lasted_s
        self._contest.add(self.way, self._slice_tokens / lasted_s)
        turn = self._contest.turn
        if turn is not None:
            self.way = turn
            return
        self.way = self._contest.winner
        self._rate = self._contest.rate(self.way)
        self._first_rate = self._first_rate or self._contest.rate(self._contest.first)
        self._next_contest()

    def _next_contest(self) -> None:
        """First the size of a microbatch, then how many contexts compute one; then it is over."""
        now, ways = self.way, [self.way]
        while len(ways) == 1:
            self._n_contests += 1
            if self._n_contests == 1:
                if self._meter is not None:
                    self._meter.start()
                ways += [replace(now, batch_tokens=size) for size in self._sizes]
            elif self._n_contests == 2:
                ways += [replace(now, n_together=n) for n in self._together]
            else:
                self._learned()
                return
        self._contest = Contest(ways)

    def _learned(self) -> None:
        self._contest, self.done = None, True
        self._on_learned(
            Learned(
                way=self.way,
                tokens_per_s=self._rate,
                untuned_tokens_per_s=self._first_rate,
                seconds=self._seconds,
                load=self._meter.end() if self._meter is not None else None,
            )
        )


def learning_for(target: Target, run: RunSettings, settings: Settings) -> Learning | None:
    """What a run of these settings may try; None where there is nothing to learn.

    Not where the user decides, or something was measured before. On a GPU the size of a microbatch
    is that of its buffers. A text that is decoded alone leaves nothing to pack.
    """
    if not settings.tune or settings.decide_speed or target.tier != "cpu":
        return None
    if (settings.exact and not run.accelerator) or read_record(target) is not None:
        return None
    start = Way(batch_tokens=run.batch_tokens, n_together=1)

    def keep(learned: Learned) -> None:
        best = learned.way.of(run)
        _log.info("%s: %s is the fastest of what was tried", target.path.name, learned.way)
        tuned = Tuned(
            settings=best,
            tokens_per_s=learned.tokens_per_s,
            untuned_tokens_per_s=learned.untuned_tokens_per_s,
            seconds=learned.seconds,
            trials=(),
            cost=None,
            load=learned.load,
            by="run",
        )
        keep_record(tuned, target)

    return Learning(
        start,
        sizes=[size for size in BATCH_TOKENS if size <= run.max_batch_tokens],
        together=[n for n in range(1, run.n_contexts + 1) if run.n_contexts % n == 0],
        same_bits=run.accelerator,
        on_learned=keep,
        meter=BusyMeter(target.n_cores),
    )
