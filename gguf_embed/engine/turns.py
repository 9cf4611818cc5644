"""Whose rows are computed next. Pure: no model, no clock, no thread.

- A higher priority goes first: a query overtakes a bulk job at the next microbatch.
- A lower priority that waits is passed over `PATIENCE` times; then a microbatch of it goes first.
- Of one priority the caller goes first that would be done first if all shared the machine equally
  (`shares`). So few texts overtake many, the first of equal callers is done first, and no caller
  is done later than if they took turns.
- What a microbatch has left over is filled with rows of those who come next, of the same priority
  and head. Lower priorities fill up nothing: on a CPU a query would wait for their rows.

The rows of a caller that is alone are computed in the microbatches that `schedule` packed.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np

from gguf_embed.engine.backend import BatchLimits, Head
from gguf_embed.engine.schedule import Microbatch, body_tokens, n_common, prefix_cost
from gguf_embed.engine.shares import Shares
from gguf_embed.native.model import Tokens
from gguf_embed.vectors import Vectors


class Priority(IntEnum):
    """How urgent rows are; the least number goes first."""

    QUERY = 0  # somebody waits for the answer
    NORMAL = 1
    BULK = 2


PATIENCE: Final = 8  # microbatches of higher priorities that may pass one of a lower


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Results of some rows of a job."""

    rows: tuple[int, ...]  # positions in the job's tokens
    vectors: Vectors  # (rows, dim); of a text's tokens: (tokens, dim)
    bad: tuple[int, ...]  # those of the rows that have no usable vector
    n_tokens: int  # computed for them
    died: tuple[int, ...] = ()  # those of `bad` that killed the computing process
    began_at: float = 0.0  # when their microbatch began, as time.monotonic() says


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """Rows that a caller submitted together; `planned` are those that still wait."""

    caller: Caller
    tokens: Sequence[Tokens]
    planned: deque[Microbatch]
    deliver: Callable[[Done | BaseException], None]
    head: Head = Head.POOLED
    n_contexts: int = 1  # for each of its microbatches, if no one else wants them
    limits: BatchLimits | None = None  # its own, come what may; None: those of the time
    packed_tokens: int | None = None  # the limit that `planned` was packed by; None: `limits`
    broken: bool = False  # the first of `planned` has lost rows to another's microbatch
    due: float = 0.0  # its place in the line: when equal shares would have done it


@dataclass(eq=False, slots=True, kw_only=True)
class Caller:
    """Someone who submits jobs; they are done one after the other."""

    priority: Priority = Priority.NORMAL
    jobs: deque[Job] = field(default_factory=deque[Job])  # with rows that wait
    waiting_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The rows of one job in a microbatch."""

    job: Job
    rows: tuple[int, ...]

    @property
    def sequences(self) -> list[Tokens]:
        """Their tokens."""
        return [self.job.tokens[row] for row in self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One microbatch to compute now."""

    parts: tuple[Part, ...]
    head: Head
    n_prefix: int
    n_contexts: int

    @property
    def sequences(self) -> list[Tokens]:
        """The tokens of all rows, part after part."""
        return [ids for part in self.parts for ids in part.sequences]

    @property
    def n_computed(self) -> int:
        """Tokens, those of a shared prefix once."""
        sequences = self.sequences
        return sum(map(len, sequences)) - self.n_prefix * (len(sequences) - 1)


