"""What every dialect asks for: texts of a model to vectors, within the limits of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TypeVar

from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.options import EncodeOptions
from gguf_embed.engine.pending import Pending
from gguf_embed.server.asked import Embedded, EmbedRequest, RerankRequest, Times
from gguf_embed.server.failures import Kind, Refused
from gguf_embed.server.limits import Limits
from gguf_embed.server.models import Loaded, Models
from gguf_embed.server.pull import Puller

_T = TypeVar("_T")


class Service:
    """Safe for any number of requests at a time, on one event loop."""

    def __init__(self, models: Models, limits: Limits, *, threads: Executor) -> None:
        """`threads` is where texts are tokenized."""
        self.models = models
        self.limits = limits
        self._threads = threads
        self.puller: Puller | None = None  # with --allow-pull
        self.started_at = time.time()
        self.ready = False  # once what is to be loaded at the start is
        self.ending = False

    async def embed(self, asked: EmbedRequest) -> Embedded:
        """Vectors in order. A task that is cancelled meanwhile has its texts forgotten."""
        begin = time.monotonic()
        self.limits.check_texts(asked.texts)
        async with self.models.lease(asked.model, asked.keep_alive_s) as loaded:
            load_s = time.monotonic() - begin
            options = asked.options
            if asked.prompt_if_known and asked.prompt_name not in loaded.embedder.prompts:
                options["prompt_name"] = None
            loop = asyncio.get_running_loop()
            done: asyncio.Future[None] = loop.create_future()
            started = _Started()

            def finish() -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(_set, done)

            try:
                pending = await self.in_thread(
                    lambda: self._submitted(loaded, asked, options, finish, started)
                )
                tokenize_s = time.monotonic() - begin - load_s
                await done
            except asyncio.CancelledError:
                started.cancel()
                raise
            block = pending.block()
            waits = pending.waits()
            return Embedded(
                model=asked.model or loaded.offer.id,
                served=loaded.offer.id,
                vectors=block.vectors,
                token_counts=block.token_counts,
                n_truncated=int(block.truncated.sum()),
                failed=block.failed,
                n_chars=sum(map(len, asked.texts)),
                times=Times(
                    total_s=time.monotonic() - begin,
                    load_s=load_s,
                    tokenize_s=tokenize_s,
                    queue_s=waits.queue_s,
                    compute_s=waits.compute_s,
                ),
            )

    async def rerank(self, asked: RerankRequest) -> list[float]:
        """Scores in the order of the documents."""
        self.limits.check_texts([asked.query, *asked.documents])
        raise Refused(
            Kind.NO_RERANKER,
            "no reranker is loaded; this server gives vectors, and scores once it has a reranker",
        )

    async def with_embedder(self, model: str | None, call: Callable[[Embedder], _T]) -> _T:
        """What a short call to a model returns, made in a thread."""
        async with self.models.lease(model) as loaded:
            return await self.in_thread(lambda: call(loaded.embedder))

    async def in_thread(self, call: Callable[[], _T]) -> _T:
        """A call that would hold the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _submitted(
        self,
        loaded: Loaded,
        asked: EmbedRequest,
        options: EncodeOptions,
        on_done: Callable[[], None],
        started: _Started,
    ) -> Pending:
        """Tokenized and on its way; in a thread. Raises Refused where too much waits."""
        embedder, speed = loaded.embedder, loaded.tokens_per_s
        self.limits.check_queue(embedder.meter.waiting_tokens, 0, speed)
        pending = embedder.prepare(asked.texts, **options)
        self.limits.check_queue(embedder.meter.waiting_tokens, pending.n_tokens, speed)
        pending.submit(on_done)
        started.begin(pending)
        return pending


class _Started:
    """What of a request runs, where it may be cancelled before that is known."""

    def __init__(self) -> None:
        self._pending: Pending | None = None
        self._cancelled = False

    def begin(self, pending: Pending) -> None:
        """It runs; or it was cancelled before."""
        self._pending = pending
        if self._cancelled:
            pending.cancel()

    def cancel(self) -> None:
        """Now, or as soon as it runs."""
        self._cancelled = True
        if self._pending is not None:
            self._pending.cancel()


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
