"""The contexts of llama.cpp that a run is made of.

The runner makes them and the plan counts their memory: both ask here.
"""

from __future__ import annotations

from typing import Final

from gguf_embed.native.context import MAX_SEQS, ContextParams
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings
from gguf_embed.vectors import Pooling

LONG_STEP: Final = 1024  # a context for a long text grows by so many tokens, so that it is reused


def tapped(run: RunSettings, mode: EmbedMode) -> bool:
    """Whether the language-model head is left out."""
    return run.tap and not mode.encoder and mode.pooling is not Pooling.RANK


def splits(run: RunSettings, mode: EmbedMode) -> bool:
    """Whether a text may be longer than a microbatch."""
    return tapped(run, mode) and mode.causal


def longest_ordinary(run: RunSettings, mode: EmbedMode) -> int:
    """Tokens that an ordinary context takes, a shared prefix included."""
    return run.max_batch_tokens * (2 if splits(run, mode) else 1)


def ordinary_context(run: RunSettings, mode: EmbedMode) -> ContextParams:
    """One of the `n_contexts` contexts for microbatches of up to `max_batch_tokens`."""
    return _context(
        run,
        mode,
        n_tokens=run.max_batch_tokens,
        n_ctx=longest_ordinary(run, mode),
        n_threads=run.n_threads,
    )


def long_context(run: RunSettings, mode: EmbedMode, n_tokens: int) -> ContextParams:
    """The context for one text that an ordinary one cannot take, with the threads of all."""
    n_tokens = -(-n_tokens // LONG_STEP) * LONG_STEP
    n_threads = run.n_threads * run.n_contexts
    return _context(run, mode, n_tokens=n_tokens, n_ctx=n_tokens, n_threads=n_threads)


def _context(
    run: RunSettings, mode: EmbedMode, *, n_tokens: int, n_ctx: int, n_threads: int
) -> ContextParams:
    split = splits(run, mode)
    return ContextParams(
        n_ctx=n_ctx,
        n_ubatch=run.max_batch_tokens if split else n_tokens,
        # One more for the shared prefix.
        n_seq_max=min(min(run.max_batch_seqs, n_tokens) + split, MAX_SEQS),
        n_threads=n_threads,
        pooling=mode.pooling,
        causal=mode.causal,
        flash_attn=run.flash_attn,
        tap=tapped(run, mode),
        accelerator=run.accelerator,
    )
