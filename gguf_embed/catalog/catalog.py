"""The known models, one `models/NAME.toml` each: which there are, and which one a name means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from gguf_embed.catalog import BUILTIN
from gguf_embed.catalog.card import ModelCard
from gguf_embed.catalog.card_file import load_card, load_cards
from gguf_embed.gguf import quants
from gguf_embed.gguf.header import Header


def models_dir() -> Path:
    """Where the cards and the built-in model are, in an installation or in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "models"
    return installed if installed.is_dir() else package.parent / "models"


def builtin_path() -> Path:
    """The GGUF that ships with this package."""
    return models_dir() / f"{BUILTIN}-Q8_0.gguf"


@cache
def cards() -> tuple[ModelCard, ...]:
    """All known models, by id; read once."""
    return load_cards(models_dir())


@cache
def _by_id(name: str) -> ModelCard:
    return load_card(models_dir() / f"{name}.toml")


def find(name: str) -> ModelCard | None:
    """The model of that id, alias, original or GGUF repository; case and ":latest" don't count."""
    plain = name.strip().lower().removesuffix(":latest")
    # One card is read in 2 ms, all of them in 50.
    return _by_id(plain) if plain == BUILTIN else by_name().get(plain)


def nearest(name: str, n: int = 3) -> tuple[str, ...]:
    """Ids of up to n models with names like this one, the likeliest first; may be none."""
    import difflib  # few names are wrong

    wanted = _plain(name)
    spellings = {_plain(spelling): card.id for spelling, card in by_name().items()}
    inside = [spelling for spelling in spellings if len(wanted) > 2 and wanted in spelling]
    close = difflib.get_close_matches(wanted, spellings, n=4 * n)
    return tuple(dict.fromkeys(spellings[spelling] for spelling in (*inside, *close)))[:n]


def by_header(header: Header) -> ModelCard | None:
    """The known model that a GGUF is a conversion of, so that its facts apply; None if unsure.

    The name in the header and the shape must both agree, and the pooling unless the file is
    silent about it. A fine-tune, a chat model or a reranker of the same shape is another model.
    """
    name = header.name
    if not name and "general.finetune" not in header.metadata:
        basename = header.metadata.get("general.basename")
        name = basename if isinstance(basename, str) else None
    if not name:
        return None
    wanted = _plain(name)
    found = [card for card in cards() if wanted in _header_names(card) and _alike(card, header)]
    return found[0] if len(found) == 1 else None


def _header_names(card: ModelCard) -> set[str]:
    return {_plain(name) for name in (card.id, card.source_repo, *card.header_names)}


def _alike(card: ModelCard, header: Header) -> bool:
    if header.architecture != card.architecture or header.pooling not in (None, card.pooling):
        return False
    if card.shape is None:
        return header.n_embd == card.dim
    # Converters may drop the unused rows that pad a vocabulary to a multiple of 64.
    padding = card.shape.n_vocab - header.n_vocab
    ours = (card.shape.n_layer, card.shape.n_embd)
    return (header.n_layer, header.n_embd) == ours and 0 <= padding < 64


_PACKAGING: Final = re.compile(rf"[\s._:-]+(gguf|hf|latest|{quants.PATTERN})$", re.IGNORECASE)


def _plain(name: str) -> str:
    """A name without owner, punctuation, case, and words that only tell how it is packaged."""
    name = name.lower().rpartition("/")[2]
    while (shorter := _PACKAGING.sub("", name)) != name:
        name = shorter
    return re.sub(r"[^a-z0-9]", "", name)


@cache
def by_name() -> Mapping[str, ModelCard]:
    """Every card by each of its names, in lower case."""
    return {name.lower(): card for card in cards() for name in card.names}
