"""Work that is spread over machines which may go: handed out, given back, kept in its order.

    spread = Spread(cuts, ahead=8)
    while (item := spread.next()) is not None: ...   # to whoever is free
    spread.done(index, result)                       # in any order
    spread.lost(item)                                # its machine went: somebody else's turn
    for index, result in spread.in_order(): ...      # each once

Pure: knows of no machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, Generic, Protocol, TypeVar

from gguf_embed.errors import NativeFailed

TRIES: Final = 4  # machines that one piece may cost


class Numbered(Protocol):
    """A piece of work, numbered from 0."""

    @property
    def index(self) -> int:
        """Its place."""
        ...


_Item = TypeVar("_Item", bound=Numbered)
_Result = TypeVar("_Result")


class Spread(Generic[_Item, _Result]):
    """Pieces of work and their results; holds at most `ahead` of them."""

    def __init__(self, items: Iterator[_Item], *, ahead: int) -> None:
        self._items = items
        self._again: deque[_Item] = deque()
        self._results: dict[int, _Result] = {}
        self._n_lost: dict[int, int] = {}
        self._n_given = 0  # items taken from the source
        self._n_out = 0  # results given in order
        self._at_end = False
        self.ahead = ahead

    @property
    def finished(self) -> bool:
        """Whether all results were given."""
        return self._at_end and self._n_out == self._n_given

    def next(self) -> _Item | None:
        """A piece to work on; None while there is none, or while too many results wait."""
        if self._again:
            return self._again.popleft()
        if self._at_end or self._n_given - self._n_out >= self.ahead:
            return None
        item = next(self._items, None)
        if item is None:
            self._at_end = True
            return None
        assert item.index == self._n_given, "pieces come in their order"
        self._n_given += 1
        return item

    def done(self, index: int, result: _Result) -> None:
        """A result; a second one of the same piece counts for nothing."""
        if index >= self._n_out:
            self._results.setdefault(index, result)

    def lost(self, item: _Item) -> None:
        """Who worked on it has gone. Raises NativeFailed for a piece that costs too many."""
        n = self._n_lost[item.index] = self._n_lost.get(item.index, 0) + 1
        if n >= TRIES:
            raise NativeFailed(
                f"shard {item.index}: {n} processes ended while they computed it, each on the "
                "machine that was free; look into their logs, and go on with --resume"
            )
        self._again.append(item)

    def in_order(self) -> Iterator[tuple[int, _Result]]:
        """The results whose turn it is."""
        while self._n_out in self._results:
            result = self._results.pop(self._n_out)
            self._n_out += 1
            yield self._n_out - 1, result
