"""Computes the rows of all callers of one model, in microbatches that they share.

caller = scheduler.caller(Priority.QUERY)
try:
    for done in scheduler.submit(caller, tokens).results():
        ...
finally:
    scheduler.cancel(caller)
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from gguf_embed.engine.backend import Backend, Head
from gguf_embed.engine.schedule import pack_rows
from gguf_embed.engine.turns import Caller, Done, Job, Turns, Work, split
from gguf_embed.errors import BadInput
from gguf_embed.native.model import Tokens
from gguf_embed.system.closing import Closes

if TYPE_CHECKING:
    from gguf_embed.engine.learning import Learning

MAX_WAITING_TOKENS: Final = 1 << 20  # of one caller

Deliver: TypeAlias = Callable[[Done | BaseException], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """One microbatch that was computed."""

    n_texts: int
    n_tokens: int
    n_computed: int  # of them: a prefix that all share is computed once
    n_contexts: int  # whose threads worked on it
    seconds: float


OnComputed: TypeAlias = Callable[[Computed], None]


class Ticket:
    """The results of rows that were submitted, for one thread to take."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._arrived: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()

    def deliver(self, result: Done | BaseException) -> None:
        """For the scheduler: the results of some rows, or why there are none."""
        self._arrived.put(result)

    def results(self) -> Iterator[Done]:
        """All rows, as they are done; raises what the computation raised."""
        while self._n_rows:
            result = self._arrived.get()
            if isinstance(result, BaseException):
                raise result
            self._n_rows -= len(result.rows)
            yield result


