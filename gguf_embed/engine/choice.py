"""From a model's name to the one file of it for a machine, and the plan to run it there.

    chosen = choose("qwen3-embedding:8b", probe(), Settings())
    chosen.plan.in_short         # "qwen3-embedding-8b Q8_0 on CPU: the best quality of 6 ..."
    path = fetch(chosen.source)  # until now nothing was fetched but headers

Offline only what is on this machine can be chosen. Online a file that is here is preferred to one
that would run no better; `Settings.quant` overrides that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.errors import BadModelFile
from gguf_embed.gguf import layout, quants
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.machine import measured
from gguf_embed.machine.machine import Machine
from gguf_embed.machine.measured import MeasuredRun
from gguf_embed.plan import plan
from gguf_embed.plan.memory import gpus_of
from gguf_embed.plan.plan import Plan
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.plan.variants import Variant, variant_of, variants_of
from gguf_embed.store import hub, names
from gguf_embed.store.local import Source

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A file of a model and the plan to run it on a machine."""

    source: Source
    # Of the file, if that is here; else as it is expected to be; None: as the catalog says.
    header: Header | None
    card: ModelCard | None
    variant: Variant
    machine: Machine
    settings: Settings
    plan: Plan

    @property
    def gpus(self) -> tuple[str, ...]:
        """What the GPUs that hold layers are, such as "NVIDIA GeForce RTX 4090"."""
        used = (gpu for gpu in gpus_of(self.machine) if gpu.name in self.plan.devices)
        return tuple(gpu.description for gpu in used)

    def fits(self, run: RunSettings) -> bool:
        """Whether the machine has the memory to run it so, beside what should stay free."""
        return plan.also_fits(self.plan, self.variant, self.machine, self.settings, run)

    def without(self, *, gpus: bool = False, flash_attn: bool = False, tap: bool = False) -> Choice:
        """The same file planned anew, where the GPUs, flash attention or the tap turned out not to
        work. Without the tap the weights are loaded, and stay where they are. Raises DoesNotFit.
        """
        machine, settings = self.machine, self.settings
        if tap:
            n_gpu_layers = self.plan.run.n_gpu_layers
            settings = replace(settings, tap=False, n_gpu_layers=n_gpu_layers)
        if flash_attn:
            settings = replace(settings, flash_attn=False)
        if gpus:
            cpus = tuple(device for device in machine.devices if device.kind == "cpu")
            machine = replace(machine, devices=cpus)
            settings = replace(settings, n_gpu_layers=None)
        made = plan.make_plan([self.variant], machine, settings)
        return replace(self, machine=machine, settings=settings, plan=made)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    source: Source
    header: Header | None
    variant: Variant


def choose(name: str | Path, machine: Machine, settings: Settings, *, mine: bool = True) -> Choice:
    """The best file of the model for the machine, here or on the Hub, and its plan.

    `name` may be "auto". `mine` is False for another machine than this one: what this one has does
    not count. Raises ModelNotFound, BadModelFile, BadOption, FetchFailed or DoesNotFit.
    """
    if name == plan.AUTO:
        return _choose_auto(machine, settings, mine=mine)
    known = _known(machine, settings, mine=mine)
    offered = names.offered(name, settings.quant, here=mine)
    sources = _in_reach(offered, mine=mine)
    offers = _offers(sources, mine=mine)
    no_other = None if settings.quant or names.quant_in(name) else _no_other(offered)
    # The name of a file may differ from what its header says.
    if settings.quant or len(offered) == 1:
        settings = replace(settings, quant=offers[0].variant.quant)
    variants = [offer.variant for offer in offers]
    card = sources[0].card
    if card is None:
        made = plan.make_plan(variants, machine, settings, known=known)
    else:
        made = plan.plan_for(card, machine, settings, known=known, offered=variants)
        if made.model != card.id:  # a smaller one, which was allowed
            smaller = choose(made.model, machine, replace(settings, allow_smaller=False), mine=mine)
            why = (made.why[0], *smaller.plan.why)
            return replace(smaller, plan=replace(smaller.plan, why=why))
    made = made.because(no_other) if no_other else made
    return _chosen(offers, made, machine, settings)


def _no_other(offered: Sequence[Source]) -> str | None:
    """Why the only file is taken, of which nobody asked for a quantization; None of several."""
    if len(offered) > 1:
        return None
    return {"package": "built in", "file": "the file that was named"}.get(
        str(offered[0].where), "the only file"
    )


