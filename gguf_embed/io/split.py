"""A document in chunks: as long as the model's own tokens allow, cut where it reads best. Pure.

    for chunk in split(text, count_tokens=embedder.count_tokens, max_tokens=256, overlap=32):
        print(chunk.first_line, chunk.headings, chunk.text)

Every character of the document is in a chunk. A cut is, in this order, before a heading, a block of
code, a paragraph, an entry of a list, a line, a sentence, a word; inside a word only where the word
alone is too long. A chunk that could end at a stronger place does, once it is a quarter full.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from gguf_embed.errors import BadInput, BadOption

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Tokens of each text, special tokens included: `Embedder.count_tokens`.
CountTokens: TypeAlias = "Callable[[list[str]], Sequence[int] | npt.NDArray[np.int32]]"
Kind: TypeAlias = Literal["markdown", "rst", "text", "code"]

LEAST_TOKENS: Final = 16  # of a chunk, beside special tokens: a character may have several
# How good a place for a cut is. A heading of depth 6 is still stronger than a block.
_HEADING, _BLOCK, _PARAGRAPH, _ENTRY, _LINE, _SENTENCE, _WORD, _CHARACTER = (
    *(60, 45, 40, 30, 20, 10, 5),
    0,
)
_KINDS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys((".md", ".markdown", ".mdx", ".qmd"), "markdown"),
    **dict.fromkeys((".txt", ".text", ".log", "-"), "text"),
    ".rst": "rst",
}
_HASHES: Final = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.{0,199}?)[ \t]*#*[ \t]*")
_FENCE: Final = re.compile(r" {0,3}(`{3,}(?!.*`)|~{3,})")
_UNDERLINE: Final = re.compile(r"([=\-`:'\"~^_*+#<>.])\1{2,}[ \t]*")
_ENTRY_START: Final = re.compile(r"[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S")
_SENTENCE_END: Final = re.compile(
    r"(?:[.!?\u2026][\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f][\u300d\u300f\uff09]*\s*)(?=\S)"
)
_WORD_END: Final = re.compile(r"\s+(?=\S)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of a document: `document[start:end] == text`."""

    text: str
    start: int
    end: int
    first_line: int  # on which `start` is, from 1
    last_line: int  # on which the last character is
    headings: tuple[str, ...]  # those that it stands under, the outermost first
    n_tokens: int  # special tokens included
    source: str = ""  # the file


def kind_of_file(name: str) -> Kind:
    """How a file is cut, by its ending; what is no prose is code."""
    ending = name[name.rfind(".") :].lower() if "." in name else name
    return _KINDS.get(ending, "code")


def split(
    document: str,
    *,
    count_tokens: CountTokens,
    max_tokens: int,
    overlap: int = 0,
    kind: Kind = "markdown",
    source: str = "",
) -> Iterator[Chunk]:
    """The chunks of a document, in order; none has more than `max_tokens` tokens.

    A chunk begins with at most the last `overlap` tokens of the one before. Raises BadOption for
    sizes that cannot be, BadInput for a character that alone has too many tokens.
    """
    n_special = int(count_tokens([""])[0])
    budget = max_tokens - n_special
    if budget < LEAST_TOKENS:
        raise BadOption(
            f"chunks of {max_tokens} tokens: this model adds {n_special}; allow at least "
            f"{LEAST_TOKENS + n_special}"
        )
    if not 0 <= overlap <= budget // 2:
        raise BadOption(f"overlap={overlap}: give 0 to half of a chunk, {budget // 2}")
    if not document:
        return
    outline = _outlined(document, kind)
    pieces = _Pieces.of(document, outline.cuts, count_tokens, n_special, budget)
    newlines = [found.start() for found in re.finditer("\n", document)]
    path: list[tuple[int, str]] = []
    headings = iter([*outline.headings, (len(document) + 1, 0, "")])
    heading = next(headings)
    first = 0  # the first piece that no chunk has yet
    while first < len(pieces.counts):
        begin, end, n_tokens = _next_chunk(pieces, first, document, count_tokens, budget, overlap)
        start, stop = pieces.places[begin], pieces.places[end]
        text = document[start:stop]
        first_word = start + len(text) - len(text.lstrip())
        while heading[0] <= first_word:
            path = [each for each in path if each[0] < heading[1]] + [heading[1:]]
            heading = next(headings)
        yield Chunk(
            text=text,
            start=start,
            end=stop,
            first_line=bisect_left(newlines, start) + 1,
            last_line=bisect_left(newlines, stop - 1) + 1,
            headings=tuple(title for _, title in path),
            n_tokens=n_tokens,
            source=source,
        )
        first = end


