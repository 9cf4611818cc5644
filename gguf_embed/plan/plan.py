"""Which file of a model to run, where and how: `(variants, Machine, Settings) -> Plan`.

Nothing is opened or asked here: what was measured on the machine comes in as a value. The policy,
in the order in which it decides:

1. All layers on GPUs come before some of them, and those before none: a better quantization does
   not make up for it.
2. What leaves the margin free comes before what is tight. Tight plans have small microbatches.
3. Nothing below Q4_K_M is taken unless the user names it, or it is all that is on this machine.
4. Files that are on this machine come before those to be fetched.
5. Of those left, the table in rules.py takes one: on a GPU the best quality, on a CPU the fastest
   of those that are as good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard, ModelFile
from gguf_embed.errors import BadOption
from gguf_embed.gguf import quants
from gguf_embed.machine import measured
from gguf_embed.machine.machine import Machine
from gguf_embed.machine.measured import MeasuredRun
from gguf_embed.plan import reasons, rules, speed
from gguf_embed.plan.candidate import Candidate, Fit, Misfit, Tier
from gguf_embed.plan.fitter import TIGHT_SHARE, Fitter
from gguf_embed.plan.memory import HOST, Memory, gpus_of, places_of_layers
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.plan.variants import Variant, variants_of

AUTO: Final = "auto"
AUTO_FAMILY: Final = "qwen3-embedding"
SMALL_MODEL: Final = 1_000_000_000  # parameters; `auto` takes none larger without a GPU
_TIERS: Final[tuple[Tier, ...]] = ("gpu", "split", "cpu")  # the best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run and how, with every choice's reason."""

    model: str
    quant: str
    reason: str  # for the quantization
    file: ModelFile | None
    tier: Tier
    fit: Fit  # "fits" or "tight"
    devices: tuple[str, ...]  # that hold layers; "CPU" last
    run: RunSettings
    memory: Mapping[str, Memory]
    considered: tuple[Candidate, ...]
    why: tuple[str, ...]
    suggestion: str | None = None  # a smaller model that would run better

    @property
    def rank(self) -> tuple[int, int]:
        """Larger is better: layers on GPUs first, then free memory, then the quality."""
        place = 2 * -_TIERS.index(self.tier) + (self.fit == "fits")
        return place, -quants.rank(self.quant)

    @property
    def chosen(self) -> Candidate:
        """Its row in `considered`."""
        asked = (self.quant, self.tier)
        return next(row for row in self.considered if (row.quant, row.tier) == asked)

    @property
    def in_short(self) -> str:
        """ "qwen3-embedding-8b Q8_0 on CPU: asked for; leaves 9,260 MiB of RAM free; ..." """
        slow = ""
        if speed.is_slow(self.chosen.tokens_per_s):
            slow = f"; slow here: about {speed.in_words(self.chosen.tokens_per_s or 0.0)}"
            slow += f"; faster: {self.suggestion}" if self.suggestion else ""
        return (
            f"{self.model} {self.quant} on {self.chosen.where}: {self.reason}; "
            f"{self.chosen.reason}; texts of up to {self.run.n_ctx:,} tokens{slow}"
        )

    def because(self, reason: str) -> Plan:
        """The same plan with another reason for its quantization."""
        was, is_now = (f"quant {self.quant}: {each}" for each in (self.reason, reason))
        why = tuple(line.replace(was, is_now, 1) for line in self.why)
        return replace(self, reason=reason, why=why)


def make_plan(
    variants: Sequence[Variant],
    machine: Machine,
    settings: Settings | None = None,
    *,
    known: Sequence[MeasuredRun] = (),
) -> Plan:
    """The best of a model's variants for a machine of which `known` was measured.

    Raises DoesNotFit, BadOption.
    """
    settings = settings or Settings()
    best = _best(variants, machine, settings, known)
    if isinstance(best, Plan):
        return best
    raise reasons.does_not_fit(best, machine, settings, None)


def plan_for(
    card: ModelCard,
    machine: Machine,
    settings: Settings | None = None,
    *,
    known: Sequence[MeasuredRun] = (),
    any_quant: bool = False,
    offered: Sequence[Variant] = (),
) -> Plan:
    """The plan for a known model; suggests, or with `allow_smaller` takes, a smaller one of its
    family where it would be cramped.

    `known` is what was measured on this machine (measured.load), of any model; `offered` is what
    to choose from instead of the catalog's files. Raises DoesNotFit, BadOption.
    """
    settings = settings or Settings()
    offered = offered or variants_of(card, any_quant=any_quant)
    best = _best(offered, machine, settings, known)
    if isinstance(best, Plan) and _runs_well(best, machine):
        return best
    smaller = _first_that_runs_well(_smaller(card), machine, settings, known, any_quant=any_quant)
    if smaller is not None and settings.allow_smaller:
        row = best.chosen if isinstance(best, Plan) else best.nearest
        problem = reasons.in_words(row)
        if isinstance(best, Plan) and speed.is_slow(row.tokens_per_s):
            problem = f"is slow here, about {speed.in_words(row.tokens_per_s or 0.0)}"
        return replace(smaller, why=(f"{smaller.model}: {card.id} {problem}", *smaller.why))
    hint = f"{smaller.model} ({reasons.in_words(smaller.chosen)})" if smaller else None
    if smaller and isinstance(best, Plan) and speed.is_slow(best.chosen.tokens_per_s):
        rate = smaller.chosen.tokens_per_s
        said = f", about {speed.in_words(rate)}" if rate else ""
        hint = f"{smaller.model} ({smaller.quant} on {smaller.chosen.where}{said})"
    if isinstance(best, Plan):
        return replace(best, suggestion=hint)
    raise reasons.does_not_fit(best, machine, settings, hint)


