"""The model behind an object of a partner's library: named, and opened at its first use.

    model = HeldEmbedder("qwen3-embedding-0.6b", truncate="end")
    model.documents(texts)            # float32, (n, dim), with the model's document prompt
    await model.aqueries(["a cat"])   # the same for queries, and no thread waits
    HeldEmbedder.of(model.as_dict())  # what JSON keeps of it

Partners copy, pickle and write down their objects. What travels is the model's name and the
choices; copies in a process share one open model. Long texts are an error, unless `truncate` says
which end to cut; the log tells then how many were cut.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypedDict, TypeVar, Unpack, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.catalog import RERANKER
from gguf_embed.catalog.catalog import BUILTIN
from gguf_embed.engine import arguments, bar
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.options import EncodeOptions, Truncate
from gguf_embed.engine.pending import Pending
from gguf_embed.engine.reranker import Reranker
from gguf_embed.engine.stream import ENCODE_WINDOW
from gguf_embed.engine.turns import Priority
from gguf_embed.errors import BadOption
from gguf_embed.plan.settings import Settings
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Pooling, Vectors

_log = logging.getLogger(__name__)

_DEFAULTS: Final = Settings()
# How it ran before is this machine's, and is not written down.
_KEPT: Final = tuple(each.name for each in fields(Settings) if each.name != "run")


class OpeningChoices(TypedDict, total=False):
    """How a model is opened: what `Embedder.open` takes; settings also as JSON has them."""

    settings: Settings | Mapping[str, Any] | None
    isolated: bool


class TextChoices(OpeningChoices, total=False):
    """The same, and how texts become vectors; `task` is that of queries."""

    task: str | None
    dimensions: int | None
    truncate: Truncate
    max_tokens: int | None


class PairChoices(OpeningChoices, total=False):
    """How a reranker is opened, and how it judges."""

    task: str | None
    truncate: Literal["end", "error"]


_Model = TypeVar("_Model", Embedder, Reranker)
_Result = TypeVar("_Result")


class _Held(Closes, Generic[_Model]):
    """A model by its name, or one that the caller has opened, which stays the caller's to close."""

    def __init__(self, model: str | Path | _Model, choices: Mapping[str, Any]) -> None:
        self.choices = {name: value for name, value in choices.items() if value is not None}
        self.settings = settings_of(self.choices.pop("settings", None))
        self.isolated = arguments.check_switch("isolated", self.choices.pop("isolated", False))
        self.name: str | None = None
        self._model: _Model | None = None
        self._mine = False
        self._lock = threading.Lock()
        if isinstance(model, (Embedder, Reranker)):
            if self.settings != _DEFAULTS or self.isolated:
                raise BadOption("settings are those of the open model already; leave them out")
            self._model = cast("_Model", model)
        else:
            self.name = str(arguments.check_model(model))

    @property
    def opened(self) -> _Model:
        """The model; the first call opens it."""
        with self._lock:
            if self._model is None:
                assert self.name is not None, "else it was opened by the caller"
                self._model, self._mine = self._open(self.name), True
            return self._model

    def close(self) -> None:
        """Close what was opened here."""
        with self._lock:
            if self._mine and self._model is not None:
                self._model.close()

    def as_dict(self) -> dict[str, Any]:
        """What JSON keeps. Raises BadOption for a model that the caller has opened."""
        if self.name is None:
            raise BadOption("an open model cannot be written down; give the name of a model")
        found: dict[str, Any] = {"model": self.name, **self.choices}
        if settings := settings_dict(self.settings):
            found["settings"] = settings
        if self.isolated:
            found["isolated"] = True
        return found

    def __deepcopy__(self, memo: object) -> _Held[_Model]:
        """Copies share the model."""
        return self

    def __copy__(self) -> _Held[_Model]:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled by name, else as an open model is."""
        if self.name is None:
            return partial(type(self), **self.choices), (self._model,)
        return partial(type(self), **{**self.as_dict(), "model": self.name}), ()

    @abstractmethod
    def _open(self, name: str) -> _Model: ...


class HeldEmbedder(_Held[Embedder]):
    """Texts to vectors, in whole batches; documents and queries with their own prompts."""

    def __init__(
        self, model: str | Path | Embedder = BUILTIN, **choices: Unpack[TextChoices]
    ) -> None:
        """A model's name, file or `auto`, or an open Embedder. Nothing is opened yet."""
        super().__init__(model, choices)
        self._task: str | None = self.choices.get("task")
        self._options = cast(
            "EncodeOptions", {name: v for name, v in self.choices.items() if name != "task"}
        )
        arguments.check_names(self._options)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> HeldEmbedder:
        """What `as_dict` has kept."""
        return cls(**said)

    def _open(self, name: str) -> Embedder:
        return Embedder.open(name, settings=self.settings, isolated=self.isolated)

    def documents(self, texts: Sequence[str], *, progress: bool | None = None) -> Vectors:
        """With the document prompt, shape (n, dim)."""
        return encoded(self.opened, texts, progress=progress, **self._said("document"))

    def queries(self, texts: Sequence[str]) -> Vectors:
        """With the query prompt, shape (n, dim); they overtake other work."""
        return encoded(self.opened, texts, **self._said("query"))

    async def adocuments(self, texts: Sequence[str]) -> Vectors:
        """`documents`, awaited."""
        return await self._acomputed(texts, "document")

    async def aqueries(self, texts: Sequence[str]) -> Vectors:
        """`queries`, awaited."""
        return await self._acomputed(texts, "query")

    async def _acomputed(self, texts: Sequence[str], prompt: str) -> Vectors:
        def prepare() -> Pending[Any]:
            return self.opened.prepare(texts, **self._said(prompt))

        block = await computed(prepare)
        _tell(block.truncated, self._limit)
        return block.vectors

    @property
    def _limit(self) -> int:
        return self._options.get("max_tokens") or self.opened.n_ctx

    def _said(self, prompt: str) -> EncodeOptions:
        is_query = prompt == "query"
        text = self.opened.prompt(prompt, task=self._task if is_query else None)
        said: EncodeOptions = {**self._options, "prompt": text}
        if is_query:
            said["priority"] = Priority.QUERY
        return said


