"""What every dialect asks for: texts of a model to vectors or scores, within limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import numpy as np

from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.options import Block, EncodeOptions
from gguf_embed.engine.pending import Waits
from gguf_embed.engine.reranker import Reranker
from gguf_embed.jobs.encode import Encoded, begin
from gguf_embed.server.asked import Embedded, EmbedRequest, Reranked, RerankRequest, Times
from gguf_embed.server.indexes import Indexes
from gguf_embed.server.limits import Limits
from gguf_embed.server.models import Loaded, Models
from gguf_embed.server.pull import Puller

if TYPE_CHECKING:
    from gguf_embed.jobs.cache import VectorCache

_T = TypeVar("_T")
_Result = TypeVar("_Result", covariant=True)

MOST_VALUES: Final = 1 << 16  # of vectors that are put in order on the loop


class Call(Protocol[_Result]):
    """Texts on their way, as `Pending` has them."""

    @property
    def n_tokens(self) -> int:
        """To be computed."""
        ...

    def submit(self, on_done: Callable[[], None]) -> None:
        """Have it computed."""
        ...

    def cancel(self) -> None:
        """Forget what waits."""
        ...

    def result(self) -> _Result:
        """All in order, once it is done."""
        ...

    def waits(self) -> Waits:
        """Where the time went."""
        ...


class Service:
    """Safe for any number of requests at a time, on one event loop."""

    def __init__(self, models: Models, limits: Limits, *, threads: Executor) -> None:
        """`threads` is where texts are tokenized."""
        self.models = models
        self.limits = limits
        self._threads = threads
        self.puller: Puller | None = None  # with --allow-pull
        self.indexes = Indexes({})  # with --index
        self.cache: VectorCache | None = None  # with --cache
        self.started_at = time.time()
        self.ready = False  # once what is to be loaded at the start is
        self.ending = False

    async def embed(self, asked: EmbedRequest) -> Embedded:
        """Vectors in order. A task that is cancelled meanwhile has its texts forgotten."""
        begin = time.monotonic()
        self.limits.check_texts(asked.texts)
        async with self.models.lease(asked.model, asked.keep_alive_s) as loaded:
            leased = time.monotonic()
            options = asked.options
            if asked.prompt_if_known and asked.prompt_name not in loaded.embedder.prompts:
                options["prompt_name"] = None
            pending, tokenize_s = await self._computed(
                loaded,
                lambda: self._prepared(loaded.embedder, asked.texts, options),
                at_once=asked.is_short and self.cache is None,
            )
            n_values = len(asked.texts) * loaded.embedder.dim
            # A thread costs more than few vectors do; many would hold the loop, and so would
            # keeping new ones.
            if n_values > MOST_VALUES or self.cache is not None:
                block = await self.in_thread(pending.result)
            else:
                block = pending.result()
            return Embedded(
                model=asked.model or loaded.offer.id,
                served=loaded.offer.id,
                vectors=block.vectors,
                token_counts=block.token_counts,
                n_tokens=int(block.token_counts.sum()),
                n_truncated=int(np.count_nonzero(block.truncated)),
                failed=block.failed,
                n_chars=sum(map(len, asked.texts)),
                times=_times(begin, leased, tokenize_s, pending),
            )

    def _prepared(
        self,
        embedder: Embedder,
        texts: Sequence[str] | Sequence[list[int]],
        options: EncodeOptions,
    ) -> Call[Block | Encoded]:
        """Tokenized; of texts that the cache knows nothing is computed."""
        if self.cache is None or not all(isinstance(text, str) for text in texts):
            return embedder.prepare(texts, **options)
        return begin(embedder, cast("Sequence[str]", texts), options, cache=self.cache)

    async def rerank(self, asked: RerankRequest) -> Reranked:
        """Scores in the order of the documents."""
        begin = time.monotonic()
        texts = asked.texts
        self.limits.check_texts(texts)
        async with self.models.lease(asked.model, scores=True) as loaded:
            leased = time.monotonic()
            pending, tokenize_s = await self._computed(
                loaded,
                lambda: loaded.reranker.prepare(asked.query, asked.documents, **asked.options),
                at_once=asked.is_short,
            )
            scored = await self.in_thread(pending.result)  # the head is computed there
            return Reranked(
                model=asked.model or loaded.offer.id,
                served=loaded.offer.id,
                scores=scored.scores,
                scored=scored,
                token_counts=np.array(scored.n_tokens, np.int32),
                n_tokens=sum(scored.n_tokens),
                n_truncated=sum(scored.truncated),
                n_chars=sum(map(len, asked.documents)) + len(asked.query) * len(asked.documents),
                times=_times(begin, leased, tokenize_s, pending),
            )

    async def with_embedder(self, model: str | None, call: Callable[[Embedder], _T]) -> _T:
        """What a short call to a model returns, made in a thread."""
        async with self.models.lease(model) as loaded:
            return await self.in_thread(lambda: call(loaded.embedder))

    async def with_reranker(self, model: str | None, call: Callable[[Reranker], _T]) -> _T:
        """The same of a model that scores."""
        async with self.models.lease(model, scores=True) as loaded:
            return await self.in_thread(lambda: call(loaded.reranker))

    async def in_thread(self, call: Callable[[], _T]) -> _T:
        """A call that would hold the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _computed(
        self, loaded: Loaded, prepare: Callable[[], Call[_T]], *, at_once: bool
    ) -> tuple[Call[_T], float]:
        """Prepared, submitted and done; and the seconds until it was submitted.

        `at_once`: on the loop, where that needs no other process. A few short texts are tokenized
        before a thread would have begun.
        """
        begin = time.monotonic()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        started = _Started()

        def finish() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_set, done)

        try:
            if at_once and loaded.tokenizes_here:
                pending = self._submitted(loaded, prepare(), finish, started)
            else:
                pending = await self.in_thread(
                    lambda: self._submitted(loaded, self._allowed(loaded, prepare), finish, started)
                )
            tokenize_s = time.monotonic() - begin
            await done
        except asyncio.CancelledError:
            started.cancel()
            raise
        return pending, tokenize_s

    def _allowed(self, loaded: Loaded, prepare: Callable[[], Call[_T]]) -> Call[_T]:
        """Tokenized, where not too much waits already."""
        self.limits.check_queue(loaded.model.meter.waiting_tokens, 0, loaded.most_tokens_per_s)
        return prepare()

    def _submitted(
        self,
        loaded: Loaded,
        pending: Call[_T],
        on_done: Callable[[], None],
        started: _Started,
    ) -> Call[_T]:
        """On its way. Raises Refused where too much waits."""
        waiting, speed = loaded.model.meter.waiting_tokens, loaded.most_tokens_per_s
        self.limits.check_queue(waiting, pending.n_tokens, speed)
        pending.submit(on_done)
        started.begin(pending)
        return pending


class _Started:
    """What of a request runs, where it may be cancelled before that is known."""

    def __init__(self) -> None:
        self._pending: Call[Any] | None = None
        self._cancelled = False

    def begin(self, pending: Call[Any]) -> None:
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


def _times(begin: float, leased: float, tokenize_s: float, pending: Call[Any]) -> Times:
    waits = pending.waits()
    return Times(
        total_s=time.monotonic() - begin,
        load_s=leased - begin,
        tokenize_s=tokenize_s,
        queue_s=waits.queue_s,
        compute_s=waits.compute_s,
    )
