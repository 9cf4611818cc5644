"""The only two shapes of settings: what the user said, and what will run.

    Settings     None leaves a choice open
    RunSettings  every choice is made

The plan turns the first into the second. What was measured may change the second later, but
never what the user said (`keep_asked`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from gguf_embed.errors import BadOption, shown
from gguf_embed.native.context import MAX_SEQS
from gguf_embed.vectors import Pooling

Prefer: TypeAlias = Literal["quality", "speed", "memory"]

PREFERENCES: Final[tuple[Prefer, ...]] = ("quality", "speed", "memory")
BATCH_TOKENS: Final = 512  # larger microbatches gain little: attention runs over all of it
BATCH_SEQS: Final = 64
N_CTX_LEAST: Final = 512  # no plan is for shorter texts unless the user asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Which file of a model to run, and how: what the user said. None leaves a choice open.

    What is left open is chosen by the model's header, the catalog, the plan and a measurement.
    Raises BadOption for a value of a wrong type, or out of its range.
    """

    quant: str | None = None
    prefer: Prefer = "quality"
    allow_smaller: bool = False  # take a smaller model of the family where this one is cramped
    n_ctx: int | None = None  # longest text, in tokens
    n_gpu_layers: int | None = None  # llama.cpp's count: the output is one more; -1: all
    memory_bytes: int | None = None  # most to use of RAM, and of each GPU
    margin_bytes: int | None = None  # what stays free of each
    pooling: Pooling | None = None
    causal: bool | None = None  # False: each token sees those after it, too
    max_batch_tokens: int | None = None
    max_batch_seqs: int | None = None
    n_contexts: int | None = None
    n_threads: int | None = None  # of each context; without n_contexts: cores to share out
    flash_attn: bool | None = None
    repack: bool | None = None
    tap: bool | None = None  # False: with the language-model head, as llama.cpp itself pools
    tune: bool = True  # measure on first use of a model on a machine
    exact: bool = False  # decode each text alone: to the bit the same in any company

    def __post_init__(self) -> None:
        """Refuse what llama.cpp would abort for, whoever said it."""
        # A text has a start token, one token of its own and an end token.
        _check_number("n_ctx", self.n_ctx, 3)
        _check_number("n_gpu_layers", self.n_gpu_layers)
        _check_number("memory_bytes", self.memory_bytes, 0)
        _check_number("margin_bytes", self.margin_bytes, 0)
        _check_number("max_batch_tokens", self.max_batch_tokens, 1)
        # A shared prefix is one of the sequences that llama.cpp takes.
        _check_number("max_batch_seqs", self.max_batch_seqs, 1, MAX_SEQS - 1)
        _check_number("n_contexts", self.n_contexts, 1)
        _check_number("n_threads", self.n_threads, 1)
        for name, value in (
            ("causal", self.causal),
            ("flash_attn", self.flash_attn),
            ("repack", self.repack),
            ("tap", self.tap),
        ):
            _check_switch(name, value, may_be_open=True)
        for name, value in (
            ("allow_smaller", self.allow_smaller),
            ("tune", self.tune),
            ("exact", self.exact),
        ):
            _check_switch(name, value)
        if not isinstance(self.prefer, str) or self.prefer not in PREFERENCES:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadOption(f"prefer={shown(self.prefer)}: choose {', '.join(PREFERENCES)}")
        _check_type("quant", self.quant, str, "a name such as 'Q8_0'")
        _check_type("pooling", self.pooling, Pooling, "one such as Pooling.MEAN")

    @property
    def decide_speed(self) -> bool:
        """Whether the user chose something that a measurement would choose otherwise."""
        return any(
            choice is not None
            for choice in (
                self.max_batch_tokens,
                self.max_batch_seqs,
                self.n_contexts,
                self.n_threads,
                self.flash_attn,
                self.repack,
                self.tap,
            )
        )


def _check_number(
    name: str, value: object, low: int | None = None, high: int | None = None
) -> None:
    if value is None:
        return
    # To Python a bool is an int.
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadOption(f"{name}={shown(value)}: give a whole number, or leave it out")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low}..{high}"
        raise BadOption(f"{name}={shown(value)}: give {allowed}, or leave it out")


def _check_switch(name: str, value: object, *, may_be_open: bool = False) -> None:
    if not isinstance(value, bool) and not (value is None and may_be_open):
        raise BadOption(f"{name}={shown(value)}: give True or False, or leave it out")


def _check_type(name: str, value: object, kind: type, such: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise BadOption(f"{name}={shown(value)}: give {such}, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What will run: all that decides speed and memory, and nothing that decides the vectors.

    A microbatch is filled with texts up to `batch_tokens`; a longer text has one of its own, of up
    to `max_batch_tokens` (n_ubatch) in an ordinary context. `n_contexts` contexts of `n_threads`
    threads each share the weights.
    """

    n_ctx: int = BATCH_TOKENS  # longest text, in tokens
    max_batch_tokens: int = BATCH_TOKENS
    batch_tokens: int = BATCH_TOKENS
    max_batch_seqs: int = BATCH_SEQS
    n_contexts: int = 1
    n_threads: int = 1  # of each context
    n_gpu_layers: int = 0
    flash_attn: bool = True
    repack: bool = True
    tap: bool = True


def keep_asked(measured: RunSettings, planned: RunSettings, settings: Settings) -> RunSettings:
    """What was measured to be fast, but for what the user decided: that is as planned."""
    size_asked = settings.max_batch_tokens is not None
    # Without n_contexts the threads are cores, and how they are shared out is ours to choose.
    share_asked = settings.n_contexts is not None
    return replace(
        measured,
        n_ctx=planned.n_ctx,
        n_gpu_layers=planned.n_gpu_layers,
        max_batch_tokens=planned.max_batch_tokens if size_asked else measured.max_batch_tokens,
        batch_tokens=planned.batch_tokens if size_asked else measured.batch_tokens,
        max_batch_seqs=settings.max_batch_seqs or measured.max_batch_seqs,
        n_contexts=planned.n_contexts if share_asked else measured.n_contexts,
        n_threads=planned.n_threads if share_asked else measured.n_threads,
        flash_attn=measured.flash_attn if settings.flash_attn is None else planned.flash_attn,
        repack=measured.repack if settings.repack is None else planned.repack,
        tap=measured.tap if settings.tap is None else planned.tap,
    )
