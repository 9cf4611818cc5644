"""A call of which nobody waits in a thread: prepared, submitted, and heard of when it is done.

    pending = embedder.prepare(["one text", "another"])   # tokens, checked; nothing is computed yet
    pending.submit(done.set)                              # returns at once
    ...
    block = pending.result()

A server has hundreds of them at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.engine import arguments
from gguf_embed.engine.options import Block
from gguf_embed.engine.prepare import Prepared
from gguf_embed.engine.running import Lifetime, Running
from gguf_embed.engine.scheduler import OnComputed
from gguf_embed.engine.stream import Request, collected
from gguf_embed.engine.turns import Caller, Done, Priority
from gguf_embed.errors import BadOption, TextTooLong


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """Where the time of a call went, in seconds."""

    queue_s: float  # until the first of its microbatches began
    compute_s: float  # from then to the end of the last


_Result = TypeVar("_Result")


class Pending(Generic[_Result]):
    """The texts of one call. Safe to use from several threads."""

    def __init__(
        self,
        prepared: Prepared,
        priority: Priority,
        lifetime: Lifetime,
        running: Running,
        collect: Callable[[Sequence[Done]], _Result],
    ) -> None:
        """Use `Embedder.prepare` or `Reranker.prepare`; `collect` makes their results one."""
        self._prepared = prepared
        self._lifetime = lifetime
        self._running = running
        self._collect = collect
        self._caller = Caller(priority=priority)
        self._lock = threading.Lock()
        self._arrived: list[Done] = []
        self._n_left = len(prepared.tokens)
        self._failure: BaseException | None = None
        self._on_done: Callable[[], None] | None = None
        self._submitted_at = self._done_at = 0.0

    @property
    def n_tokens(self) -> int:
        """To be computed: of each different text, after the cut."""
        return sum(map(len, self._prepared.tokens))

    @property
    def token_counts(self) -> npt.NDArray[np.int32]:
        """Of each text, after the cut, shape (n,)."""
        return self._prepared.token_counts

    @property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Which texts were cut, shape (n,)."""
        return self._prepared.cut

    def submit(self, on_done: Callable[[], None]) -> None:
        """Have it computed. `on_done` is called once, in any thread; then there is a `result`."""
        self._on_done = on_done
        self._submitted_at = time.monotonic()
        with self._lifetime.call(self._running) as running:
            if not self._n_left:
                on_done()
                return
            running.scheduler.submit_to(self._deliver, self._caller, self._prepared.tokens)

    def cancel(self) -> None:
        """Forget the rows that wait; `on_done` may never be called then."""
        if self._lifetime.is_current(self._running):
            self._running.scheduler.cancel(self._caller)

    def result(self) -> _Result:
        """All in order; raises what the computation raised, or what it lacks."""
        if self._failure is not None:
            raise self._failure
        return self._collect(self._arrived)

    def waits(self) -> Waits:
        """Of a call that is done."""
        began_at = min((done.began_at for done in self._arrived), default=self._done_at)
        return Waits(
            queue_s=max(0.0, began_at - self._submitted_at),
            compute_s=max(0.0, self._done_at - began_at),
        )

    def _deliver(self, result: Done | BaseException) -> None:
        with self._lock:
            if self._failure is not None:
                return
            if isinstance(result, BaseException):
                self._failure = result
            else:
                self._arrived.append(result)
                self._n_left -= len(result.rows)
                if self._n_left:
                    return
            self._done_at = time.monotonic()
        assert self._on_done is not None, "submitted"
        self._on_done()


def prepared(
    lifetime: Lifetime,
    running: Running,
    texts: Sequence[str] | Sequence[Sequence[int]],
    request: Request,
    n_vocab: int,
) -> Pending[Block]:
    """Texts, or token ids of a vocabulary of `n_vocab`, ready to be submitted. Raises BadInput."""
    preparer = running.preparer
    if all(isinstance(text, str) for text in texts):
        rows = preparer.rows(
            cast("Sequence[str]", texts),
            0,
            prompt=request.prompt,
            truncate=request.truncate,
            n_ctx=request.n_ctx,
            on_error=request.on_error,
        )
    elif request.prompt:
        raise BadOption(
            "a prompt goes in front of texts, not of token ids; pass the texts, or ids that hold "
            "the prompt"
        )
    else:
        ids = arguments.check_token_ids(texts)
        rows = preparer.given(ids, n_vocab=n_vocab, truncate=request.truncate, n_ctx=request.n_ctx)
    if rows.too_long:
        raise TextTooLong(rows.too_long, request.n_ctx)

    def collect(arrived: Sequence[Done]) -> Block:
        return collected(rows, request, arrived)

    return Pending(rows, request.priority, lifetime, running, collect)


class Meter:
    """What a server reads of an engine, and how fast it may go."""

    def __init__(self, lifetime: Lifetime) -> None:
        self._lifetime = lifetime

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all calls that no microbatch has taken yet."""
        with self._lifetime.call() as running:
            return running.scheduler.waiting_tokens

    @property
    def n_deaths(self) -> int:
        """How often the child of an isolated engine has died."""
        with self._lifetime.call() as running:
            return getattr(running.backend, "n_deaths", 0)

    @property
    def tokenizes_here(self) -> bool:
        """Whether texts are tokenized without another process, by Python alone."""
        with self._lifetime.call() as running:
            return getattr(running.backend, "tokenizes_here", False)

    def pace(self, wait: Callable[[], None]) -> None:
        """Have each microbatch begin once `wait` comes back."""
        with self._lifetime.call() as running:
            running.scheduler.before_each = wait

    def watch(self, on_computed: OnComputed) -> None:
        """Have each microbatch told once it is computed."""
        with self._lifetime.call() as running:
            running.scheduler.on_computed = on_computed
