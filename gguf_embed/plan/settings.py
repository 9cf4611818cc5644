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
from gguf_embed.plan.values import check_number, check_switch
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
    accelerator: bool | None = None  # our own kernels; None: where proved right; True: or an error
    tap: bool | None = None  # False: with the language-model head, as llama.cpp itself pools
    tune: bool = True  # measure on first use of a model on a machine
    exact: bool = False  # decode each text alone: to the bit the same in any company
    run: RunSettings | None = None  # how it ran before, and is to run again, as far as it can

    def __post_init__(self) -> None:
        """Refuse what llama.cpp would abort for, whoever said it."""
        for name, (least, most) in _NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                number = check_number(name, value, least=least, most=most, may_be_open=True)
                object.__setattr__(self, name, number)
        for name in _SWITCHES:
            value, may_be_open = getattr(self, name), name in _OPEN_SWITCHES
            if value is not None or not may_be_open:
                switch = check_switch(name, value, may_be_open=may_be_open)
                object.__setattr__(self, name, switch)
        if not isinstance(self.prefer, str) or self.prefer not in PREFERENCES:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadOption(f"prefer={shown(self.prefer)}: choose {', '.join(PREFERENCES)}")
        _check_type("quant", self.quant, str, "a name such as 'Q8_0'")
        if not (self.quant is None or self.quant.strip()):
            raise BadOption("quant='': pass a name such as 'Q8_0', or leave it out")
        _check_type("pooling", self.pooling, Pooling, "one such as Pooling.MEAN")
        _check_type("run", self.run, RunSettings, "the `run_settings` of an embedder")

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
                self.accelerator or None,  # without it there is as much to measure as ever
                self.tap,
                self.run,
            )
        )


# Least and most of each number.
_NUMBERS: Final[dict[str, tuple[int | None, int | None]]] = {
    "n_ctx": (3, None),  # a text has a start token, one token of its own and an end token
    "n_gpu_layers": (None, None),
    "memory_bytes": (0, None),
    "margin_bytes": (0, None),
    "max_batch_tokens": (1, None),
    "max_batch_seqs": (1, MAX_SEQS - 1),  # a shared prefix is one of llama.cpp's sequences
    "n_contexts": (1, None),
    "n_threads": (1, None),
}
_OPEN_SWITCHES: Final = ("causal", "flash_attn", "repack", "accelerator", "tap")
_SWITCHES: Final = (*_OPEN_SWITCHES, "allow_smaller", "tune", "exact")


def _check_type(name: str, value: object, kind: type, such: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise BadOption(f"{name}={shown(value)}: pass {such}, or leave it out")


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
    accelerator: bool = False


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
        accelerator=measured.accelerator if settings.accelerator is None else settings.accelerator,
        tap=measured.tap if settings.tap is None else planned.tap,
    )