@dataclass(slots=True, kw_only=True)
class _Outline:
    """Where a document may be cut, and its headings as (place, depth, title)."""

    cuts: dict[int, int] = field(default_factory=dict[int, int])  # place -> strength
    headings: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])

    def cut(self, place: int, strength: int) -> None:
        self.cuts[place] = max(strength, self.cuts.get(place, 0))

    def head(self, place: int, depth: int, title: str) -> None:
        self.cut(place, _HEADING - depth)
        self.headings.append((place, depth, title.strip()))


def _outlined(document: str, kind: Kind) -> _Outline:
    outline = _Outline()
    lines = document.split("\n")
    depths: dict[str, int] = {}  # of underlines, in the order in which they come
    fence: str | None = None
    blank_before, after_block = True, False
    place = 0
    skip = 0  # lines that belong to a heading
    prose: list[tuple[int, int]] = []  # where sentences are
    for number, line in enumerate(lines):
        stop = place + len(line) + 1
        bare = line.rstrip("\r")
        if skip:
            skip -= 1
        elif fence is not None:
            outline.cut(place, _LINE + (2 if blank_before else 0))
            mark = _FENCE.match(bare)
            if mark and mark[1].startswith(fence) and not bare[mark.end() :].strip():
                fence, after_block = None, True
        elif not bare.strip():
            pass
        elif kind == "code":
            indent = min(len(bare) - len(bare.lstrip()), 8)
            strength = (_PARAGRAPH if blank_before else _LINE + 8) - indent
            outline.cut(place, _BLOCK if blank_before and not indent else strength)
        else:
            title, n_lines = _heading(lines, number, kind, depths)
            mark = _FENCE.match(bare) if kind == "markdown" else None
            if title is not None:
                outline.head(place, *title)
                skip = n_lines - 1
            elif mark:
                fence = mark[1]
                outline.cut(place, _BLOCK)
            else:
                prose.append((place, stop))
                strength = _PARAGRAPH if blank_before else _LINE
                if strength == _LINE and _ENTRY_START.match(bare):
                    strength = _ENTRY
                outline.cut(place, _BLOCK if after_block else strength)
            after_block = False
        blank_before = not bare.strip()
        place = stop
    for start, stop in prose:
        for end in _SENTENCE_END.finditer(document, start, min(stop, len(document))):
            outline.cut(end.end(), _SENTENCE)
    outline.cuts.pop(0, None)
    return outline


