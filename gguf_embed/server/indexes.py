"""The indexes that a server searches: each by its name, with the model that its questions need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from gguf_embed.errors import BadOption, shown
from gguf_embed.index.facts import IndexFacts
from gguf_embed.index.index import Index
from gguf_embed.index.places import place_of
from gguf_embed.server.failures import Kind, Refused
from gguf_embed.server.offers import Offer, offer_of
from gguf_embed.system.closing import Closes


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOffer:
    """An index that may be searched."""

    name: str  # as requests name it
    place: str  # as `Index.open` takes it
    model: str  # of the offers, which embeds its questions


def index_name(place: str) -> str:
    """What an index is called: its name, or that of its folder."""
    return place_of(place).name.removesuffix(".index")


def offer_for(facts: IndexFacts) -> Offer:
    """The model whose vectors an index holds."""
    space = facts.space
    if space.model.lower().endswith(".gguf"):  # a file has its own quantization
        return offer_of(space.model)
    offer = offer_of(space.model)
    id_ = offer.card.id if offer.card else offer.id.removesuffix(f":{space.quant}")
    name = f"{id_}:{space.quant}"
    return replace(offer, id=name, names=frozenset({name.lower()}), quant=space.quant)


class Indexes(Closes):
    """Those of one server. Safe to use from several threads."""

    def __init__(self, indexes: Mapping[str, tuple[IndexOffer, Index]]) -> None:
        """Use `Indexes.open`; they become this object's to close."""
        self._indexes = dict(indexes)

    @classmethod
    def open(
        cls, offers: Iterable[IndexOffer], open_index: Callable[[str], Index] = Index.open
    ) -> Indexes:
        """All of them. Raises BadInput for one that is not there, BadOption for a name twice."""
        indexes: dict[str, tuple[IndexOffer, Index]] = {}
        with ExitStack() as stack:
            for offer in offers:
                if offer.name in indexes:
                    raise BadOption(
                        f"--index {offer.place}: another index is called {offer.name}, too; serve "
                        "one of them, or rename its folder"
                    )
                indexes[offer.name] = offer, stack.enter_context(open_index(offer.place))
            stack.pop_all()
        return cls(indexes)

    def all(self) -> tuple[tuple[IndexOffer, Index], ...]:
        """The first that was named is the default."""
        return tuple(self._indexes.values())

    def find(self, name: str | None) -> tuple[IndexOffer, Index]:
        """The index of that name; None: the first. Raises Refused."""
        if not self._indexes:
            raise Refused(
                Kind.NO_INDEX, "no index is served here; start the server with --index NAME"
            )
        if name is None:
            return next(iter(self._indexes.values()))
        if name not in self._indexes:
            known = ", ".join(self._indexes)
            raise Refused(
                Kind.NO_INDEX, f"index {shown(name)} is not served here; there are: {known}"
            )
        return self._indexes[name]

    def close(self) -> None:
        """Let go of their files."""
        for _, index in self._indexes.values():
            index.close()
