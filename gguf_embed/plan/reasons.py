"""The words of a plan: why each thing was chosen, and what to do where nothing fits."""

from __future__ import annotations

from typing import Final

from gguf_embed.errors import DoesNotFit
from gguf_embed.gguf import quants
from gguf_embed.machine.machine import Machine
from gguf_embed.plan import speed
from gguf_embed.plan.candidate import Candidate, Fit, Misfit
from gguf_embed.plan.memory import Pool, gpus_of, mib
from gguf_embed.plan.settings import N_CTX_LEAST, RunSettings, Settings
from gguf_embed.plan.variants import Variant

BELOW_FLOOR: Final = f"; below {quants.FLOOR}: only if asked for"


def of_fit(fit: Fit, run: RunSettings, pool: Pool) -> str:
    """How much a run leaves free of the scarcest memory, or lacks."""
    if fit == "no":
        return (
            f"needs {mib(pool.used_bytes)} of {pool.name}, {mib(pool.free_bytes)} are free, "
            f"with a context of {run.n_ctx} tokens"
        )
    left = f"{mib(pool.free_bytes - pool.used_bytes)} of {pool.name} free"
    if fit == "tight":
        return f"leaves only {left}, with microbatches of {run.max_batch_tokens} tokens"
    return f"leaves {left}"


def of_plan(
    variant: Variant, chosen: Candidate, reason: str, machine: Machine, settings: Settings
) -> tuple[str, ...]:
    """One line for each choice; `reason` is that of the quantization."""
    run, n_places = chosen.run, variant.shape.n_layer + 1
    return (
        f"quant {variant.quant}: {reason}{_quality(chosen)}",
        f"n_gpu_layers {run.n_gpu_layers} of {n_places}: {_layers(chosen, machine, settings)}",
        f"n_ctx {run.n_ctx}: {_n_ctx(variant, chosen, settings)}",
        f"max_batch_tokens {run.max_batch_tokens}: {_batch(chosen, settings)}",
        f"n_contexts {run.n_contexts} x n_threads {run.n_threads}: "
        f"{machine.usable_cores} usable cores",
        *_speed(chosen, machine),
    )


def in_words(row: Candidate) -> str:
    """ "Q8_0 on CPU leaves 9,260 MiB of RAM free"."""
    return f"{row.quant} on {row.where} {row.reason}"


def does_not_fit(
    misfit: Misfit, machine: Machine, settings: Settings, smaller: str | None
) -> DoesNotFit:
    """The error, with what to try; `smaller` names a model that would fit."""
    row = misfit.nearest
    steps = [f"--quant {misfit.lower}, at a loss of quality"] if misfit.lower else []
    steps += ["a smaller --n-ctx"] if (settings.n_ctx or 0) > N_CTX_LEAST else []
    steps += ["a larger --memory"] if settings.memory_bytes is not None else []
    steps.append(smaller or "a smaller model or quantization")
    what = f"{misfit.model} does not fit on {machine.name}: {in_words(row)}"
    return DoesNotFit(
        f"{what}; try {', or '.join(steps)}",
        needed_bytes=row.needed_bytes,
        free_bytes=row.free_bytes,
    )


def _speed(chosen: Candidate, machine: Machine) -> tuple[str, ...]:
    """What is to be expected of it, and whence that is known; nothing where it is not."""
    rate = chosen.tokens_per_s
    if rate is None:
        return ()
    family = speed.family_of(machine)
    source = f"{family.name}: {family.source}" if family is not None else ""
    whence = "measured here" if chosen.measured.tokens_per_s else f"by the table for {source}"
    slow = "; that is slow" if speed.is_slow(rate) else ""
    return (f"speed: about {speed.in_words(rate)}, {whence}{slow}",)


def _quality(chosen: Candidate) -> str:
    """What is known of it, measured here or published."""
    quality = chosen.measured.quality
    if quality is not None and quality.reference != chosen.quant:
        return f"; keeps {quality}, measured here ({quality.texts})"
    percent = quants.percent(chosen.quant)
    return f"; keeps {percent:g} % of F32's retrieval ({quants.PERCENT_SOURCE})" if percent else ""


def _layers(chosen: Candidate, machine: Machine, settings: Settings) -> str:
    if settings.n_gpu_layers is not None:
        return f"asked for; {chosen.reason}"
    if not gpus_of(machine):
        return f"llama.cpp has no GPU here; {chosen.reason}"
    if chosen.tier == "gpu":
        return f"all fit; {chosen.reason}"
    return f"more do not fit; {chosen.reason}"


def _n_ctx(variant: Variant, chosen: Candidate, settings: Settings) -> str:
    if settings.n_ctx:
        return "asked for"
    if chosen.run.n_ctx == variant.shape.n_ctx_train:
        return "the longest that the model takes"
    if settings.prefer == "memory":
        return "no longer, to save memory; --n-ctx gives more"
    return "twice as much does not fit"


def _batch(chosen: Candidate, settings: Settings) -> str:
    if settings.max_batch_tokens:
        return "asked for"
    if chosen.fit == "tight":
        return "small, because memory is tight"
    return "larger ones gain little: attention is computed over all of it"
