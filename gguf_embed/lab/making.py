"""A level that nobody offers and that is fast on this CPU: made here, of a file that lost nothing.

    wanted = level_to_make(card, probe(), Settings())     # None where an offered one is as fast
    made = make_level(card, wanted, at=places)            # in our store, verified by its canaries

The F16 is fetched once, and may go afterwards. Where its repository publishes an importance matrix
the level is made with it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine.fetching import announced
from gguf_embed.errors import BadOption, GgufEmbedError
from gguf_embed.gguf import layout, quants
from gguf_embed.lab import forecast, quantize
from gguf_embed.lab.quantize import Made
from gguf_embed.machine.machine import Machine
from gguf_embed.plan import plan, speed
from gguf_embed.plan.settings import Settings
from gguf_embed.plan.variants import variants_of
from gguf_embed.store import download, hub, local, removal
from gguf_embed.store.local import Places, Source

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelMade:
    """A level in our store, and what was done for it."""

    source: Source
    made: Made
    with_imatrix: bool
    dropped: Source | None  # what it was made of, where that was removed


def level_to_make(card: ModelCard, machine: Machine, settings: Settings) -> tuple[str | None, str]:
    """The level to make and why; None where a file that is offered is as fast here.

    Raises BadOption for a model whose levels are not known, DoesNotFit.
    """
    if card.shape is None or card.architecture not in layout.ARCHITECTURES:
        raise BadOption(f"{card.id}: the speed of its levels is not known; name one with --quant")
    offered = variants_of(card)
    names = [variant.quant for variant in offered]
    if settings.quant is not None:
        level = quants.parse(settings.quant)
        return (None, f"{level} is offered") if level in names else (level, "asked for")
    usual = [v for v in variants_of(card, any_quant=True) if v.quant in quants.USUAL]
    theirs = plan.make_plan(offered, machine, settings).chosen
    best = plan.make_plan(usual, machine, settings).chosen
    known, fastest = theirs.tokens_per_s, best.tokens_per_s
    if best.tier != "cpu" or known is None or fastest is None or known >= speed.NEAR * fastest:
        return None, f"{theirs.quant} is offered, and no other is known to be faster here"
    return best.quant, (
        f"about {speed.in_words(fastest)}, with {theirs.quant}, the fastest that is offered, about "
        f"{speed.in_words(known)}"
    )


def make_level(
    card: ModelCard,
    level: str,
    *,
    at: Places | None = None,
    drop_source: bool = False,
    accept_licence: bool = False,
    on_status: Callable[[str], None],
    on_download: download.OnDownload | None = None,
) -> LevelMade:
    """Fetch what has lost nothing, quantize it, keep the result as a file of that model.

    It is verified before it is kept. `drop_source` removes what was fetched for it. Raises what
    fetching and quantizing raise.
    """
    at = at or hub.places()
    exact = forecast.find_source(card.id)
    was_here = exact.path is not None
    moved = announced(exact, None, at, on_status=on_status, on_download=on_download)
    path = download.fetch(exact, progress=moved, accept_licence=accept_licence, at=at)
    imatrix = _imatrix(exact, at)
    recipe = forecast.Recipe(level=level, imatrix=imatrix)
    at.store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=at.store, prefix=".making-") as scratch:
        target = Path(scratch) / f"{card.id}-{level}.gguf"
        on_status(f"quantizing {exact.label} to {level}")
        made = quantize.make(forecast.forecast(path, recipe), target)
        source = local.install(
            target,
            Source(
                name=card.id,
                quant=level,
                card=card,
                revision="",
                file=target.name,
                sha256=local.file_sha256(target),
            ),
            at,
        )
    dropped = None
    if drop_source and not was_here:
        dropped = local.located(exact, at)
        for each in removal.owned([dropped], at):
            removal.remove(each, at)
    return LevelMade(
        source=source,
        made=replace(made, path=source.path or made.path),
        with_imatrix=imatrix is not None,
        dropped=dropped,
    )


def _imatrix(exact: Source, at: Places) -> Path | None:
    """The importance matrix beside the file on the Hub, fetched; None where there is none."""
    if exact.repo is None or at.offline:
        return None
    with suppress(GgufEmbedError):  # without it a level of Q4_K_M or more is made as well
        found = hub.imatrix_of(exact, at)
        return download.fetch(found, accept_licence=True, at=at) if found else None
    return None