def choose_file(path: Path, card: ModelCard | None, machine: Machine, settings: Settings) -> Choice:
    """A file that is here as what the caller says it is. Raises BadModelFile or DoesNotFit."""
    header = read_header(path)
    source = Source(name=str(path), card=card, file=path.name, path=path, where="file")
    offer = _Offer(source=source, header=header, variant=variant_of(header, card=card))
    return _chosen([offer], plan.make_plan([offer.variant], machine, settings), machine, settings)


def _choose_auto(machine: Machine, settings: Settings, *, mine: bool) -> Choice:
    family = plan.auto_family()
    sources = [source for card in family for source in names.offered(card.id, here=mine)]
    if settings.quant:
        settings = replace(settings, quant=quants.parse(settings.quant))
        sources = [source for source in sources if source.quant == settings.quant]
    offers = _offers(_in_reach(sources, mine=mine), mine=mine)
    by_model: dict[str, list[Variant]] = {}
    for offer in offers:
        by_model.setdefault(offer.variant.model, []).append(offer.variant)
    known = _known(machine, settings, mine=mine)
    made = plan.plan_auto(machine, settings, known=known, offered=by_model)
    return _chosen(offers, made, machine, settings)


def _known(machine: Machine, settings: Settings, *, mine: bool) -> Sequence[MeasuredRun]:
    """What was measured on this machine, which says nothing about another."""
    return measured.load(settings.n_threads or machine.usable_cores) if mine else ()


def _in_reach(sources: Sequence[Source], *, mine: bool) -> Sequence[Source]:
    """Offline: those on this machine; all, where there are none, so that what to bring is named."""
    local = [source for source in sources if source.path]
    if not local or len(local) == len(sources) or not mine:
        return sources  # the Hub's client need not be loaded to ask whether we are offline
    return local if hub.places().offline else sources


def _offers(sources: Sequence[Source], *, mine: bool) -> list[_Offer]:
    """What is known of each file, those on this machine first; a damaged one is passed over."""
    offers: list[_Offer] = []
    damaged: BadModelFile | None = None
    for source in sorted(sources, key=lambda source: source.path is None):
        try:
            offers.append(_like_another(source, offers) or _offer(source, mine=mine))
        except BadModelFile as error:
            damaged = error
            if len(sources) > 1:
                _log.warning("%s", error)
    if damaged and not offers:
        raise damaged
    return offers


def _offer(source: Source, *, mine: bool) -> _Offer:
    """By the catalog's shape where it has one and the file is not here, else by the header."""
    card = source.card
    file = next((f for f in card.files if f.name == source.file), None) if card else None
    if source.path is None and card and file and _laid_out(card):
        variant = next(v for v in variants_of(card) if v.quant == file.quant)
        return _Offer(source=source, header=None, variant=variant)
    header = read_header(source.path) if source.path else hub.remote_header(source)
    variant = variant_of(header, card=card or catalog.by_header(header), file=file)
    variant = replace(variant, on_disk=mine and source.path is not None)
    return _Offer(source=source, header=header, variant=variant)


def _like_another(source: Source, offers: Sequence[_Offer]) -> _Offer | None:
    """The offer of a file that is an earlier one of its repository in another quantization.

    Headers are megabytes, of vocabulary for the most part, and a repository has a dozen files.
    """
    for offer in offers:
        header, n_bytes = offer.header, source.n_bytes or 0
        near = source.repo and (source.repo, source.card) == (offer.source.repo, offer.source.card)
        if (
            source.path
            or source.card
            or not near
            or not header
            or source.quant not in layout.QUANTS
        ):
            continue
        if header.architecture not in layout.ARCHITECTURES:
            continue
        tensors = tuple(layout.tensors(offer.variant.shape, source.quant))
        expected = header.header_bytes + sum(tensor.n_bytes for tensor in tensors)
        if abs(expected - n_bytes) * 100 <= n_bytes:  # else it is something else
            like = replace(header, tensors=tensors)
            variant = replace(variant_of(like), quant=source.quant)
            return _Offer(source=source, header=like, variant=variant)
    return None


def _laid_out(card: ModelCard) -> bool:
    return card.shape is not None and card.architecture in layout.ARCHITECTURES


def _chosen(offers: Sequence[_Offer], made: Plan, machine: Machine, settings: Settings) -> Choice:
    asked = (made.model, made.quant)
    offer = next(o for o in offers if (o.variant.model, o.variant.quant) == asked)
    card = offer.source.card or (catalog.by_header(offer.header) if offer.header else None)
    return Choice(
        source=offer.source,
        header=offer.header,
        card=card,
        variant=offer.variant.as_asked(settings),
        machine=machine,
        settings=settings,
        plan=made,
    )
