"""Runs microbatches on one or more contexts over one model, each context for one at a time."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.backend import Head, Outcome
from gguf_embed.errors import BadInput
from gguf_embed.gguf.quants import tolerance
from gguf_embed.native.context import Context, ContextParams, TapUnavailable
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.contexts import (
    long_context,
    longest_ordinary,
    ordinary_context,
    splits,
)
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Pooling, Vectors, least_cosine, unusable

_log = logging.getLogger(__name__)


class Runner(Closes):
    """A model with its contexts. `run` may be called from several threads."""

    def __init__(self, model: Model, mode: EmbedMode, settings: RunSettings) -> None:
        """Make the contexts; the model stays the caller's to close."""
        self.model = model
        self.mode = mode
        self.settings = settings
        self._contexts: queue.SimpleQueue[Context] = queue.SimpleQueue()
        self._taking = threading.Lock()
        self._long: Context | None = None
        self._for_tokens: Context | None = None
        self._opened: list[Context] = []
        self._threads = ThreadPoolExecutor(settings.n_contexts, thread_name_prefix="gguf-embed-run")
        params = ordinary_context(settings, mode)
        try:
            for _ in range(settings.n_contexts):
                context = Context(self.model, params, mode.encoder)
                self._opened.append(context)
                self._contexts.put(context)
        except BaseException:
            self._free()
            raise

    def close(self) -> None:
        """Wait for the microbatches in flight and free the contexts."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._opened:
            with self._taken(self.settings.n_contexts):
                self._free()

    def _free(self) -> None:
        for context in (*self._opened, self._long, self._for_tokens):
            if context is not None:
                context.close()
        self._opened, self._long, self._for_tokens = [], None, None

    @property
    def contexts(self) -> tuple[Context, ...]:
        """The ordinary ones."""
        return tuple(self._opened)

    @property
    def max_prefix(self) -> int:
        """See `max_prefix`."""
        return max_prefix(self.settings, self.mode)

    def contexts_for(self, n_tokens: int, head: Head) -> int:
        """How many of the contexts a microbatch occupies.

        One in a context of its own has it alone: threads beside those of others would wait at each
        barrier.
        """
        own = n_tokens > self.ordinary_tokens or (
            head is Head.TOKENS and not self._opened[0].gives_tokens
        )
        return self.settings.n_contexts if own else 1

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        """Decode one microbatch, with the threads of `n_contexts` contexts.

        Rows that come back NaN are tried again alone.
        """
        if head is not Head.TOKENS and (head is Head.RANK) != (self.mode.pooling is Pooling.RANK):
            raise BadInput(f"{self.model.path} is run with {self.mode.pooling}: no {head.value}")
        n_tokens = sum(map(len, sequences)) - n_prefix * (len(sequences) - 1)
        n_contexts = max(n_contexts, self.contexts_for(n_tokens, head))
        with self._taken(n_contexts) as context:
            if head is Head.TOKENS:
                (tokens,) = sequences
                if n_tokens > self.ordinary_tokens or not context.gives_tokens:
                    context = self._token_context(n_tokens)
                return self._guarded_tokens(context, tokens)
            if n_tokens > self.ordinary_tokens:
                return self._guarded(self.long_context(n_tokens), sequences, n_prefix)
            context.use_threads(n_contexts * self.settings.n_threads)
            return self._guarded(context, sequences, n_prefix)

    def submit(
        self, sequences: Sequence[Tokens], *, n_prefix: int = 0, n_contexts: int = 1
    ) -> Future[Outcome]:
        """`run` in a thread of its own: for whoever measures contexts without a scheduler."""
        return self._threads.submit(self.run, sequences, n_prefix=n_prefix, n_contexts=n_contexts)

    @contextmanager
    def _taken(self, n_contexts: int) -> Generator[Context]:
        """The first of so many contexts, none of which anyone else has."""
        with self._taking:  # one taker at a time: two that each hold a part would wait for ever
            taken = [self._contexts.get() for _ in range(n_contexts)]
        try:
            yield taken[0]
        finally:
            for context in taken:
                self._contexts.put(context)

    def _guarded(self, context: Context, sequences: Sequence[Tokens], n_prefix: int) -> Outcome:
        """Isolate NaN: one bad text must not spoil its neighbours or what comes after it."""
        vectors = context.run(sequences, n_prefix=n_prefix)
        broken: list[int] = self._broken(vectors).tolist()
        if not broken:
            return Outcome(vectors=vectors)
        bad: list[int] = []
        for row in broken:
            context.forget()
            vectors[row] = context.run([sequences[row]])[0]
            if len(self._broken(vectors[row : row + 1])):
                vectors[row] = self._last_resort(sequences[row], self.mode.pooling)[0]
            if len(self._broken(vectors[row : row + 1])):
                bad.append(row)
        context.forget()
        _log.warning("NaN in %d rows of a microbatch; %d stay NaN alone", len(broken), len(bad))
        return Outcome(vectors=vectors, bad=tuple(bad))

    def _guarded_tokens(self, context: Context, tokens: Tokens) -> Outcome:
        """The same for the tokens of one text."""
        vectors = context.token_vectors(tokens)
        if not len(unusable(vectors)):
            return Outcome(vectors=vectors)
        context.forget()
        vectors = context.token_vectors(tokens)
        if len(unusable(vectors)):
            vectors = self._last_resort(tokens, Pooling.NONE)
        context.forget()
        n_bad = len(unusable(vectors))
        _log.warning("NaN in the token vectors of a text; %d stay NaN", n_bad)
        return Outcome(vectors=vectors, bad=(0,) if n_bad else ())

    def _broken(self, vectors: Vectors) -> npt.NDArray[np.intp]:
        """The rows that cannot be right; a score, unlike a vector, may be 0."""
        if self.mode.pooling is Pooling.RANK:
            return np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        return unusable(vectors)

    def _last_resort(self, sequence: Tokens, pooling: Pooling) -> Vectors:
        """From llama.cpp's own pooling without flash attention."""
        params = ContextParams(
            n_ctx=len(sequence),
            n_ubatch=len(sequence),
            n_seq_max=1,
            n_threads=self.settings.n_threads,
            pooling=pooling,
            causal=self.mode.causal,
            flash_attn=False,
        )
        with Context(self.model, params, self.mode.encoder) as context:
            return context.run([sequence])

    @property
    def ordinary_tokens(self) -> int:
        """Tokens that an ordinary context takes, prefix included."""
        return longest_ordinary(self.settings, self.mode)

    def long_context(self, n_tokens: int) -> Context:
        """A context large enough for one long microbatch; the last one is kept."""
        if self._long is None or self._long.params.n_ctx < n_tokens:
            if self._long is not None:
                self._long.close()
                self._long = None
            params = long_context(self.settings, self.mode, n_tokens)
            self._long = Context(self.model, params, self.mode.encoder)
        return self._long

    def _token_context(self, n_tokens: int) -> Context:
        """A context that gives the token vectors of one text; the last one is kept."""
        if self._opened[0].gives_tokens:
            return self.long_context(n_tokens)
        kept = self._for_tokens
        if kept is None or kept.params.n_ctx < n_tokens:
            if kept is not None:
                kept.close()
                self._for_tokens = None
            mode = replace(self.mode, pooling=Pooling.NONE)
            params = long_context(self.settings, mode, n_tokens)
            kept = self._for_tokens = Context(self.model, params, mode.encoder)
        return kept


