"""Texts that are embedded as one unit: always in the same microbatches, whatever went before.

    unit = begin(embedder, texts, options, cache=cache)   # tokenized; nothing is computed yet
    unit.submit()
    encoded = unit.result()                               # or unit.cancel()

Vectors of quantized weights depend, in their last bits, on the texts beside them. A unit is alone
in the engine, so that the same texts give the same bits again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.options import Block, EncodeOptions, FailedRow, OnProgress
from gguf_embed.errors import BadText, TextTooLong, counted
from gguf_embed.jobs.cache import VectorCache
from gguf_embed.jobs.cached import Entry, Known, Space, space_of
from gguf_embed.vectors import Vectors

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.pending import Pending, Waits


WINDOW: Final = 2048  # texts of a unit, where nobody has cut them


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What came of a unit; row i of each array is text i."""

    vectors: Vectors  # (n, dim); all NaN where the row failed
    token_counts: npt.NDArray[np.int32]  # (n,), after a cut; 0 of what cannot be tokenized
    truncated: npt.NDArray[np.bool_]  # (n,)
    failed: tuple[FailedRow, ...]
    n_cached: int  # texts whose vectors were known
    n_computed_tokens: int  # each different text once


def encode(
    embedder: Embedder,
    texts: Sequence[str],
    options: EncodeOptions,
    *,
    cache: VectorCache | None = None,
) -> Encoded:
    """The vectors of all texts, from the cache where they are known.

    With `on_error="skip"` a text that cannot be embedded, or is too long, is among the `failed`.
    Raises what `Embedder.encode` raises.
    """
    unit = begin(embedder, texts, options, cache=cache)
    try:
        unit.submit()
        return unit.result()
    finally:
        unit.cancel()


def stream(
    embedder: Embedder,
    texts: Iterable[str],
    options: EncodeOptions,
    *,
    cache: VectorCache | None = None,
    on_progress: OnProgress,
) -> Iterator[Block]:
    """`Embedder.stream` with the cache, where texts that are too long may fail alone."""
    rest = iter(texts)
    start = 0
    while window := list(islice(rest, WINDOW)):
        try:
            encoded = encode(embedder, window, options, cache=cache)
        except (BadText, TextTooLong) as error:
            raise _renumbered(error, range(start, start + len(window))) from error
        on_progress(len(window), encoded.n_computed_tokens)
        yield Block(
            start=start,
            vectors=encoded.vectors,
            token_counts=encoded.token_counts,
            truncated=encoded.truncated,
            failed=tuple(replace(each, row=start + each.row) for each in encoded.failed),
        )
        start += len(window)


def begin(
    embedder: Embedder,
    texts: Sequence[str],
    options: EncodeOptions,
    *,
    cache: VectorCache | None = None,
) -> Unit:
    """The texts, looked up and tokenized. Raises what `Embedder.prepare` raises."""
    space = space_of(embedder, **options) if cache is not None else None
    known: dict[int, Known] = {}
    if cache is not None and space is not None:
        known = cache.find(space, texts, max_tokens=embedder.n_ctx)
    rows = [row for row in range(len(texts)) if row not in known]
    pending, rows, failed = _prepared(embedder, texts, rows, options)
    dim = options.get("dimensions") or embedder.dim
    return Unit(texts, pending, rows, failed, known, dim, cache, space)


