"""The models of a server: loaded when they are asked for, and unloaded when nobody uses them.

The least recently used one leaves where memory would not suffice for another. Whether it suffices,
the plan decides: opening raises DoesNotFit. All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from gguf_embed.catalog import RERANKER
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.reranker import Reranker
from gguf_embed.engine.scheduler import Computed
from gguf_embed.errors import DoesNotFit
from gguf_embed.plan.memory import HOST
from gguf_embed.server.failures import Kind, Refused
from gguf_embed.server.offers import Offer, Offers, plain

_log = logging.getLogger(__name__)

# Opens a model in as much memory as the models that are loaded leave (None: as there is).
Open: TypeAlias = Callable[[Offer, int | None], Embedder | Reranker]
OnMicrobatch: TypeAlias = Callable[[str, Computed], None]

_T = TypeVar("_T")

RATE_SHARE = 0.1  # of the newest microbatch in the mean speed
TELLING_TOKENS = 64  # a smaller microbatch does not tell how fast large ones are


@dataclass(eq=False, slots=True, kw_only=True)
class Loaded:
    """A model that is in memory."""

    offer: Offer
    model: Embedder | Reranker
    load_s: float
    keep_alive_s: float  # below 0: for ever
    tokenizes_here: bool = False  # by Python alone
    used_at: float = 0.0  # time.monotonic()
    n_leases: int = 0
    tokens_per_s: float = 0.0  # lately
    fastest_tokens_per_s: float = 0.0  # of all contexts, by the fastest microbatch so far
    expires_at: float | None = None  # time.time(); None: not
    timer: asyncio.TimerHandle | None = None
    leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def embedder(self) -> Embedder:
        """Of a lease for vectors."""
        assert isinstance(self.model, Embedder), "checked when it was leased"
        return self.model

    @property
    def reranker(self) -> Reranker:
        """Of a lease for scores."""
        assert isinstance(self.model, Reranker), "checked when it was leased"
        return self.model

    @property
    def most_tokens_per_s(self) -> float:
        """That it does; as the plan expects before a microbatch has told it; 0: not known."""
        return self.fastest_tokens_per_s or self.model.plan.chosen.tokens_per_s or 0.0

    @property
    def used_bytes(self) -> int:
        """Of RAM, as the plan says."""
        memory = self.model.plan.memory.get(HOST)
        return memory.used_bytes if memory is not None else 0

    @property
    def gpu_bytes(self) -> int:
        """Of all GPUs."""
        memory = self.model.plan.memory
        return sum(part.used_bytes for device, part in memory.items() if device != HOST)

    def computed(self, batch: Computed) -> None:
        """Keep the mean speed, and the greatest."""
        seconds = max(batch.seconds, 1e-6)
        speed = batch.n_tokens / seconds
        share = RATE_SHARE if self.tokens_per_s else 1.0
        self.tokens_per_s += share * (speed - self.tokens_per_s)
        if batch.n_computed >= TELLING_TOKENS:
            n_together = max(1, self.model.run_settings.n_contexts // batch.n_contexts)
            together = n_together * batch.n_computed / seconds
            self.fastest_tokens_per_s = max(self.fastest_tokens_per_s, together)


class Models:
    """Loads and unloads."""

    def __init__(
        self,
        offers: Offers,
        open_model: Open,
        *,
        threads: Executor,
        keep_alive_s: float,
        memory_bytes: int | None = None,
        on_microbatch: OnMicrobatch | None = None,
    ) -> None:
        """`memory_bytes` is what all models together may take; None: what the machine has."""
        self.offers = offers
        self._open = open_model
        self._threads = threads
        self._keep_alive_s = keep_alive_s
        self._memory_bytes = memory_bytes
        self._on_microbatch = on_microbatch
        self._loaded: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """The most recently used first."""
        return tuple(sorted(self._loaded.values(), key=lambda each: -each.used_at))

    @asynccontextmanager
    async def lease(
        self,
        name: str | None,
        keep_alive_s: float | None = None,
        *,
        scores: bool | None = False,
    ) -> AsyncGenerator[Loaded]:
        """A model for one request; loaded if need be, and not unloaded meanwhile.

        One for vectors, with `scores` for scores, with None either. Raises Refused for what gives
        the other, ModelNotFound, DoesNotFit and what else opening raises.
        """
        offer = self._known(name, scores) or await self._in_thread(lambda: self.offers.find(name))
        if scores is not None and offer.is_reranker is not scores:
            raise self._other_kind(offer)
        loaded = self._ready(offer)
        if loaded is None:
            # Loading goes on where the one who asked goes away: others may want it too.
            loaded = await asyncio.shield(asyncio.ensure_future(self._load(offer)))
        loaded.n_leases += 1
        loaded.idle.clear()
        if loaded.timer is not None:
            loaded.timer.cancel()
            loaded.timer = None
        try:
            yield loaded
        finally:
            loaded.n_leases -= 1
            loaded.used_at = time.monotonic()
            if keep_alive_s is not None:
                loaded.keep_alive_s = keep_alive_s
            if not loaded.n_leases:
                loaded.idle.set()
                self._start_timer(loaded)

    async def unload(self, name: str) -> bool:
        """Unload a model once it is idle; False where it is not loaded."""
        loaded = self._loaded.get((await self._in_thread(lambda: self.offers.find(name))).id)
        if loaded is None:
            return False
        await self._leave(loaded)
        return True

    async def close(self) -> None:
        """Wait for the requests in flight and unload all."""
        self._closed = True
        for loaded in self.loaded:
            await self._leave(loaded)

    def _known(self, name: str | None, scores: bool | None) -> Offer | None:
        """Of a name that is known without a look at the disk."""
        if name is None:
            return self.offers.default_for(scores=scores is True)
        wanted = plain(name)
        loaded = (each.offer for each in self._loaded.values())
        return next((offer for offer in loaded if wanted in offer.names), None)

    def _other_kind(self, offer: Offer) -> Refused:
        """Why a model gives no vectors, or no scores, and which does."""
        if offer.is_reranker:
            return Refused(
                Kind.INVALID,
                f"{offer.id} is a reranker: it gives scores, not vectors; ask it at /rerank, "
                "/v1/rerank or /v2/rerank",
            )
        if rerankers := self.offers.rerankers:
            names = ", ".join(each.id for each in rerankers)
            return Refused(
                Kind.INVALID, f"{offer.id} gives vectors, not scores; the rerankers here: {names}"
            )
        return Refused(
            Kind.NO_RERANKER,
            f"no reranker is loaded: {offer.id} gives vectors, not scores; start the server with "
            f"--model {RERANKER}, too",
        )

    def _ready(self, offer: Offer) -> Loaded | None:
        loaded = self._loaded.get(offer.id)
        return None if loaded is None or loaded.leaving else loaded

    async def _load(self, offer: Offer) -> Loaded:
        async with self._loading:  # one at a time, so that the numbers of memory hold
            if (old := self._loaded.get(offer.id)) is not None:
                if not old.leaving:
                    return old
                await old.gone.wait()
            if self._closed:
                raise Refused(Kind.ENDING, "the server is ending; ask another, or later")
            begin = time.monotonic()
            model = await self._opened(offer)
            loaded = Loaded(
                offer=offer,
                model=model,
                load_s=time.monotonic() - begin,
                keep_alive_s=self._keep_alive_s,
                tokenizes_here=model.meter.tokenizes_here,
                used_at=time.monotonic(),
            )
            loaded.idle.set()
            model.meter.watch(self._meter(loaded))
            self._loaded[offer.id] = loaded
            self._start_timer(loaded)
            _log.info("%s: loaded in %.1f s", offer.id, loaded.load_s)
            return loaded

    async def _opened(self, offer: Offer) -> Embedder | Reranker:
        """Opened; the least recently used ones leave until it fits."""
        while True:
            try:
                return await self._in_thread(lambda: self._open(offer, self._left_bytes()))
            except DoesNotFit as error:
                idle = [each for each in self.loaded if not each.n_leases and not each.leaving]
                if not idle:
                    raise
                _log.info("%s makes room for %s: %s", idle[-1].offer.id, offer.id, error)
                await self._leave(idle[-1])

    def _left_bytes(self) -> int | None:
        if self._memory_bytes is None:
            return None
        return max(0, self._memory_bytes - sum(each.used_bytes for each in self._loaded.values()))

    def _meter(self, loaded: Loaded) -> Callable[[Computed], None]:
        def computed(batch: Computed) -> None:
            loaded.computed(batch)
            if self._on_microbatch is not None:
                self._on_microbatch(loaded.offer.id, batch)

        return computed

    def _start_timer(self, loaded: Loaded) -> None:
        if loaded.timer is not None:
            loaded.timer.cancel()
            loaded.timer = None
        loaded.expires_at = None
        if loaded.keep_alive_s < 0 or self._closed:
            return
        loaded.expires_at = time.time() + loaded.keep_alive_s
        loop = asyncio.get_running_loop()
        loaded.timer = loop.call_later(loaded.keep_alive_s, self._expire, loaded)

    def _expire(self, loaded: Loaded) -> None:
        if not loaded.n_leases and not loaded.leaving:
            task = asyncio.ensure_future(self._leave(loaded))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _leave(self, loaded: Loaded) -> None:
        """No new request gets it; those that have it end; then it is freed."""
        if loaded.leaving:
            await loaded.gone.wait()
            return
        loaded.leaving = True
        await loaded.idle.wait()
        if loaded.timer is not None:
            loaded.timer.cancel()
        await self._in_thread(loaded.model.close)
        if self._loaded.get(loaded.offer.id) is loaded:
            del self._loaded[loaded.offer.id]
        loaded.gone.set()
        _log.info("%s: unloaded", loaded.offer.id)

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
