"""What the accelerator gains here: the built-in model with it and without it, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gguf_embed.catalog import BUILTIN
from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import GgufEmbedError
from gguf_embed.native import library
from gguf_embed.plan.settings import Settings

ROUNDS = 3
# About 110 tokens each, as many as make one microbatch.
TEXTS: Sequence[str] = tuple(
    f"{i}: " + "A slow brown dog waits for the quick fox. " * 11 for i in "ab"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Which kernel runs and how much faster it is, as a ratio; `remark` says why none does."""

    kernel: str | None
    ratio: float | None = None
    remark: str = ""

    def __str__(self) -> str:
        """For people, on one line."""
        if self.kernel is None or self.ratio is None:
            return f"none runs: {self.remark}"
        return f"{self.kernel}: {self.ratio:.1f} times as fast as llama.cpp with {BUILTIN}"


def measure_gain() -> Gain:
    """Seconds of CPU of both, the best of some rounds; other work disturbs them little."""
    if remark := library.why_not_accelerated():
        return Gain(kernel=None, remark=remark)
    plain = Settings(tune=False, n_threads=1, n_contexts=1, accelerator=False)
    ours = Settings(tune=False, n_threads=1, n_contexts=1, accelerator=True)
    try:
        with (
            Embedder.open(BUILTIN, settings=plain) as slow,
            Embedder.open(BUILTIN, settings=ours) as fast,
        ):
            rounds = [(_seconds(slow), _seconds(fast)) for _ in range(ROUNDS)]
    except GgufEmbedError as error:
        return Gain(kernel=None, remark=" ".join(str(error).split()))
    ratio = min(slow_s for slow_s, _ in rounds) / min(fast_s for _, fast_s in rounds)
    return Gain(kernel=library.accelerated().kernel, ratio=ratio)


def _seconds(embedder: Embedder) -> float:
    began = time.process_time()
    embedder.encode(TEXTS)
    return time.process_time() - began
