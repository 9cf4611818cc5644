"""What of an Embedder is alive: threads and native memory, from opening to the end of a process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Final

from gguf_embed.engine.backend import Backend
from gguf_embed.engine.calls import Calls
from gguf_embed.engine.prepare import Preparer
from gguf_embed.engine.scheduler import Scheduler
from gguf_embed.engine.stacks import stack_pool
from gguf_embed.errors import BadInput
from gguf_embed.system.closing import Closes

if TYPE_CHECKING:
    from gguf_embed.engine.learning import Learning

_THREADS: Final = "gguf-embed"  # how the names of our threads begin


class Running(Closes):
    """A backend with the threads around it."""

    def __init__(self, backend: Backend, *, n_ctx: int, learning: Learning | None = None) -> None:
        """Make the threads; the backend becomes this object's to close."""
        self.backend = backend
        self.calls = Calls()
        self.scheduler = Scheduler(backend, learning=learning)
        self._tokenizers = stack_pool(min(8, os.cpu_count() or 1), f"{_THREADS}-tokenize")
        self.preparer = Preparer(
            backend.tokenize,
            specials=backend.specials,
            n_ctx=n_ctx,
            threads=self._tokenizers,
            tokenize_many=getattr(backend, "tokenize_many", None),
        )

    def close(self) -> None:
        """Free all; also from the garbage collector, in whatever thread that runs."""
        if threading.current_thread().name.startswith(_THREADS):  # which cannot wait for itself
            threading.Thread(target=self._close).start()
        else:
            self._close()

    def _close(self) -> None:
        self.scheduler.close()
        self._tokenizers.shutdown()
        self.backend.close()


class Lifetime(Closes):
    """Counts the calls of an Embedder, frees what it holds, and starts anew after a fork.

    What is held is freed by `close`, or with this object: it is dropped with its Embedder.
    """

    def __init__(
        self,
        backend: Backend,
        reopen: Callable[[], Backend],
        *,
        n_ctx: int,
        shown: str,
        learning: Learning | None = None,
    ) -> None:
        """`reopen` makes the same backend in the child of a fork; `shown` is for messages.

        `learning` is what a long run may try, but not in such a child.
        """
        self._reopen = reopen
        self._n_ctx = n_ctx
        self._shown = shown
        self._starting = threading.Lock()
        self._closed = False
        self._running: Running | None = None  # in the child of a fork, until it is used there
        self._start(backend, learning)
        _watch_forks()
        _live.add(self)

    def close(self) -> None:
        """Wait for the calls in flight and free all; later calls raise BadInput."""
        if self._running is not None:
            self._running.calls.close(
                lambda: BadInput(f"{self._shown}: close() inside one of its calls; call it later")
            )
            self._free()
        self._closed = True

    @contextmanager
    def call(self, begun: Running | None = None) -> Generator[Running]:
        """Around each use of threads and native memory: while one lasts, nothing is freed.

        `begun` is what a call began with, where it goes on. Raises BadInput after `close`.
        """
        if self._running is None:
            self._start_again()
        running = self._running
        assert running is not None, "started"
        if begun is not None and begun is not running:
            raise BadInput(f"{self._shown}: os.fork() came in the middle of a call; begin it again")
        with running.calls.counted(self._refusal):
            yield running

    def is_current(self, running: Running) -> bool:
        """False after a fork: the locks of the parent's threads must not be touched."""
        return running is self._running

    def forked(self) -> None:
        """In the child of a fork: let go of what was the parent's, without touching it."""
        self._free.detach()
        if self._running is not None:
            self._closed = self._closed or self._running.calls.closed
            _abandoned.append(self._running)
        self._starting = threading.Lock()
        self._running = None

    def _start(self, backend: Backend, learning: Learning | None = None) -> None:
        self._running = Running(backend, n_ctx=self._n_ctx, learning=learning)
        self._free = weakref.finalize(self, self._running.close)
        self._free.atexit = False  # the end of the process frees all

    def _start_again(self) -> None:
        with self._starting:
            if self._closed:
                raise self._refusal()
            if self._running is None:
                self._start(self._reopen())

    def _refusal(self) -> BadInput:
        return BadInput(f"{self._shown} is closed; open the model again")


_live: weakref.WeakSet[Lifetime] = weakref.WeakSet()
_abandoned: list[Running] = []  # the parent's: kept, because to free them takes their locks


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for lifetime in list(_live):
        lifetime.forked()
