"""Which models a server has by which names. No request can name a path or fetch a file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.errors import GgufEmbedError, ModelNotFound, shown
from gguf_embed.gguf.header import read_header
from gguf_embed.plan.mode import is_reranker
from gguf_embed.store import hub, local, names
from gguf_embed.store.local import Source
from gguf_embed.system.files import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that may be asked for."""

    id: str  # as lists name it
    names: frozenset[str]  # as requests may name it, see `plain`
    model: str | Path  # as `Embedder.open` takes it
    quant: str | None = None
    card: ModelCard | None = None
    source: Source | None = None  # where its file is here, as far as that is known
    is_reranker: bool = False  # it gives scores, not vectors


def plain(name: str) -> str:
    """A name without what does not count: case, and Ollama's ":latest"."""
    return name.strip().lower().removesuffix(":latest")


def offer_of(name: str | Path) -> Offer:
    """What the person who starts the server names: also a path, or "auto".

    Only of what the catalog knows it tells whether that is a reranker.
    """
    text = str(name)
    quant = names.quant_in(name)
    card = catalog.find(text.removesuffix(f":{quant}")) if isinstance(name, str) else None
    if card is not None:
        known = {plain(each) for each in (*card.names, text)}
        id_ = f"{card.id}:{quant}" if quant else card.id
        return Offer(
            id=id_,
            names=frozenset(known),
            model=text,
            card=card,
            is_reranker=is_reranker(card, None),
        )
    path = Path(text)
    if text.lower().endswith(".gguf"):
        known = {plain(path.stem), plain(path.name)}
        return Offer(id=printable(Path(path.stem)), names=frozenset(known), model=name)
    return Offer(id=text, names=frozenset({plain(text)}), model=name)


def offers_here() -> tuple[Offer, ...]:
    """Every model with a file on this machine; of several quantizations the best."""
    best: dict[str, Offer] = {}
    for source in local.best_first(local.local_models(hub.places())):
        offer = _of_source(source)
        best.setdefault(plain(offer.id), offer)
    return tuple(sorted(best.values(), key=lambda offer: offer.id))


def _of_source(source: Source) -> Offer:
    known = {plain(source.name)}
    if source.card is None:
        return Offer(
            id=source.name,
            names=frozenset(known),
            model=source.path or source.name,
            source=source,
            is_reranker=source.path is not None and _file_reranks(source.path),
        )
    known |= {plain(name) for name in source.card.names}
    return Offer(
        id=source.card.id,
        names=frozenset(known),
        # By its path where nothing tells the file apart: a name could mean one to be fetched.
        model=source.card.id if source.quant else source.path or source.card.id,
        quant=source.quant,
        card=source.card,
        source=source,
        is_reranker=is_reranker(source.card, None),
    )


def _file_reranks(path: Path) -> bool:
    try:
        state = path.stat()
    except OSError:
        return False
    return _header_reranks(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _header_reranks(path: Path, n_bytes: int, changed_at: int) -> bool:
    """Of a file as it was at that time."""
    try:
        return is_reranker(None, read_header(path))
    except (GgufEmbedError, OSError):
        return False  # to open it says why


class Offers:
    """The models of one server. Safe to use from several threads."""

    def __init__(
        self,
        named: Sequence[Offer],
        *,
        here: Callable[[], Sequence[Offer]] | None = None,
    ) -> None:
        """Those that were named when it was started; with `here` others that are found there."""
        self._named = tuple(named)
        self._here = here
        self._lock = threading.Lock()
        self._found: Sequence[Offer] = ()

    @property
    def default(self) -> Offer:
        """The first that was named."""
        return self._named[0]

    def default_for(self, *, scores: bool) -> Offer:
        """For requests that name none: the first that can do it, else the first of all."""
        able = (offer for offer in self.all() if offer.is_reranker is scores)
        return next(able, self.default)

    @property
    def rerankers(self) -> tuple[Offer, ...]:
        """Those that give scores."""
        return tuple(offer for offer in self.all() if offer.is_reranker)

    def find(self, name: str | None) -> Offer:
        """The model of that name. Raises ModelNotFound, which names those that there are."""
        if name is None:
            return self.default
        wanted = plain(name)
        for offer in (*self._named, *self._found):
            if wanted in offer.names:
                return offer
        for offer in self.refreshed():  # it may have come since
            if wanted in offer.names:
                return offer
        known = ", ".join(offer.id for offer in self.all())
        raise ModelNotFound(f"model {shown(name)} is not served here; there are: {known}")

    def all(self) -> tuple[Offer, ...]:
        """The default first."""
        ids = {offer.id for offer in self._named}
        return (*self._named, *(offer for offer in self._found if offer.id not in ids))

    def refreshed(self) -> tuple[Offer, ...]:
        """The same, after a new look at the machine."""
        if self._here is not None:
            with self._lock:
                self._found = tuple(self._here())
        return self.all()
