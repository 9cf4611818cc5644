"""What a measurement of settings gave, and what of it is kept for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from gguf_embed.engine.schedule import Cost
from gguf_embed.gguf.header import Header
from gguf_embed.machine import tested
from gguf_embed.machine.load import Load, LoadMeter
from gguf_embed.machine.selftest import SafePaths
from gguf_embed.native import library
from gguf_embed.plan.candidate import Tier
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings, Settings, keep_asked
from gguf_embed.system import paths
from gguf_embed.system.kept import keep, read_kept

_log = logging.getLogger(__name__)


def _any(_: RunSettings) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model on this machine: what is measured, and within which bounds."""

    path: Path
    header: Header
    mode: EmbedMode
    safe: SafePaths
    n_cores: int
    start: RunSettings  # as planned
    tier: Tier = "cpu"
    gpus: tuple[str, ...] = ()  # descriptions of those that hold layers
    fits: Callable[[RunSettings], bool] = _any  # whether there is memory for such a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measured setting; `cosine` is its least agreement with the reference path."""

    changed: str
    settings: RunSettings
    tokens_per_s: float
    cosine: float
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The winner, what it was measured against, and the fitted cost of a microbatch."""

    settings: RunSettings
    tokens_per_s: float
    untuned_tokens_per_s: float
    seconds: float
    trials: tuple[Trial, ...]
    cost: Cost | None
    load: Load | None = None  # beside which it was measured; None: not known
    by: Literal["tune", "run"] = "tune"  # a run learns inside its work, and tries less


def safe_run(run: RunSettings, safe: SafePaths) -> RunSettings:
    """The same without what crashed in the self-test, or is not proved."""
    accelerator = run.accelerator and safe.accelerator
    return replace(
        run,
        # The accelerator reads weights as they are in the file, and attention in one operation.
        repack=run.repack and safe.repack and not accelerator,
        flash_attn=(run.flash_attn or accelerator) and safe.flash,
        accelerator=accelerator,
    )


def best_run(target: Target, settings: Settings) -> RunSettings:
    """What the user wants, else what was measured to be the fastest, else what is planned.

    What was measured when there was more memory than now is used as far as it fits; so is the run
    that is to be repeated, also as far as there are GPUs and the tap.
    """
    planned = run = target.start
    if settings.run is not None and target.fits(settings.run):
        again = replace(
            settings.run,
            n_gpu_layers=settings.run.n_gpu_layers if planned.n_gpu_layers else 0,
            tap=settings.run.tap and planned.tap and settings.tap is not False,
        )
        return safe_run(again, target.safe)
    kept = read_record(target)
    if kept is not None:
        run = keep_asked(kept.settings, planned, settings)
        if not target.fits(run):
            run = replace(planned, repack=run.repack, accelerator=run.accelerator)
    return safe_run(run, target.safe)


def read_record(target: Target) -> Tuned | None:
    """What was measured earlier for this model, machine and build.

    What `tune` measured beside other work serves only until the machine is quiet; what a run
    learned so does not serve at all.
    """
    tuned = read_kept(record_path(target), Tuned)
    if tuned and tuned.by == "run" and tuned.load and not tuned.load.quiet:
        return None
    if tuned and tuned.load and not tuned.load.quiet and LoadMeter(target.n_cores).quiet:
        return None
    return tuned


def keep_record(tuned: Tuned, target: Target) -> None:
    """Keep it for the next time; the log says where that is not possible."""
    if not keep(record_path(target), tuned):
        _log.warning("the measurement of %s is not kept", target.path)


def to_json(tuned: Tuned) -> str:
    """The record as it is kept, and as `gguf-embed tune --json` prints it."""
    return json.dumps(asdict(tuned), indent=1)


def record_path(target: Target) -> Path:
    """One file per build, CPU, GPUs, number of cores and model file (its tensor table and size).

    How many layers are on a GPU varies with its free memory; whether all are, or some, counts.
    """
    header = target.header
    digest = hashlib.sha256(f"{header.architecture} {header.file_bytes}".encode())
    digest.update(f"{target.tier} {target.gpus}".encode())
    if target.safe.accelerator:
        digest.update(b"accelerator")
    for tensor in header.tensors:
        digest.update(f"{tensor.name} {tensor.shape} {tensor.type}".encode())
    n_cores, of_file = target.n_cores, digest.hexdigest()[:16]
    return (
        paths.home() / "tune" / f"{library.build_id()}-{tested.cpu_id()}-{n_cores}-{of_file}.json"
    )
