"""A reranker that another process serves: pairs are scored there, and put in order here."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, Unpack, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.address import Address
from gguf_embed.engine.fingerprint import Fingerprint
from gguf_embed.engine.opening import Opened
from gguf_embed.engine.options import FailedRow, RerankOptions, Scored
from gguf_embed.engine.remote import Client, RemoteModel, asked_of, served_as
from gguf_embed.engine.reranker import Asked, Reranker
from gguf_embed.engine.stream import no_vector
from gguf_embed.errors import BadInput, BadOption, BadText, TextTooLong
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


class RemoteReranker(Reranker):
    """What `Reranker.connect` gives."""

    def __init__(self, opened: Opened, facts: Mapping[str, Any]) -> None:
        """Use `Reranker.connect`."""
        self._keep(opened)
        assert opened.remote is not None
        self._address = opened.remote
        task = facts["default_task"]
        self._default_task = None if task is None else str(task)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled and copied as what connects again; its key stays here."""
        return open_remote_reranker, (replace(self._address, api_key=None),)

    @property
    def default_task(self) -> str | None:
        """The instruction that `task` replaces; None: the model takes none."""
        return self._default_task

    def fingerprint(self, *, task: str | None = None, raw: bool = False) -> Fingerprint:
        """What the scores of such a call mean; the server tells it."""
        with self._lifetime.call() as running:
            said = {"task": task, "raw": raw}
            return asked_of(self._client(running.backend), "reranker", said, _fingerprint)

    def prepare(self, *_: object, **options: Unpack[RerankOptions]) -> NoReturn:
        """Not of a served reranker: its calls wait in threads."""
        raise BadOption("a served reranker is asked by score and rank; use them in a thread")

    def _scored(self, query: str, documents: list[str], options: RerankOptions) -> Scored:
        asked = Asked.of(options)
        self._check_texts(query, documents)
        unique: dict[str, int] = {}
        place = np.fromiter(
            (unique.setdefault(text, len(unique)) for text in documents), np.intp, len(documents)
        )
        first_rows = np.full(len(unique), len(documents), np.intp)
        np.minimum.at(first_rows, place, np.arange(len(documents)))
        windows = list(_windows(list(unique)))
        with self._lifetime.call() as running:
            client = self._client(running.backend)

            def scored(number: int) -> _Part:
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
                    row = sum(map(len, windows[:number])) + error.row
                    raise BadText(int(first_rows[row]), error.reason) from error

            parts: list[_Part] = []
            with ThreadPoolExecutor(min(IN_FLIGHT, len(windows) or 1)) as threads:
                start = 0
                for part in threads.map(scored, range(len(windows))):
                    parts.append(part)
                    if asked.on_progress is not None and not part.too_long:
                        stop = start + len(part.scores)
                        n_same = int(((place >= start) & (place < stop)).sum())
                        asked.on_progress(n_same, sum(part.n_tokens))
                        start = stop
        return self._joined(parts, windows, place, first_rows, asked)

    def _joined(
        self,
        parts: Sequence[_Part],
        windows: Sequence[Sequence[str]],
        place: npt.NDArray[np.intp],
        first_rows: npt.NDArray[np.intp],
        asked: Asked,
    ) -> Scored:
        """All scores in the order as given. Raises what `Reranker.score` raises."""
        starts = np.cumsum([0, *map(len, windows)]).tolist()
        too_long = [
            (int(row), n)
            for start, part in zip(starts, parts, strict=False)
            for index, n in part.too_long
            for row in np.flatnonzero(place == start + index)
        ]
        if too_long:
            raise TextTooLong(sorted(too_long), self.n_ctx)
        for start, part in zip(starts, parts, strict=False):
            for each in part.failed if asked.on_error == "raise" else ():
                row = int(first_rows[start + each.row])
                if each.n_tokens is None:
                    raise BadText(row, each.reason)
                raise no_vector(row, each.n_tokens, each.reason)
        if not parts:
            return Scored(scores=np.empty(0, np.float32), n_tokens=(), truncated=())
        n_tokens = np.concatenate([part.n_tokens for part in parts])
        cut = np.concatenate([part.truncated for part in parts])
        return Scored(
            scores=np.concatenate([part.scores for part in parts])[place],
            n_tokens=cast("list[int]", n_tokens[place].tolist()),
            truncated=cast("list[bool]", cut[place].tolist()),
        )

    def _check_texts(self, query: str, documents: Sequence[object]) -> None:
        """Refuse what is no text before it travels. Raises BadInput, BadText."""
        for row, text in enumerate(documents):
            if not isinstance(text, str):
                raise BadText(row, f"is a {type(text).__name__}, not a str")
            if at := _surrogate(text):
                raise BadText(row, f"{at}, which is no text; fix the decoding")
        if at := _surrogate(query):
            raise BadInput(f"the query: {at}, which is no text; fix the decoding")

    @staticmethod
    def _client(backend: object) -> Client:
        assert isinstance(backend, RemoteModel)
        return backend.client


def open_remote_reranker(address: Address) -> RemoteReranker:
    """The reranker that a server has at that address. Raises what asking it raises."""
    client = Client(address)
    try:
        return asked_of(
            client,
            "reranker",
            {},
            lambda facts: RemoteReranker(served_as(address, client, facts), facts),
        )
    except BaseException:
        client.close()
        raise


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
