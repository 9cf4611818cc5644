"""What the levels of models gave on this machine, kept from run to run.

`bench` and `tune` write it, `plan` reads it as a value. Speed belongs to a shape: weights that mean
something else, or nothing, are as fast. Quality belongs to the model that was judged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from gguf_embed.gguf.layout import Shape
from gguf_embed.machine import tested
from gguf_embed.machine.load import Load, worse
from gguf_embed.native import library
from gguf_embed.system import paths
from gguf_embed.system.kept import keep as write_kept
from gguf_embed.system.kept import read_kept
from gguf_embed.vectors import Pooling

_log = logging.getLogger(__name__)

By: TypeAlias = Literal["bench", "tune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Share of the reference's nDCG@10 that is lost, with its 95 % interval over the queries."""

    mean: float  # below 0: gained
    low: float
    high: float

    @property
    def bound(self) -> float:
        """The difference is at most so large, either way."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelQuality:
    """A level's quality beside that of `reference`, the best level that was there, on `texts`."""

    reference: str
    texts: str
    cosine: float  # mean, of each text to itself in the reference
    overlap: float  # of the ten nearest texts, share that is the reference's
    ndcg: float | None  # @10, by the qrels; None: there were none
    loss: Loss | None  # of the reference's
    as_good: bool | None  # metrics.as_good

    def __str__(self) -> str:
        if self.loss is None:
            return f"{100 * self.overlap:.0f} % of {self.reference}'s ten nearest texts"
        return f"{100 * (1 - self.loss.mean):.1f} % of {self.reference}'s nDCG@10"


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelFigures:
    """What is known of one level; None: not measured."""

    tokens_per_s: float | None = None
    n_gpu_layers: int = 0  # at that speed
    quality: LevelQuality | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """Levels of one model that were measured alike, so that their figures compare."""

    model: str  # as plan.Variant has it; "" where only speed was measured
    shape: str  # of `shape_key`
    by: By
    texts_sha256: str  # "" for the tuner's
    day: str  # UTC, as 2026-09-30
    levels: Mapping[str, LevelFigures]
    load: Load | None = None  # beside which it was measured; None: not known

    @property
    def quiet(self) -> bool:
        """Whether its speeds may be used to choose."""
        return self.load is None or self.load.quiet


def shape_key(shape: Shape, pooling: Pooling, *, causal: bool) -> str:
    """What decides the speed of a model, whatever its quantization.

    Not the vocabulary: it is looked up, and converters pad it differently.
    """
    return (
        f"{shape.architecture} {shape.n_layer}x{shape.n_embd} "
        f"heads {shape.n_head}/{shape.n_head_kv}x{shape.head_dim} ff {shape.n_ff} "
        f"{pooling.name.lower()}{'' if causal else ' bidirectional'}"
    )


def figures(known: Sequence[MeasuredRun], shape: str, model: str) -> dict[str, LevelFigures]:
    """By level, what is known of a model: the speeds of one run and the qualities of one.

    Of several the one with the most levels counts, of those the newest; figures of different
    runs are never mixed. Speeds that were measured beside other work do not count.
    """
    same = [one for one in known if one.shape == shape]
    quiet = [one for one in same if one.quiet]
    fast = _fullest(quiet, lambda one: one.tokens_per_s is not None)
    good = _fullest([one for one in same if one.model == model], lambda one: bool(one.quality))
    found = {quant: replace(one, quality=None) for quant, one in fast.items()}
    for quant, one in good.items():
        found[quant] = replace(found.get(quant, LevelFigures()), quality=one.quality)
    return found


def _fullest(
    known: Iterable[MeasuredRun], has: Callable[[LevelFigures], bool]
) -> dict[str, LevelFigures]:
    best: dict[str, LevelFigures] = {}
    for one in known:  # the newest comes last
        levels = {quant: of_one for quant, of_one in one.levels.items() if has(of_one)}
        if len(levels) >= len(best):
            best = levels
    return best


# -- kept in a file ------------------------------------------------------------------------------


KEPT = tuple[MeasuredRun, ...]  # the shape of a file


def today() -> str:
    """The day in UTC, as a run tells it."""
    return datetime.now(UTC).date().isoformat()


def load(n_cores: int) -> tuple[MeasuredRun, ...]:
    """All that was measured with this llama.cpp build, CPU and number of cores, newest last."""
    return read_kept(_file(n_cores), KEPT) or ()


def keep(new: MeasuredRun, n_cores: int) -> None:
    """Add a run to what is kept; one that it covers goes, and the tuner's of a shape grow."""
    kept: list[MeasuredRun] = []
    for old in load(n_cores):
        if old.by == new.by == "tune" and (old.shape, old.quiet) == (new.shape, new.quiet):
            levels = {**old.levels, **new.levels}
            new = replace(new, levels=levels, load=worse(old.load, new.load))
        elif not _covers(new, old):
            kept.append(old)
    if not write_kept(_file(n_cores), (*kept, new)):
        _log.warning("the measurement is not kept for `plan`")


def _covers(new: MeasuredRun, old: MeasuredRun) -> bool:
    """Whether everything that the old one knows was measured again as well, on the same texts."""
    if (new.by, new.model, new.shape) != (old.by, old.model, old.shape):
        return False
    if old.quiet and not new.quiet:
        return False
    return new.texts_sha256 == old.texts_sha256 and all(
        quant in new.levels
        and (one.tokens_per_s is None or new.levels[quant].tokens_per_s is not None)
        and (one.quality is None or new.levels[quant].quality is not None)
        for quant, one in old.levels.items()
    )


def _file(n_cores: int) -> Path:
    """One file per build, CPU, number of cores and set of GPUs."""
    gpus = sorted(d.description for d in library.devices() if d.kind in ("gpu", "igpu"))
    on_gpus = f"-{hashlib.sha256(repr(gpus).encode()).hexdigest()[:8]}" if gpus else ""
    name = f"{library.build_id()}-{tested.cpu_id()}-{n_cores}{on_gpus}.json"
    return paths.home() / "measured" / name
