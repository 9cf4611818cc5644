"""A model file that is on this machine, and proved safe to load here. Nothing is loaded yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine import proof
from gguf_embed.engine.ahead import Ahead
from gguf_embed.engine.choice import Choice
from gguf_embed.engine.trier import trier
from gguf_embed.engine.tune_record import Target, safe_run
from gguf_embed.errors import BadOption, NativeFailed
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.machine import selftest
from gguf_embed.machine.selftest import SafePaths
from gguf_embed.native import library
from gguf_embed.plan.mode import EmbedMode, SpecialTokens, embed_mode, special_tokens
from gguf_embed.plan.settings import Settings
from gguf_embed.system.child import Worker

ModeOf: TypeAlias = Callable[[Header, ModelCard | None, Settings], EmbedMode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """The file, how it is to be run, and what of the build may be used for it."""

    choice: Choice  # with the plan
    settings: Settings  # what the user said
    path: Path
    header: Header
    mode: EmbedMode
    special_tokens: SpecialTokens
    safe: SafePaths

    @property
    def target(self) -> Target:
        """What a measurement starts from, and its bounds."""
        choice, start = self.choice, self.choice.plan.run
        if self.safe.accelerator:
            start = replace(start, accelerator=True)
        return Target(
            path=self.path,
            header=self.header,
            mode=self.mode,
            safe=self.safe,
            n_cores=choice.settings.n_threads or choice.machine.usable_cores,
            start=start,
            tier=choice.plan.tier,
            gpus=choice.gpus,
            fits=choice.fits,
        )

    def without_tap(self) -> Proved:
        """Planned anew, for a model that turned out to have no tap."""
        return replace(self, choice=self.choice.without(tap=True))


def _unfit(choice: Choice, settings: Settings, safe: SafePaths) -> str:
    """Why the accelerator is not tried, "" where it is."""
    if settings.accelerator is False:
        return "it is switched off"
    if choice.plan.tier != "cpu":
        return "layers are on a GPU, and it is for models on the CPU"
    if settings.repack:
        return "repack=True lays the weights out for ggml's kernels"
    if settings.flash_attn is False or not safe.flash:
        return "it needs flash attention, which is off"
    return library.why_not_accelerated()


def prove_choice(
    choice: Choice,
    path: Path,
    settings: Settings,
    on_status: Callable[[str], None] | None = None,
    *,
    mode_of: ModeOf = embed_mode,
    worker: Worker | None = None,
    ahead: Ahead | None = None,
) -> Proved:
    """Try the build and the file in a child process, once each; planned anew where the GPU or flash
    attention fails here. `mode_of` says how the file is run, or that it is another kind of model.
    `worker` is a `trier` where the caller has started one. `ahead` may load the file once that is
    proved, while the accelerator is tried.

    Raises BadModelFile, BadOption, DoesNotFit, NativeFailed.
    """
    if worker is None:
        with trier() as new:  # starts only if there is something to try
            return prove_choice(
                choice, path, settings, on_status, mode_of=mode_of, worker=new, ahead=ahead
            )
    header = (choice.source.path and choice.header) or read_header(path)
    mode = mode_of(header, choice.card, settings)
    tokens = special_tokens(header, choice.card, mode)
    safe = selftest.check(header.matrix_types, gpus=choice.gpus, worker=worker)
    if not safe.gpu or not safe.flash:
        choice = choice.without(gpus=not safe.gpu, flash_attn=not safe.flash)
    run = safe_run(choice.plan.run, safe)
    unfit = _unfit(choice, settings, safe)
    if unfit and settings.accelerator:
        raise BadOption(f"accelerator=True: {unfit}; leave it out, then it runs where it can")
    refusal = proof.prove(
        path,
        proof.ProofSettings(
            pooling=mode.pooling,
            causal=mode.causal,
            encoder=mode.encoder,
            first_token=tokens.first,
            end_token=tokens.last,
            n_ctx=run.n_ctx,
            n_threads=settings.n_threads or choice.machine.usable_cores,
            n_gpu_layers=run.n_gpu_layers,
            gpus=choice.gpus,
            repack=safe.repack if settings.repack is None else settings.repack,
            flash_attn=run.flash_attn,
            accelerator=not unfit,
        ),
        on_status=on_status,
        on_safe=partial(ahead.begin, path, header) if ahead is not None else None,
        worker=worker,
    )
    if refusal and settings.accelerator:
        raise NativeFailed(
            f"{path}: the accelerator is not used for it: {refusal}; leave out accelerator=True, "
            "then llama.cpp's own kernels run"
        )
    if refusal:
        remark = f"no accelerator for {path.name}: {refusal}; llama.cpp's own kernels run"
        safe = replace(safe, remark=f"{safe.remark}. {remark}" if safe.remark else remark)
    safe = replace(safe, accelerator=not unfit and not refusal)
    return Proved(
        choice=choice,
        settings=settings,
        path=path,
        header=header,
        mode=mode,
        special_tokens=tokens,
        safe=safe,
    )