class HeldReranker(_Held[Reranker]):
    """How well documents answer a query."""

    def __init__(
        self, model: str | Path | Reranker = RERANKER, **choices: Unpack[PairChoices]
    ) -> None:
        """A model's name or file, or an open Reranker. Nothing is opened yet."""
        super().__init__(model, choices)
        arguments.check_names(self.choices, arguments.RerankOptions)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> HeldReranker:
        """What `as_dict` has kept."""
        return cls(**said)

    def _open(self, name: str) -> Reranker:
        return Reranker.open(name, settings=self.settings, isolated=self.isolated)

    def best(
        self, query: str, documents: Sequence[str], top: int | None
    ) -> list[tuple[int, float]]:
        """(position, score from 0 to 1), the best first; of equal ones the first given."""
        scores = self.opened.score(query, documents, **self.choices)
        return _ordered(scores, top)

    async def abest(
        self, query: str, documents: Sequence[str], top: int | None
    ) -> list[tuple[int, float]]:
        """`best`, awaited."""
        scored = await computed(lambda: self.opened.prepare(query, documents, **self.choices))
        return _ordered(scored.scores, top)


def _ordered(scores: Vectors, top: int | None) -> list[tuple[int, float]]:
    order = np.argsort(-scores, kind="stable")[:top]
    return [(int(row), float(scores[row])) for row in order]


def encoded(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    progress: bool | None = None,
    **options: Unpack[EncodeOptions],
) -> Vectors:
    """`Embedder.encode`, and a line in the log where texts were cut."""
    with bar.watched(texts, progress, None) as watch:
        blocks = [*embedder.stream(texts, on_progress=watch, window=ENCODE_WINDOW, **options)]
    if not blocks:
        return embedder.encode([], **options)
    cut = np.concatenate([block.truncated for block in blocks])
    _tell(cut, options.get("max_tokens") or embedder.n_ctx)
    return np.concatenate([block.vectors for block in blocks])


def _tell(cut: npt.NDArray[np.bool_], limit: int) -> None:
    if cut.any():
        _log.warning(
            "%d of %d texts cut to %d tokens (first: row %d)",
            int(cut.sum()),
            len(cut),
            limit,
            int(np.argmax(cut)),
        )


async def computed(prepare: Callable[[], Pending[_Result]]) -> _Result:
    """The result of a call: a thread opens and tokenizes, and none waits for the computation."""
    pending = await asyncio.to_thread(prepare)
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(done.set)

    pending.submit(tell)
    try:
        await done.wait()
    except asyncio.CancelledError:
        pending.cancel()
        raise
    return pending.result()


def settings_dict(settings: Settings) -> dict[str, Any]:
    """The settings that are not the defaults, as JSON takes them."""
    values = {name: getattr(settings, name) for name in _KEPT}
    said = {name: v for name, v in values.items() if v != getattr(_DEFAULTS, name)}
    if settings.pooling is not None:
        said["pooling"] = settings.pooling.name
    return said


def settings_of(said: Settings | Mapping[str, Any] | None) -> Settings:
    """Settings as given, or as `settings_dict` has written them. Raises BadOption."""
    if said is None:
        return _DEFAULTS
    if isinstance(said, Settings):
        return said
    if unknown := [name for name in said if name not in _KEPT]:
        raise BadOption(f"settings have no {unknown[0]!r}; they are {', '.join(sorted(_KEPT))}")
    values = dict(said)
    if isinstance(name := values.get("pooling"), str):
        if name not in Pooling.__members__:
            raise BadOption(f"pooling={name!r}: choose {', '.join(Pooling.__members__)}")
        values["pooling"] = Pooling[name]
    return Settings(**values)