class Scheduler(Closes):
    """Who is next is decided by `Turns`; here are the threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
        learning: Learning | None = None,
    ) -> None:
        """A caller whose waiting rows have `max_waiting_tokens` waits before it submits more.

        `learning` tries ways to pack and to compute; None: as the backend says.
        """
        self._backend = backend
        self._max_waiting_tokens = max_waiting_tokens
        self._turns = Turns(backend.limits, backend.contexts_for)
        self._changed = threading.Condition()  # around all below
        self._n_free = self._n_contexts = backend.limits.n_contexts
        self._n_looking = 0  # threads on their way to look for work
        self._closed = False
        self._learning = learning
        self.on_computed: OnComputed | None = None  # called in the thread that computed it
        self.before_each: Callable[[], None] | None = None  # may wait; the same thread calls it
        # The first that is idle works, so that texts that come one by one are computed by one
        # thread: OpenMP has a team of threads for each that ever computed with several, and teams
        # that take turns sleep at every barrier.
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"gguf-embed-{worker}")
            for worker in range(self._n_contexts)
        ]
        self._idle = set(range(self._n_contexts))

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all callers that no microbatch has taken yet: for a server to refuse by."""
        with self._changed:
            return self._turns.waiting_tokens

    def submit(self, caller: Caller, tokens: Sequence[Tokens], head: Head = Head.POOLED) -> Ticket:
        """Have rows computed; waits while the caller has too many tokens waiting already."""
        ticket = Ticket(len(tokens))
        self.submit_to(ticket.deliver, caller, tokens, head, repeatable=False)
        return ticket

    def submit_to(
        self,
        deliver: Deliver,
        caller: Caller,
        tokens: Sequence[Tokens],
        head: Head = Head.POOLED,
        *,
        repeatable: bool = True,
    ) -> None:
        """`submit` for a function that gets the results, in the threads that compute them.

        Rows that are `repeatable` have the same bits whatever a run has learned before.
        """
        limits = self._backend.limits
        own = repeatable and (self._learning is None or not self._learning.same_bits)
        if not own:
            limits = self._turns.limits
        planned = pack_rows(tokens, limits, head)
        job = Job(
            caller=caller,
            tokens=tokens,
            planned=deque(planned),
            deliver=deliver,
            head=head,
            limits=limits if own else None,
            packed_tokens=limits.max_tokens,
            # Where there are fewer microbatches than contexts, each gets the threads of several.
            n_contexts=max(1, self._n_contexts // max(1, len(planned))),
        )
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or caller.waiting_tokens < self._max_waiting_tokens
            )
            self._turns.add(job)
            if self._closed:
                self._refuse_all()
            self._start_threads()

    def cancel(self, caller: Caller) -> None:
        """Forget the rows of a caller that wait; those in a microbatch are still computed."""
        with self._changed:
            self._turns.cancel(caller)
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse the rows that wait; wait for the microbatches in flight."""
        with self._changed:
            self._closed = True
            self._refuse_all()
            self._changed.notify_all()
        for thread in self._threads:
            thread.shutdown(wait=True)

    def _refuse_all(self) -> None:
        self._fail_all(BadInput("the model was closed before all texts were done; open it again"))

    def _fail_all(self, error: BaseException) -> None:
        for job in self._turns.cancel_all():
            job.deliver(error)

    def _start_threads(self) -> None:
        """A thread for each context that could work; they end when there is nothing to do."""
        n_useful = min(self._n_free, self._turns.n_planned(self._n_free))
        try:
            while self._n_looking < n_useful:
                worker = min(self._idle)
                self._threads[worker].submit(self._work, worker)
                self._idle.remove(worker)
                self._n_looking += 1
        except RuntimeError:  # Python itself is ending
            self._refuse_all()

    def _work(self, worker: int) -> None:
        try:
            self._work_on(worker)
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            with self._changed:
                self._idle.add(worker)
                self._fail_all(error)
                self._changed.notify_all()
            raise

    def _work_on(self, worker: int) -> None:
        while True:
            with self._changed:
                self._n_looking -= 1
                work = self._next()
                if work is None:
                    self._idle.add(worker)
                    return
                self._n_free -= work.n_contexts
                self._changed.notify_all()
            seconds, waited_s = self._compute(work)
            with self._changed:
                self._n_free += work.n_contexts
                self._learn(work, seconds, waited_s)
                self._n_looking += 1
                self._start_threads()

    def _next(self) -> Work | None:
        """What to compute now."""
        learning = self._learning
        if learning is None or learning.done:
            return self._turns.next(self._n_free)
        if not self._turns:
            learning.runs_dry()
            return None
        may_begin = learning.may_begin(time.monotonic(), self._turns.waiting_tokens)
        self._turns.limits = replace(self._turns.limits, max_tokens=learning.way.batch_tokens)
        self._turns.n_together = learning.way.n_together
        work = self._turns.next(self._n_free) if may_begin else None
        if work is not None:
            learning.begins()
        return work

    def _learn(self, work: Work, seconds: float, waited_s: float) -> None:
        if self._learning is not None and not self._learning.done:
            self._learning.ends(time.monotonic(), work.n_computed, seconds, waited_s)

    def _compute(self, work: Work) -> tuple[float, float]:
        """Seconds that it took, and those that it waited before."""
        waits_from = began_at = time.monotonic()
        try:
            if self.before_each is not None:
                self.before_each()
                began_at = time.monotonic()
            outcome = self._backend.run(
                work.sequences,
                head=work.head,
                n_prefix=work.n_prefix,
                n_contexts=work.n_contexts,
            )
        except BaseException as error:
            if len(work.parts) == 1:
                work.parts[0].job.deliver(error)
                return time.monotonic() - began_at, began_at - waits_from
            # One caller's rows must not fail for those of another.
            alone = [self._compute(replace(work, parts=(part,))) for part in work.parts]
            return sum(seconds for seconds, _ in alone), sum(waited_s for _, waited_s in alone)
        seconds = time.monotonic() - began_at
        n_texts = n_tokens = 0
        for job, done in split(work, outcome.vectors, outcome.bad, outcome.died, began_at):
            n_texts += len(done.rows)
            n_tokens += done.n_tokens
            job.deliver(done)
        if self.on_computed is not None:
            self.on_computed(
                Computed(
                    n_texts=n_texts,
                    n_tokens=n_tokens,
                    n_computed=work.n_computed,
                    n_contexts=work.n_contexts,
                    seconds=seconds,
                )
            )
        return seconds, began_at - waits_from
