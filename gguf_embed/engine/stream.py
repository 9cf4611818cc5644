"""The way of all texts of a call: prepare -> submit -> finish -> put back in order."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from gguf_embed.engine.options import Block, FailedRow, OnError, OnProgress, Truncate
from gguf_embed.engine.prepare import Prepared
from gguf_embed.engine.running import Lifetime, Running
from gguf_embed.engine.scheduler import Ticket
from gguf_embed.engine.turns import Caller, Done, Priority
from gguf_embed.errors import NativeFailed, TextTooLong
from gguf_embed.vectors import finish, unusable

WINDOW: Final = 2048  # texts sorted and packed together by `stream`; two windows are in flight
ENCODE_WINDOW: Final = 1 << 18  # the same for `encode`, whose caller holds all texts anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one call, checked."""

    prompt: str
    dim: int  # of the vectors that come out
    dimensions: int | None
    normalize: bool
    truncate: Truncate
    n_ctx: int  # tokens of the longest text
    priority: Priority
    on_error: OnError


def blocks(
    lifetime: Lifetime,
    texts: Iterator[str],
    request: Request,
    *,
    window: int,
    on_progress: OnProgress | None,
) -> Generator[Block]:
    """The results of all texts, a window at a time; two windows are in flight."""
    caller = Caller(priority=request.priority)
    in_flight: deque[tuple[Prepared, Ticket]] = deque()
    too_long: list[tuple[int, int]] = []
    running: Running | None = None
    start = 0
    window = min(window, sys.maxsize)  # a larger one does not fit into C
    try:
        while chunk := list(islice(texts, window)):
            with lifetime.call(running) as running:
                prepared = running.preparer.rows(
                    chunk,
                    start,
                    prompt=request.prompt,
                    truncate=request.truncate,
                    n_ctx=request.n_ctx,
                    on_error=request.on_error,
                )
                start += len(chunk)
                too_long += prepared.too_long
                if too_long:  # the rest is read, so that the error names all of them
                    continue
                in_flight.append((prepared, running.scheduler.submit(caller, prepared.tokens)))
                if len(in_flight) < 2:
                    continue
                block = _collect(*in_flight.popleft(), request, on_progress)
            yield block
        if too_long:
            raise TextTooLong(sorted(too_long), request.n_ctx)
        while in_flight:
            with lifetime.call(running):
                block = _collect(*in_flight.popleft(), request, on_progress)
            yield block
    finally:
        if running is not None and lifetime.is_current(running):
            running.scheduler.cancel(caller)


def _collect(
    prepared: Prepared, ticket: Ticket, request: Request, on_progress: OnProgress | None
) -> Block:
    """Wait for the rows of a window and put them back in order."""
    collecting = Collecting(prepared, request)
    if prepared.untokenized and on_progress is not None:
        on_progress(len(prepared.untokenized), 0)
    for done in ticket.results():
        n_texts = collecting.add(done)
        if on_progress is not None:
            on_progress(n_texts, done.n_tokens)
    return collecting.block()


class Collecting:
    """Puts the rows of a window back in order, as they are done."""

    def __init__(self, prepared: Prepared, request: Request) -> None:
        self._prepared = prepared
        self._request = request
        place, n_different = prepared.place, len(prepared.tokens)
        self._n_same = np.bincount(place[place >= 0], minlength=n_different)
        # One row more than there are texts, the last: it is that of the place -1.
        self._vectors = np.empty((n_different + 1, request.dim), np.float32)
        self._vectors[-1] = np.nan
        self._failed = [
            FailedRow(row=row, n_tokens=None, reason=reason) for row, reason in prepared.untokenized
        ]

    def add(self, done: Done) -> int:
        """Finish some rows; returns how many texts they are. Raises NativeFailed."""
        prepared, request = self._prepared, self._request
        rows = np.array(done.rows, np.intp)
        finished = finish(done.vectors, dimensions=request.dimensions, normalize=request.normalize)
        bad = {int(row) for row in rows[unusable(finished)]} | set(done.bad)
        for index in sorted(bad):
            n_tokens = len(prepared.tokens[index])
            reason = why_no_vector(died=index in done.died)
            if request.on_error == "raise":
                raise no_vector(prepared.first_rows[index], n_tokens, reason)
            self._failed += [
                FailedRow(row=prepared.start + int(row), n_tokens=n_tokens, reason=reason)
                for row in np.flatnonzero(prepared.place == index)
            ]
        self._vectors[rows] = finished
        self._vectors[list(bad)] = np.nan
        return int(self._n_same[rows].sum())

    def block(self) -> Block:
        """All of them."""
        prepared = self._prepared
        return Block(
            start=prepared.start,
            vectors=self._vectors[prepared.place],
            token_counts=prepared.token_counts,
            truncated=prepared.cut,
            failed=tuple(sorted(self._failed, key=lambda each: each.row)),
        )


NO_VECTOR: Final = (
    "llama.cpp gives NaN for this text on every path, or a vector without length; try another "
    "quantization of the model, or leave the row out"
)
DIED: Final = "llama.cpp dies of this text; leave the row out, or split it"


def why_no_vector(*, died: bool) -> str:
    """The reason for a row: its text ended a process, or gave nothing."""
    return DIED if died else NO_VECTOR


def no_vector(row: int, n_tokens: int, reason: str) -> NativeFailed:
    """The error for a row whose text has no vector."""
    return NativeFailed(f"row {row}: {reason} ({n_tokens} tokens)")