class Unit:
    """Texts on their way."""

    def __init__(
        self,
        texts: Sequence[str],
        pending: Pending[Block],
        rows: Sequence[int],
        failed: Sequence[FailedRow],
        known: dict[int, Known],
        dim: int,
        cache: VectorCache | None,
        space: Space | None,
    ) -> None:
        """Use `begin`."""
        self._texts = texts
        self._pending = pending
        self._rows = np.array(rows, np.intp)
        self._failed = failed
        self._known = known
        self._dim = dim
        self._cache = cache
        self._space = space
        self._done = threading.Event()

    @property
    def n_tokens(self) -> int:
        """To be computed: of each different text that is not known."""
        return self._pending.n_tokens

    def submit(self, on_done: Callable[[], object] | None = None) -> None:
        """Have it computed; returns at once. `on_done` is called once, in any thread."""

        def finish() -> None:
            self._done.set()
            if on_done is not None:
                on_done()

        self._pending.submit(finish)

    def cancel(self) -> None:
        """Forget what waits; what is being computed is computed."""
        self._pending.cancel()

    def waits(self) -> Waits:
        """Of a unit that is done."""
        return self._pending.waits()

    def result(self) -> Encoded:
        """Wait for it, and keep what is new. Raises NativeFailed."""
        self._done.wait()
        block = self._pending.result()
        n = len(self._texts)
        vectors = np.full((n, self._dim), np.nan, np.float32)
        token_counts = np.zeros(n, np.int32)
        truncated = np.zeros(n, np.bool_)
        vectors[self._rows] = block.vectors
        token_counts[self._rows] = block.token_counts
        truncated[self._rows] = block.truncated
        failed = [
            FailedRow(row=int(self._rows[each.row]), n_tokens=each.n_tokens, reason=each.reason)
            for each in block.failed
        ]
        for row, known in self._known.items():
            vectors[row] = known.vector
            token_counts[row] = known.n_tokens
        if self._cache is not None and self._space is not None:
            lost = {each.row for each in failed}
            self._cache.keep(
                self._space,
                [
                    Entry(
                        text=self._texts[row],
                        vector=vectors[row],
                        n_tokens=int(token_counts[row]),
                    )
                    for row in cast("list[int]", self._rows.tolist())
                    if row not in lost and not truncated[row]
                ],
            )
        return Encoded(
            vectors=vectors,
            token_counts=token_counts,
            truncated=truncated,
            failed=tuple(sorted([*self._failed, *failed], key=lambda each: each.row)),
            n_cached=len(self._known),
            n_computed_tokens=self._pending.n_tokens,
        )


def _prepared(
    embedder: Embedder,
    texts: Sequence[str],
    rows: list[int],
    options: EncodeOptions,
    n_kinds: int = 2,
) -> tuple[Pending[Block], list[int], list[FailedRow]]:
    """Those of the rows that can be computed, ready; and why the others cannot.

    The first error is of rows that are no text, the second of those that are too long: each time
    all of the kind go. What is still refused after `n_kinds` is refused.
    """
    try:
        return embedder.prepare([texts[row] for row in rows], **options), rows, []
    except (BadText, TextTooLong) as error:
        if not n_kinds or options.get("on_error") != "skip":
            raise _renumbered(error, rows) from error
        if isinstance(error, TextTooLong):
            reasons = {
                rows[row]: (n, f"longer than the {counted(error.n_ctx, 'token')} of the model")
                for row, n in error.rows
            }
        else:
            reasons = _unusable(embedder, texts, rows, options)
    rows = [row for row in rows if row not in reasons]
    pending, rows, failed = _prepared(embedder, texts, rows, options, n_kinds - 1)
    failed += [
        FailedRow(row=row, n_tokens=n, reason=reason) for row, (n, reason) in reasons.items()
    ]
    return pending, rows, failed


def _unusable(
    embedder: Embedder, texts: Sequence[str], rows: Sequence[int], options: EncodeOptions
) -> dict[int, tuple[int | None, str]]:
    """Rows that are no text for this model, with reasons: the error names the first only."""
    reasons: dict[int, tuple[int | None, str]] = {}
    for row in rows:
        try:
            embedder.prepare([texts[row]], **options)
        except BadText as error:
            reasons[row] = None, error.reason
        except TextTooLong:
            continue
    return reasons


def _renumbered(error: BadText | TextTooLong, rows: Sequence[int]) -> BadText | TextTooLong:
    """The same error, with rows counted among all texts."""
    if isinstance(error, TextTooLong):
        return TextTooLong([(rows[row], n) for row, n in error.rows], error.n_ctx)
    return BadText(rows[error.row], error.reason)