class Turns:
    """The callers that wait."""

    def __init__(self, limits: BatchLimits, contexts_for: Callable[[int, Head], int]) -> None:
        """`contexts_for` tells how many contexts a microbatch of so many tokens occupies."""
        self.limits = limits
        self.n_together = 1  # contexts whose threads compute a microbatch, where that is tried
        self._contexts_for = contexts_for
        self._lines: dict[Priority, list[Caller]] = {priority: [] for priority in Priority}
        self._shares = {priority: Shares() for priority in Priority}
        self._passed = dict.fromkeys(Priority, 0)

    @property
    def waiting_tokens(self) -> int:
        """Of all callers."""
        return sum(caller.waiting_tokens for line in self._lines.values() for caller in line)

    def __bool__(self) -> bool:
        return any(self._lines.values())

    def n_planned(self, most: int) -> int:
        """How many microbatches wait; `most` or more are not told apart."""
        jobs = (job for line in self._lines.values() for caller in line for job in caller.jobs)
        n = 0
        for job in jobs:
            n += len(job.planned)
            if n >= most:
                break
        return n

    def add(self, job: Job) -> None:
        """Put a job behind the others of its caller, and a new caller in its line."""
        if not job.planned:
            return
        caller = job.caller
        n_tokens = sum(map(len, job.tokens))
        job.due = self._shares[caller.priority].comes(caller, n_tokens)
        caller.jobs.append(job)
        caller.waiting_tokens += n_tokens
        if len(caller.jobs) == 1:
            insort(self._lines[caller.priority], caller, key=_due)

    def cancel(self, caller: Caller) -> list[Job]:
        """Forget the rows of a caller that still wait; returns the jobs that had some."""
        jobs = list(caller.jobs)
        if jobs:
            caller.jobs.clear()
            caller.waiting_tokens = 0
            self._lines[caller.priority].remove(caller)
            self._shares[caller.priority].leaves(caller)
        return jobs

    def cancel_all(self) -> list[Job]:
        """The same for all callers."""
        callers = [caller for line in self._lines.values() for caller in line]
        return [job for caller in callers for job in self.cancel(caller)]

    def next(self, n_free: int) -> Work | None:
        """What to compute on `n_free` free contexts; None where nothing can begin yet.

        Nothing passes a microbatch that needs more contexts than are free, but for a higher
        priority: it would never find them free together.
        """
        priority = self._whose_turn()
        if priority is None or not n_free:
            return None
        line = self._lines[priority]
        caller = line[0]
        job = caller.jobs[0]
        first = job.planned[0]
        n_contexts = self._contexts_for(first.n_tokens + first.n_prefix, job.head)
        if job.limits is None:
            n_contexts = max(n_contexts, min(self.n_together, self.limits.n_contexts))
        if n_contexts > n_free:
            return None
        if not self._others_wait(caller):
            n_contexts = max(n_contexts, min(job.n_contexts, n_free))
        limits = job.limits or self.limits
        was_packed = not job.broken and job.packed_tokens in (None, limits.max_tokens)
        filling = _Filling(limits, job)
        if not was_packed and job.head is not Head.TOKENS:
            filling.add_rows(job)
        if job.head is not Head.TOKENS:
            for other in line[1:]:
                if filling.full:
                    break
                if other.jobs[0].head is job.head:
                    filling.add_rows(other.jobs[0])
        work = filling.work(n_contexts)
        self._computes(work, priority)
        return work

    def _computes(self, work: Work, priority: Priority) -> None:
        shares = self._shares[priority]
        shares.serves(sum(map(len, work.sequences)))
        # A caller whose next job has begun has moved back.
        self._lines[priority] = sorted(filter(_waits, self._lines[priority]), key=_due)
        if not self._lines[priority]:
            shares.clear()
        self._count_passed(priority)

    def _whose_turn(self) -> Priority | None:
        waiting = [priority for priority in Priority if self._lines[priority]]
        if not waiting:
            return None
        due = [priority for priority in waiting if self._passed[priority] >= PATIENCE]
        return max(due, key=self._passed.__getitem__) if due else waiting[0]

    def _count_passed(self, served: Priority) -> None:
        for priority in Priority:
            waits = priority > served and bool(self._lines[priority])
            if waits:
                self._passed[priority] += 1
            elif priority == served or not self._lines[priority]:
                self._passed[priority] = 0

    def _others_wait(self, caller: Caller) -> bool:
        return any(other is not caller for line in self._lines.values() for other in line)


def _due(caller: Caller) -> float:
    return caller.jobs[0].due


def _waits(caller: Caller) -> bool:
    return bool(caller.jobs)


