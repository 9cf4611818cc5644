"""Scores of a reranker that another process serves; `Reranker.connect` opens it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.address import Address
from gguf_embed.engine.fingerprint import Fingerprint
from gguf_embed.engine.opening import Opened
from gguf_embed.engine.options import FailedRow, Scored
from gguf_embed.engine.remote import Client, RemoteModel, asked_of, served_as
from gguf_embed.engine.scoring import Asked
from gguf_embed.engine.stream import no_vector
from gguf_embed.errors import BadInput, BadText, TextTooLong
from gguf_embed.vectors import Vectors

TOGETHER: Final = 256  # documents of a request
MOST_CHARS: Final = 1 << 20  # of the documents of a request, but for one that is longer
IN_FLIGHT: Final = 4  # requests, so that the server does not wait for the network


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Documents of one request, and what came back; rows are those within it."""

    scores: Vectors
    n_tokens: Sequence[int]
    truncated: Sequence[bool]
    failed: Sequence[FailedRow]
    too_long: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, answer: Mapping[str, Any], n_documents: int) -> _Part:
        """What a server says. Raises KeyError, TypeError, ValueError for what is none of ours."""
        scores = np.frombuffer(base64.b64decode(answer["scores"]), "<f4").astype(np.float32)
        too_long = [(int(row), int(n)) for row, n in answer["too_long"]]
        if not too_long and len(scores) != n_documents:
            raise ValueError(f"{len(scores)} scores of {n_documents} documents")
        return cls(
            scores=scores,
            n_tokens=[int(n) for n in answer["n_tokens"]],
            truncated=[bool(cut) for cut in answer["truncated"]],
            failed=[
                FailedRow(row=int(row), n_tokens=None if n is None else int(n), reason=str(reason))
                for row, n, reason in answer["failed"]
            ],
            too_long=too_long,
        )


def open_remote(address: Address) -> tuple[Opened, str | None]:
    """The reranker that a server has at that address, and its default task.

    Raises what asking it raises.
    """
    client = Client(address)

    def read(facts: Mapping[str, Any]) -> tuple[Opened, str | None]:
        task = facts["default_task"]
        return served_as(address, client, facts), None if task is None else str(task)

    try:
        return asked_of(client, "reranker", {}, read)
    except BaseException:
        client.close()
        raise


def fingerprint(backend: object, *, task: str | None, raw: bool) -> Fingerprint:
    """What the scores of such a call mean, as the server tells it."""
    return asked_of(_client(backend), "reranker", {"task": task, "raw": raw}, _fingerprint)


def scored(
    backend: object, query: str, documents: Sequence[str], asked: Asked, *, n_ctx: int
) -> Scored:
    """Scores in the order as given. Raises what `Reranker.score` raises."""
    client = _client(backend)
    _check_texts(query, documents)
    unique: dict[str, int] = {}
    place = np.fromiter(
        (unique.setdefault(text, len(unique)) for text in documents), np.intp, len(documents)
    )
    first_rows = np.full(len(unique), len(documents), np.intp)
    np.minimum.at(first_rows, place, np.arange(len(documents)))
    windows = list(_windows(list(unique)))
    starts = [0, *accumulate(map(len, windows))]

    def ask(number: int) -> _Part:
        window = windows[number]
        said: dict[str, object] = {
            "query": query,
            "documents": window,
            "task": asked.task,
            "raw": asked.raw,
            "truncate": "end" if asked.cut else "error",
        }
        try:
            return asked_of(client, "score", said, lambda told: _Part.of(told, len(window)))
        except BadText as error:
            row = int(first_rows[starts[number] + error.row])
            raise BadText(row, error.reason) from error

    parts: list[_Part] = []
    with ThreadPoolExecutor(min(IN_FLIGHT, len(windows) or 1)) as threads:
        for start, part in zip(starts, threads.map(ask, range(len(windows))), strict=False):
            parts.append(part)
            if asked.on_progress is not None and not part.too_long:
                n_same = int(((place >= start) & (place < start + len(part.scores))).sum())
                asked.on_progress(n_same, sum(part.n_tokens))
    return _joined(dict(zip(starts, parts, strict=False)), place, first_rows, asked, n_ctx=n_ctx)


def _joined(
    parts: Mapping[int, _Part],
    place: npt.NDArray[np.intp],
    first_rows: npt.NDArray[np.intp],
    asked: Asked,
    *,
    n_ctx: int,
) -> Scored:
    """Of parts by the different document with which each begins."""
    too_long = [
        (int(row), n)
        for start, part in parts.items()
        for index, n in part.too_long
        for row in np.flatnonzero(place == start + index)
    ]
    if too_long:
        raise TextTooLong(sorted(too_long), n_ctx)
    failed: list[FailedRow] = []
    for start, part in parts.items():
        for each in part.failed:
            row = int(first_rows[start + each.row])
            if asked.on_error == "raise":
                if each.n_tokens is None:
                    raise BadText(row, each.reason)
                raise no_vector(row, each.n_tokens, each.reason)
            rows = np.flatnonzero(place == start + each.row).tolist()
            failed += [replace(each, row=row) for row in rows]
    if not parts:
        return Scored(scores=np.empty(0, np.float32), n_tokens=(), truncated=())
    n_tokens = np.concatenate([part.n_tokens for part in parts.values()])
    cut = np.concatenate([part.truncated for part in parts.values()])
    return Scored(
        scores=np.concatenate([part.scores for part in parts.values()])[place],
        n_tokens=cast("list[int]", n_tokens[place].tolist()),
        truncated=cast("list[bool]", cut[place].tolist()),
        failed=sorted(failed, key=lambda each: each.row),
    )


def _check_texts(query: str, documents: Sequence[object]) -> None:
    """Refuse what is no text before it travels. Raises BadInput, BadText."""
    for row, text in enumerate(documents):
        if not isinstance(text, str):
            raise BadText(row, f"is a {type(text).__name__}, not a str")
        if at := _surrogate(text):
            raise BadText(row, f"{at}, which is no text; fix the decoding")
    if at := _surrogate(query):
        raise BadInput(f"the query: {at}, which is no text; fix the decoding")


def _client(backend: object) -> Client:
    assert isinstance(backend, RemoteModel)
    return backend.client


def _windows(documents: Sequence[str]) -> Iterator[list[str]]:
    window: list[str] = []
    n_chars = 0
    for text in documents:
        if window and (len(window) == TOGETHER or n_chars + len(text) > MOST_CHARS):
            yield window
            window, n_chars = [], 0
        window.append(text)
        n_chars += len(text)
    if window:
        yield window


def _fingerprint(facts: Mapping[str, Any]) -> Fingerprint:
    told: Mapping[str, Any] = facts["fingerprint"]
    return Fingerprint(
        sha256=str(told["sha256"]),
        pooling=str(told["pooling"]),
        causal=bool(told["causal"]),
        special_tokens=tuple(map(int, told["special_tokens"])),
        prompt=str(told["prompt"]),
        dim=int(told["dim"]),
        normalized=bool(told["normalized"]),
    )


def _surrogate(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is a lone surrogate"
    return ""