def _heading(
    lines: Sequence[str], number: int, kind: Kind, depths: dict[str, int]
) -> tuple[tuple[int, str] | None, int]:
    """(depth, title) of a heading that begins on a line, and how many lines it has."""
    line = lines[number].rstrip("\r")
    if kind == "markdown" and (found := _HASHES.fullmatch(line)):
        return (len(found[1]), found[2]), 1
    if kind not in ("markdown", "rst") or len(line) > 200:
        return None, 0
    below = [each.rstrip("\r") for each in lines[number + 1 : number + 3]]
    # A title between two lines, and one over a line.
    over = kind == "rst" and _UNDERLINE.fullmatch(line) and len(below) == 2
    if over and below[0].strip() and below[1].rstrip() == line.rstrip():
        mark, title, n_lines = f"over {line[0]}", below[0], 3
    elif below and _UNDERLINE.fullmatch(below[0]) and not _UNDERLINE.fullmatch(line):
        mark, title, n_lines = below[0][0], line, 2
        too_short = len(below[0].rstrip()) < len(line.rstrip())
        above = number == 0 or not lines[number - 1].strip()
        if too_short or not above or (kind == "markdown" and mark not in "=-"):
            return None, 0
    else:
        return None, 0
    depth = "=-".index(mark) + 1 if kind == "markdown" else depths.setdefault(mark, len(depths) + 1)
    return (min(depth, 6), title), n_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """What is between places for a cut; none has more tokens than a chunk."""

    places: Sequence[int]  # one more than pieces: where each begins, and the end
    strengths: Sequence[int]  # of the places
    counts: Sequence[int]  # tokens of each piece, without special ones
    sums: Sequence[int]  # of the counts before each place

    @classmethod
    def of(
        cls,
        document: str,
        cuts: Mapping[int, int],
        count_tokens: CountTokens,
        n_special: int,
        budget: int,
    ) -> _Pieces:
        """Cut at all places, and where a piece is too long at words, then within them."""
        # What fits to the end is one chunk, but for a heading on the way.
        strengths = {0: _HEADING, **cuts, len(document): _BLOCK + 1}

        def count(places: Sequence[int]) -> list[int]:
            texts = [document[a:b] for a, b in pairwise(places)]
            return [int(n) - n_special for n in count_tokens(texts)]

        places = sorted(strengths)
        counts = dict(zip(places, count(places), strict=False))
        todo = [(a, b) for a, b in pairwise(places) if counts[a] > budget]
        for start, stop in todo:
            ends = [end.end() for end in _WORD_END.finditer(document, start, stop)]
            words = [start, *(end for end in ends if start < end < stop), stop]
            strengths |= dict.fromkeys(words[1:-1], _WORD)
            counts |= dict(zip(words, count(words), strict=False))
            long = [(a, b) for a, b in pairwise(words) if counts[a] > budget]
            while long:
                a, b = long.pop()
                middle = _between_characters(document, a, b)
                if middle is None:
                    raise BadInput(
                        f"character {a} of the document alone has {counts[a]} tokens, a chunk "
                        f"takes {budget}; allow longer ones"
                    )
                strengths[middle] = _CHARACTER
                counts |= dict(zip((a, middle), count((a, middle, b)), strict=True))
                pairs = ((a, middle), (middle, b))
                long += [each for each in pairs if counts[each[0]] > budget]
        places = sorted(strengths)
        ordered = [counts[place] for place in places[:-1]]
        return cls(
            places=places,
            strengths=[strengths[place] for place in places],
            counts=ordered,
            sums=[0, *accumulate(ordered)],
        )


def _between_characters(document: str, start: int, stop: int) -> int | None:
    """Near the middle, not before a mark that belongs to the character in front of it."""
    middle = (start + stop) // 2
    for place in (*range(middle, stop), *range(middle, start, -1)):
        after = document[place]
        joined = unicodedata.combining(after) or after in "\u200d\ufe0e\ufe0f"
        joined = joined or document[place - 1] == "\u200d"
        if start < place and not joined and document[place - 1 : place + 1] != "\r\n":
            return place
    return middle if start < middle < stop else None


def _next_chunk(
    pieces: _Pieces,
    first: int,
    document: str,
    count_tokens: CountTokens,
    budget: int,
    overlap: int,
) -> tuple[int, int, int]:
    """(first piece with the overlap, piece after the last, tokens) of the chunk from `first` on."""
    sums, places, n_pieces = pieces.sums, pieces.places, len(pieces.counts)
    earliest = bisect_left(sums, sums[first] - overlap)
    backs = [at for at in range(max(earliest, 1), first) if pieces.strengths[at] >= _WORD]
    begin = max(backs, key=lambda at: (pieces.strengths[at], -at), default=first)
    n_special = int(count_tokens([""])[0])
    while True:
        last = max(bisect_right(sums, sums[begin] + budget) - 1, first + 1)
        whole = first == 0 and last == n_pieces
        end = last if whole else _best_end(pieces, begin, first, last)
        n_tokens = int(count_tokens([document[places[begin] : places[end]]])[0])
        # Tokens of parts need not add up to those of the whole.
        excess = n_tokens - n_special - budget
        while excess > 0 and end > first + 1:
            last = min(bisect_right(sums, sums[end] - excess, first + 1) - 1, end - 1)
            last = max(last, first + 1)
            end = _best_end(pieces, begin, first, last)
            n_tokens = int(count_tokens([document[places[begin] : places[end]]])[0])
            excess = n_tokens - n_special - budget
        if excess <= 0 or begin == first:
            return begin, end, n_tokens
        begin = first  # no room beside the overlap


def _best_end(pieces: _Pieces, begin: int, first: int, last: int) -> int:
    """The strongest place up to `last` from which the chunk is a quarter full; the last of such."""
    least = pieces.sums[begin] + (pieces.sums[last] - pieces.sums[begin]) // 4
    ends = range(max(bisect_left(pieces.sums, least), first + 1), last + 1)
    return max(ends, key=lambda at: (pieces.strengths[at], at), default=last)