class _Filling:
    """A microbatch that is being put together: the next one of a job, then rows of others."""

    def __init__(self, limits: BatchLimits, job: Job) -> None:
        """Takes the first planned microbatch of the job, or what fits of one that was packed by a
        higher limit; a text that is too long is alone.
        """
        self._limits = limits
        self._head = job.head
        first = job.planned[0]
        self._n_prefix = first.n_prefix
        self._prefix = job.tokens[first.rows[0]][: first.n_prefix]
        self._max_tokens = body_tokens(limits, first.n_prefix)
        self._n_tokens = self._n_seqs = 0
        self._rows: dict[Job, list[int]] = {}
        self._take(job, max(1, self._n_fitting(job, first.rows)))

    @property
    def full(self) -> bool:
        """No text of any length can be added."""
        return self._n_seqs >= self._limits.max_seqs or self._n_tokens >= self._max_tokens

    def add_rows(self, job: Job) -> None:
        """The next rows of a job, as many as there is space for."""
        while job.planned and not self.full:
            rows = job.planned[0].rows
            n = self._n_fitting(job, rows)
            self._take(job, n)
            if n < len(rows):
                return

    def work(self, n_contexts: int) -> Work:
        """The microbatch; rows of several callers that turn out to share a prefix do so."""
        parts = tuple(Part(job=job, rows=tuple(rows)) for job, rows in self._rows.items())
        if len(parts) > 1 and not self._n_prefix and self._limits.max_prefix:
            sequences = [ids for part in parts for ids in part.sequences]
            n_shared = min(n_common(sequences[0], ids) for ids in sequences[1:])
            n_shared = min(n_shared, self._limits.max_prefix)
            if (len(sequences) - 1) * n_shared > prefix_cost(self._limits):
                self._n_prefix = n_shared
        return Work(parts=parts, head=self._head, n_prefix=self._n_prefix, n_contexts=n_contexts)

    def _n_fitting(self, job: Job, rows: Sequence[int]) -> int:
        n_tokens, n_seqs = self._n_tokens, self._n_seqs
        for n, row in enumerate(rows):
            ids = job.tokens[row]
            n_tokens += len(ids) - self._n_prefix
            n_seqs += 1
            if n_tokens > self._max_tokens or n_seqs > self._limits.max_seqs:
                return n
            if self._n_prefix and not (
                len(ids) > self._n_prefix and np.array_equal(ids[: self._n_prefix], self._prefix)
            ):
                return n
        return len(rows)

    def _take(self, job: Job, n: int) -> None:
        """Move the first `n` rows of the job's next planned microbatch to this one."""
        if not n:
            return
        planned = job.planned.popleft()
        rows, rest = planned.rows[:n], planned.rows[n:]
        lengths = [len(job.tokens[row]) for row in rows]
        self._rows.setdefault(job, []).extend(rows)
        self._n_tokens += sum(lengths) - n * self._n_prefix
        self._n_seqs += n
        job.caller.waiting_tokens -= sum(lengths)
        job.broken = bool(rest)
        if rest:
            n_tokens = planned.n_tokens - sum(lengths) + n * planned.n_prefix
            left = Microbatch(rows=rest, n_tokens=n_tokens, n_prefix=planned.n_prefix)
            job.planned.appendleft(left)
        elif not job.planned:
            job.caller.jobs.remove(job)


def split(
    work: Work,
    vectors: Vectors,
    bad: Sequence[int],
    died: Sequence[int] = (),
    began_at: float = 0.0,
) -> Iterator[tuple[Job, Done]]:
    """The results of a microbatch, for each job its own."""
    start = 0
    for part in work.parts:
        end = start + len(part.rows)
        n_tokens = sum(map(len, part.sequences)) - work.n_prefix * len(part.rows)
        yield (
            part.job,
            Done(
                rows=part.rows,
                vectors=vectors if work.head is Head.TOKENS else vectors[start:end],
                bad=tuple(part.rows[row - start] for row in bad if start <= row < end),
                died=tuple(part.rows[row - start] for row in died if start <= row < end),
                n_tokens=n_tokens,
                began_at=began_at,
            ),
        )
        start = end
