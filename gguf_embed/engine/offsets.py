"""Which part of a text each token stands for, found by how the vocabulary spells them. Pure.

A tokenizer may change a text before it cuts it (case, accents, kinds of blanks), so the text is
changed a character at a time, and each byte that comes out remembers where it is from.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, TypeAlias

from gguf_embed.engine.bert_text import WORD, bert_normalize
from gguf_embed.engine.spelling import Spelling

Place: TypeAlias = "tuple[int, int]"  # first and last + 1, in the bytes of the text as UTF-8

_AHEAD: Final = 1000  # bytes in which a token is looked for, after one that is not in the text
_CLUSTER: Final = re.compile(r"(?s).[\u0300-\u036f\u3099\u309a]*")  # a character and its marks


def token_places(text: str, tokens: Sequence[int], spelling: Spelling) -> list[Place | None]:
    """The place of each token; None for special ones, and where the text does not tell.

    A token that is part of a character has the place of the whole character. A blank in front of a
    word is the word's where the vocabulary has it so.
    """
    places: list[Place | None] = [None] * len(tokens)
    ordinary = [row for row, token in enumerate(tokens) if spelling.is_text(token)]
    match spelling.kind:
        case "bert":
            pieces = [spelling.text(tokens[row]) for row in ordinary]
            found = _in_words(text, pieces, spelling.text(spelling.unknown or 0))
        case "t5":
            raw = [spelling.raw(tokens[row]).replace(b" ", b"") for row in ordinary]
            found = _in_bytes(_changed(text, _without_blanks, _CLUSTER), raw)
        case _:
            raw = [spelling.raw(tokens[row]) for row in ordinary]
            found = _in_bytes(_changed(text, str, re.compile("(?s).")), raw)
    for row, place in zip(ordinary, found, strict=True):
        places[row] = place
    return places


@dataclass(slots=True)
class _Changed:
    """A text as the tokenizer cuts it, and where each of its bytes is from."""

    text: str
    raw: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list[int])
    stops: list[int] = field(default_factory=list[int])

    def place(self, start: int, stop: int) -> Place:
        """Of some bytes."""
        return self.starts[start], self.stops[stop - 1]


def _parts(
    text: str, change: Callable[[str], str], unit: re.Pattern[str]
) -> Iterator[tuple[str, int, int]]:
    """What becomes of each unit of a text, and its place."""
    known: dict[str, tuple[str, int]] = {}
    start = 0
    for match in unit.finditer(text):
        part = match[0]
        if part not in known:
            known[part] = change(part), len(part.encode(errors="replace"))
        made, n_bytes = known[part]
        yield made, start, start + n_bytes
        start += n_bytes


def _changed(text: str, change: Callable[[str], str], unit: re.Pattern[str]) -> _Changed:
    changed = _Changed(text)
    for made, start, stop in _parts(text, change, unit):
        raw = made.encode(errors="replace")
        changed.raw += raw
        changed.starts += [start] * len(raw)
        changed.stops += [stop] * len(raw)
    return changed


def _without_blanks(part: str) -> str:
    return "".join(unicodedata.normalize("NFKC", part).split())


def _in_bytes(changed: _Changed, pieces: Sequence[bytes]) -> list[Place | None]:
    """Tokens one after the other; what is not in the text fills the gap between its neighbours."""
    raw = bytes(changed.raw)
    places: list[Place | None] = []
    lost: list[int] = []
    at = 0
    for row, given in enumerate(pieces):
        piece = given
        if not row and piece.startswith(b" ") and not raw.startswith(piece):
            piece = piece[1:]  # a blank that the tokenizer puts in front of every text
        begin = raw.find(piece, at, at + len(piece) + (_AHEAD if lost else 0))
        if not piece:  # a blank alone, which some vocabularies have: the next character's
            places.append(changed.place(at, at + 1) if at < len(raw) else None)
        elif begin < 0:
            places.append(None)
            lost.append(row)
        else:
            _fill(changed, places, lost, at, begin)
            at = begin + len(piece)
            places.append(changed.place(begin, at))
    _fill(changed, places, lost, at, len(raw))
    return places


def _fill(
    changed: _Changed, places: list[Place | None], lost: list[int], start: int, stop: int
) -> None:
    """Give what is between two places to the tokens that were lost there: a word to each."""
    if lost and start < stop:
        first, last = changed.place(start, stop)
        gap = changed.text.encode(errors="replace")[first:last]
        words = [match.span() for match in re.finditer(rb"\S+", gap)]
        if len(words) == len(lost):
            for row, (begin, end) in zip(lost, words, strict=True):
                places[row] = first + begin, first + end
        elif len(lost) == 1:
            places[lost[0]] = first, last
    lost.clear()


def _in_words(text: str, pieces: Sequence[str], unknown: str) -> list[Place | None]:
    """Of WordPiece: a token that does not begin a word goes on with the one before it."""
    normal = [
        (char, start, stop)
        for made, start, stop in _parts(text, bert_normalize, re.compile("(?s)."))
        for char in made
    ]
    words = [match.span() for match in WORD.finditer("".join(char for char, _, _ in normal))]
    begins = [
        row
        for row, piece in enumerate(pieces)
        if piece.startswith(Spelling.BLANK) or piece == unknown
    ]
    if len(begins) != len(words) or begins[:1] not in ([], [0]):
        return [None] * len(pieces)
    places: list[Place | None] = []
    for _, rows in groupby(range(len(pieces)), lambda row: bisect_left(begins, row + 1)):
        parts = [pieces[row].removeprefix(Spelling.BLANK) for row in rows]
        first, last = words[bisect_left(begins, len(places) + 1) - 1]
        at = first
        for part in parts:
            if sum(map(len, parts)) != last - first:  # an unknown word, or spelled another way
                places.append((normal[first][1], normal[last - 1][2]))
                continue
            places.append((normal[at][1], normal[at + len(part) - 1][2]))
            at += len(part)
    return places