def auto_family() -> list[ModelCard]:
    """What `auto` can mean, the largest first."""
    family = [card for card in catalog.cards() if card.family == AUTO_FAMILY]
    return sorted((card for card in family if card.kind == "embedder"), key=_size, reverse=True)


def plan_auto(
    machine: Machine,
    settings: Settings | None = None,
    *,
    known: Sequence[MeasuredRun] = (),
    offered: Mapping[str, Sequence[Variant]] | None = None,
) -> Plan:
    """The best Qwen3-Embedding that the machine runs well: all of it on GPUs, or a small one.

    `offered` are the files to choose from, by the id of the card; by default all of the
    catalog's. Raises DoesNotFit where not even the smallest fits.
    """
    settings = settings or Settings()
    if offered is None:
        offered = {card.id: variants_of(card) for card in auto_family()}
    family = [card for card in auto_family() if offered.get(card.id)]
    why: list[str] = []
    for card in family:
        last = card is family[-1]
        best = _best(offered[card.id], machine, settings, known)
        if not isinstance(best, Plan):
            if last:
                builtin = f"{catalog.BUILTIN}, the built-in model"
                raise reasons.does_not_fit(best, machine, settings, builtin)
            why.append(f"not {card.id}: {reasons.in_words(best.nearest)}")
            continue
        well = _well_placed(best, machine)
        fast = best.tier == "gpu" or _size(card) <= SMALL_MODEL
        if (well and fast) or last:
            reason = "the best of its family that runs well here" if well else "the smallest"
            return replace(best, why=(f"{card.id}: {reason}", *why, *best.why))
        slow = f"{_size(card) / 1e9:.1f} billion parameters are slow without a GPU"
        why.append(f"not {card.id}: {slow if well else reasons.in_words(best.chosen)}")
    asked = f" as {settings.quant}" if settings.quant else ""
    raise BadOption(f"no {AUTO_FAMILY} is offered{asked}; see gguf-embed models")


def also_fits(
    plan: Plan, variant: Variant, machine: Machine, settings: Settings, run: RunSettings
) -> bool:
    """Whether another run than the planned one leaves as much memory free as the plan promises.

    For settings that were measured to be fast and need not fit. A tight plan is not exceeded.
    """
    tight, planned = plan.fit == "tight", plan.run
    run = replace(run, max_batch_tokens=max(run.max_batch_tokens, run.batch_tokens))
    larger = run.max_batch_tokens > planned.max_batch_tokens or run.n_contexts > planned.n_contexts
    share = TIGHT_SHARE if tight else 1
    fitter = Fitter(machine, settings, {})
    return not (tight and larger) and fitter.spare_bytes(variant, run, share) >= 0


# -- the decision --------------------------------------------------------------------------------


def _best(
    variants: Sequence[Variant], machine: Machine, settings: Settings, known: Sequence[MeasuredRun]
) -> Plan | Misfit:
    offered = _offered(variants, settings)
    acceptable = _acceptable(offered, settings)
    if settings.n_threads:
        machine = replace(machine, usable_cores=settings.n_threads)
    any_one = next(iter(offered.values()))
    mode = any_one.mode
    shape = measured.shape_key(any_one.shape, mode.pooling, causal=mode.causal)
    fitter = Fitter(machine, settings, measured.figures(known, shape, any_one.model))
    rows: list[Candidate] = []
    for tier in _tiers(machine, settings, any_one):
        in_tier = {quant: fitter.candidate(variant, tier) for quant, variant in offered.items()}
        rows += in_tier.values()
        for fit in ("fits", "tight"):
            rivals = [in_tier[quant] for quant in acceptable if in_tier[quant].fit == fit]
            if rivals:
                chosen, reason = _pick(rivals, offered, settings)
                return _plan(offered[chosen.quant], chosen, reason, rows, fitter)
    return Misfit(
        model=variants[0].model,
        nearest=min(
            (row for row in rows if row.quant in acceptable),
            key=lambda row: row.needed_bytes - row.free_bytes,
        ),
        lower=next((row.quant for row in rows if row.fits), None),
    )