def max_prefix(settings: RunSettings, mode: EmbedMode) -> int:
    """Tokens of a shared prefix that leave room for a full microbatch; 0: none can be shared.

    It takes a cache, causal attention and a tap.
    """
    can_share = splits(settings, mode) and mode.pooling is Pooling.LAST
    return settings.max_batch_tokens if can_share else 0


def tap_works(model: Model, mode: EmbedMode, settings: RunSettings) -> bool:
    """Whether two short texts come out of the tap as out of llama.cpp's own pooling."""
    if mode.encoder or mode.pooling is Pooling.RANK:
        return False
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, model.n_vocab, n).astype(np.int32) for n in (5, 9)]
    params = ContextParams(
        n_ctx=64,
        n_ubatch=64,
        n_seq_max=2,
        n_threads=settings.n_threads * settings.n_contexts,
        pooling=mode.pooling,
        causal=mode.causal,
        flash_attn=settings.flash_attn,
        accelerator=settings.accelerator,
    )
    with Context(model, params, encoder=False) as context:
        expected = context.run(texts)
    try:
        with Context(model, replace(params, tap=True), encoder=False) as context:
            tapped = context.run(texts)
    except TapUnavailable as error:
        _log.info("no tap: %s", error)
        return False
    cosine = least_cosine(expected, tapped)
    if not cosine >= tolerance((), same_kernels=True):  # NaN as well
        _log.warning("the tapped path differs from llama.cpp's pooling (cosine %g)", cosine)
        return False
    return True
