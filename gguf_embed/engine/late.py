"""Late chunking: a document goes through the model once, and the vector of a chunk is made of those
of its tokens there. It knows what stands before the chunk, and, where attention sees that, behind.

A mean-pooling model gives the mean over the chunk's tokens; special tokens and the prompt count for
no chunk. A last-token model gives the chunk's last token, which is not what it was trained for: it
has seen the document up to there, and no end token. With a first-token model there is no such
vector.

Tokens are found by tokenizing the pieces between the chunks' ends: where their tokens, one after
the other, are those of the document, the places are known. Where they are not (a token spans an
end), pieces are joined until they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.backend import Head
from gguf_embed.engine.prepare import n_agreeing
from gguf_embed.engine.running import Running
from gguf_embed.engine.stream import Request, no_vector, why_no_vector
from gguf_embed.engine.turns import Caller
from gguf_embed.errors import BadInput, BadOption, TextTooLong
from gguf_embed.native.model import Tokens
from gguf_embed.vectors import Pooling, Vectors, finish, unusable

Span = tuple[int, int]


def check_spans(spans: Sequence[object], n_characters: int) -> list[Span]:
    """Spans as pairs of places in a document, in any order. Raises BadInput."""
    checked: list[Span] = []
    for number, span in enumerate(spans):
        try:
            start, end = (int(place) for place in cast("Span", span))
        except (TypeError, ValueError):
            raise BadInput(f"span {number} is {span!r}; pass (start, end) in characters") from None
        if not 0 <= start < end <= n_characters:
            raise BadInput(
                f"span {number} is ({start}, {end}); it must lie within the {n_characters} "
                "characters of the document and hold one of them"
            )
        checked.append((start, end))
    return checked


def check_pooling(pooling: Pooling, name: str) -> None:
    """Refuse a model whose vectors cannot be made of a chunk's tokens. Raises BadOption."""
    if pooling not in (Pooling.MEAN, Pooling.LAST):
        raise BadOption(
            f"{name} makes a vector of a text's first token, of which a chunk within a document "
            "has none; embed the chunks alone, or take a model with pooling MEAN or LAST"
        )


def token_places(
    tokens: Tokens,
    text: str,
    places: Sequence[int],
    tokenize: Callable[[str], Tokens],
    *,
    begin: int = 0,
) -> dict[int, int]:
    """How many of a text's tokens stand before each place, in characters.

    `tokens` and what `tokenize` gives are without special tokens. A token that spans a place counts
    as after it. Blanks belong to the word after them, but not those in front of `begin`, where a
    prompt ends.
    """
    found = {0: 0, len(text): len(tokens)}
    anchor = n_anchor = 0  # a place at which tokens begin anew, and how many are before it
    for place in sorted({*places} - found.keys()):
        cut = max(len(text[:place].rstrip(" \t")), min(begin, place), anchor)
        piece = tokenize(text[anchor:cut])
        n_same = n_agreeing(piece, tokens[n_anchor:])
        if anchor and n_same < len(piece) - _LAST:  # not by the end of the piece
            anchor = n_anchor = 0
            piece = tokenize(text[:cut])
            n_same = n_agreeing(piece, tokens)
        found[place] = n_anchor + n_same
        if n_same == len(piece) and _begins_anew(tokens[n_anchor + n_same :], text[cut:], tokenize):
            anchor, n_anchor = cut, n_anchor + n_same
    return found


_AHEAD: Final = 64  # characters after a place that tell whether tokens begin anew there
_LAST: Final = 4  # tokens at the end of a piece that its cut may have changed


def _begins_anew(tokens: Tokens, text: str, tokenize: Callable[[str], Tokens]) -> bool:
    """Whether the text has these tokens also where nothing stands before it."""
    own = tokenize(text[:_AHEAD])
    return n_agreeing(own, tokens) >= max(1, len(own) - _LAST)


def span_vectors(outputs: Vectors, ranges: Sequence[Span], pooling: Pooling) -> Vectors:
    """One vector per range of tokens, shape (len(ranges), dim), not normalized."""
    if pooling is Pooling.LAST:
        return outputs[[end - 1 for _, end in ranges]]
    sums: npt.NDArray[np.float64] = np.zeros((len(outputs) + 1, outputs.shape[1]))
    np.cumsum(outputs, axis=0, dtype=np.float64, out=sums[1:])
    starts = np.array([start for start, _ in ranges])
    ends = np.array([end for _, end in ranges])
    return ((sums[ends] - sums[starts]) / (ends - starts)[:, None]).astype(np.float32)


def chunk_vectors(
    running: Running,
    document: str,
    spans: Sequence[Span],
    request: Request,
    *,
    pooling: Pooling,
    windows: bool,
) -> Vectors:
    """A vector for each span, shape (n, dim), cut and normalized as the request says.

    With `windows` a document that is too long goes through in several parts, each of whole spans.
    Raises TextTooLong, BadInput, NativeFailed.
    """
    preparer, prompt, n_ctx = running.preparer, request.prompt, request.n_ctx
    ids = preparer.ids(document, row=0, prompt=prompt)
    groups = [[*range(len(spans))]]
    places = [(0, len(document))]
    if len(ids) > n_ctx and windows:
        groups = _groups(
            spans,
            lambda start, end: len(preparer.ids(document[start:end], 0, prompt)),
            request.n_ctx,
        )
        places = [
            (min(spans[n][0] for n in group), max(spans[n][1] for n in group)) for group in groups
        ]
    rows: list[Tokens] = []
    for start, end in places:
        ids = preparer.ids(document[start:end], row=0, prompt=prompt)
        if len(ids) > n_ctx:
            raise TextTooLong([(0, len(ids))], n_ctx)
        rows.append(ids)
    caller = Caller(priority=request.priority)
    vectors = np.full((len(spans), request.dim), np.nan, np.float32)
    try:
        for done in running.scheduler.submit(caller, rows, Head.TOKENS).results():
            (row,) = done.rows
            if done.bad or len(unusable(done.vectors)):
                if request.on_error == "raise":
                    raise no_vector(0, len(rows[row]), why_no_vector(died=bool(done.died)))
                continue
            (start, end), group = places[row], groups[row]
            text = prompt + document[start:end]
            bare = preparer.without_ends(rows[row])
            shift = len(prompt) - start
            ends = [place + shift for number in group for place in spans[number]]
            before = token_places(bare, text, ends, preparer.bare, begin=len(prompt))
            ranges = [
                (before[spans[number][0] + shift], before[spans[number][1] + shift])
                for number in group
            ]
            for number, (first, last) in zip(group, ranges, strict=True):
                if first >= last:
                    raise BadInput(
                        f"span {number} {spans[number]} holds no token of its own; take whole words"
                    )
            n_before = preparer.n_before(rows[row])
            made = span_vectors(done.vectors[n_before : n_before + len(bare)], ranges, pooling)
            vectors[group] = finish(
                made, dimensions=request.dimensions, normalize=request.normalize
            )
    finally:
        running.scheduler.cancel(caller)
    return vectors


def _groups(spans: Sequence[Span], count: Callable[[int, int], int], n_ctx: int) -> list[list[int]]:
    """Spans, by number, that go through the model together: as many as fit, in their order."""
    groups: list[list[int]] = []
    for number in sorted(range(len(spans)), key=lambda number: spans[number]):
        if groups:
            group = [*groups[-1], number]
            start, end = min(spans[n][0] for n in group), max(spans[n][1] for n in group)
            if count(start, end) <= n_ctx:
                groups[-1] = group
                continue
        groups.append([number])
    return groups