def _pick(
    rivals: Sequence[Candidate], offered: Mapping[str, Variant], settings: Settings
) -> tuple[Candidate, str]:
    """By the rules, of those that are on this machine, if any are."""
    on_disk = [row for row in rivals if offered[row.quant].on_disk]
    small = next(iter(offered.values())).shape.n_embd < quants.SPEED_FLOOR_DIM
    floor = quants.SPEED_FLOOR_SMALL if small else quants.SPEED_FLOOR
    if settings.prefer != "quality":
        floor = quants.SPEED_FLOOR
    chosen, reason = rules.pick(on_disk or rivals, settings, floor)
    if on_disk and len(on_disk) < len(rivals):
        others = " ".join(row.quant for row in rivals if row not in on_disk)
        reason = f"it is here; --quant fetches another that would run too: {others}"
    return chosen, reason


def _offered(variants: Sequence[Variant], settings: Settings) -> dict[str, Variant]:
    """Those that were asked for by quantization, best quality first."""
    if not variants:
        raise BadOption("no file of this model is known; pass the path of a GGUF")
    longest = variants[0].shape.n_ctx_train
    if settings.n_ctx and settings.n_ctx > longest:
        raise BadOption(
            f"n_ctx={settings.n_ctx}: {variants[0].model} was trained on {longest} tokens"
        )
    offered: dict[str, Variant] = {}
    for variant in sorted(variants, key=lambda v: quants.rank(v.quant)):
        offered.setdefault(variant.quant, variant.as_asked(settings))
    if settings.quant is None:
        return offered
    quant = quants.parse(settings.quant)
    if quant not in offered:
        raise BadOption(
            f"{variants[0].model} is not offered as {quant}; choose {', '.join(offered)}"
        )
    return {quant: offered[quant]}


def _acceptable(offered: Mapping[str, Variant], settings: Settings) -> list[str]:
    """Quantizations from Q4_K_M up, and those on this machine: somebody asked for them once.

    All, where the user named one or there are no better ones.
    """
    good = [
        quant
        for quant, variant in offered.items()
        if variant.on_disk or quants.rank(quant) <= quants.rank(quants.FLOOR)
    ]
    return list(offered) if settings.quant or not good else good


def _tiers(machine: Machine, settings: Settings, variant: Variant) -> tuple[Tier, ...]:
    """Where to try, the best first."""
    asked = settings.n_gpu_layers
    if not gpus_of(machine):
        if asked:
            raise BadOption(
                f"n_gpu_layers={asked}: llama.cpp has no GPU here (backends: "
                f"{', '.join(machine.backends)}); leave the option out, or see gguf-embed probe"
            )
        return ("cpu",)
    if asked is None:
        return _TIERS
    if asked == 0:
        return ("cpu",)
    return ("gpu",) if asked < 0 or asked > variant.shape.n_layer else ("split",)


def _plan(
    variant: Variant, chosen: Candidate, reason: str, rows: Sequence[Candidate], fitter: Fitter
) -> Plan:
    machine, settings = fitter.machine, fitter.settings
    gpus = gpus_of(machine)
    used = set(places_of_layers(variant.shape.n_layer, chosen.run.n_gpu_layers, gpus))
    return Plan(
        model=variant.model,
        quant=variant.quant,
        reason=reason,
        file=variant.file,
        tier=chosen.tier,
        fit=chosen.fit,
        devices=tuple(name for name in (*(gpu.name for gpu in gpus), HOST) if name in used),
        run=chosen.run,
        memory=chosen.memory,
        considered=tuple(rows),
        why=reasons.of_plan(variant, chosen, reason, machine, settings),
    )


# -- smaller models ------------------------------------------------------------------------------


def _size(card: ModelCard) -> int:
    return card.parameters or 0


def _smaller(card: ModelCard) -> list[ModelCard]:
    """Smaller models of the same family, the largest first."""
    if card.family is None:
        return []
    same = [c for c in catalog.cards() if c.family == card.family and c.kind == card.kind]
    return sorted((c for c in same if _size(c) < _size(card)), key=_size, reverse=True)


def _runs_well(plan: Plan, machine: Machine) -> bool:
    """In a good place, and not slowly."""
    return _well_placed(plan, machine) and not speed.is_slow(plan.chosen.tokens_per_s)


def _well_placed(plan: Plan, machine: Machine) -> bool:
    """With memory to spare, and on the GPU where there is one."""
    return plan.fit == "fits" and (plan.tier == "gpu" or not gpus_of(machine))


def _first_that_runs_well(
    cards: Iterable[ModelCard],
    machine: Machine,
    settings: Settings,
    known: Sequence[MeasuredRun],
    *,
    any_quant: bool,
) -> Plan | None:
    for card in cards:
        try:
            best = _best(variants_of(card, any_quant=any_quant), machine, settings, known)
        except BadOption:  # it has no file in the quantization asked for, or a shorter context
            continue
        if isinstance(best, Plan) and _runs_well(best, machine):
            return best
    return None
