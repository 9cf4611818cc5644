"""The main path: texts in, vectors out.

prepare (prompt, tokenize, cut) -> pack -> run -> finish (cut, normalize) -> put in order
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from gguf_embed.catalog.catalog import BUILTIN
from gguf_embed.engine.backend import Backend, Head
from gguf_embed.engine.calls import Calls
from gguf_embed.engine.isolated import IsolatedModel
from gguf_embed.engine.loaded import load
from gguf_embed.engine.opening import Found, find_model
from gguf_embed.engine.options import Block, EncodeOptions, FailedRow, OnError, VectorOptions
from gguf_embed.engine.prepare import Prepared, Preparer, Truncate
from gguf_embed.engine.scheduler import Scheduler, Ticket
from gguf_embed.engine.stacks import stack_pool
from gguf_embed.engine.turns import Caller, Priority
from gguf_embed.errors import BadInput, BadOption, NativeFailed, TextTooLong
from gguf_embed.plan.plan import Plan
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.store import download
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Vectors, check_dimensions, finish

# Texts and tokens done since the last call; called in the thread that takes the results.
Progress: TypeAlias = Callable[[int, int], None]

WINDOW: Final = 2048  # texts sorted and packed together by `stream`; two windows are in flight
ENCODE_WINDOW: Final = 1 << 18  # the same for `encode`, whose caller holds all texts anyway
_THREADS: Final = "gguf-embed"  # how the names of our threads begin


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The options of one call, checked."""

    prompt: str
    dimensions: int | None
    normalize: bool
    truncate: Truncate
    priority: Priority
    on_error: OnError


class Embedder(Closes):
    """A model ready to embed. Safe to use from several threads; close it or use `with`."""

    def __init__(
        self,
        found: Found,
        settings: Settings,
        on_status: Callable[[str], None] | None = None,
        *,
        backend: Backend | None = None,
        run_settings: RunSettings | None = None,
    ) -> None:
        """Use `Embedder.open`, which finds the file."""
        if backend is None:
            found, loaded = load(found, settings, on_status)
            backend, run_settings = loaded, loaded.runner.settings
        self.path = found.path
        self.header = found.header
        self.card = found.choice.card
        self.settings = settings  # what the caller said
        self.run_settings = run_settings or RunSettings()  # how it runs
        self.meaning = found.mode
        self.pooling = self.meaning.pooling
        remark = found.working.remark
        self.remarks: tuple[str, ...] = (remark,) if remark else ()
        self.plan: Plan = found.choice.plan  # what was considered, and why this
        self.target = found.target
        self.n_ctx = self.plan.run.n_ctx
        self.dim = backend.dim
        self.prompts: Mapping[str, str] = self.card.prompts if self.card else {}
        threads = stack_pool(min(8, os.cpu_count() or 1), f"{_THREADS}-tokenize")
        self._preparer = Preparer(
            backend.tokenize, specials=backend.specials, n_ctx=self.n_ctx, threads=threads
        )
        self._scheduler = Scheduler(backend)
        self._calls = Calls()
        self._free = weakref.finalize(self, _free_anywhere, self._scheduler, threads, backend)
        self._free.atexit = False  # the end of the process frees all

    @classmethod
    def open(
        cls,
        model: str | Path = BUILTIN,
        *,
        settings: Settings | None = None,
        on_status: Callable[[str], None] | None = None,
        on_download: download.Progress | None = None,
        isolated: bool = False,
    ) -> Embedder:
        """Open a model by catalog name, Hub repository, path, or "auto"; downloads it if need be.

        Quantization, GPU layers, context and microbatch are chosen for this machine, as far as
        `settings` leaves them open; `plan` tells why. A file that is here is used rather than
        another downloaded, unless that would find more room, or a better place (a GPU).

        `on_status` gets a line of text before something takes long: what was chosen, a download,
        the measurement on first use. `on_download` gets (bytes here, bytes in all).

        `isolated` runs the model in a child process: should a text crash native code, that text is
        named and this process goes on. It computes the same vectors.

        Raises ModelNotFound, BadModelFile, FetchFailed, DoesNotFit or NativeFailed; BadInput for a
        model not here whose licence forbids commercial use (`gguf-embed pull --accept-licence`).
        """
        settings = settings or Settings()
        found = find_model(model, settings, on_status, on_download)
        if not isolated:
            return cls(found, settings, on_status)
        backend = IsolatedModel(found, settings, on_status)
        return cls(backend.found, settings, backend=backend, run_settings=backend.run_settings)

    def __repr__(self) -> str:
        return (
            f"Embedder({self.model_id!r}, quant={self.quant!r}, dim={self.dim}, "
            f"n_ctx={self.n_ctx}, pooling={self.pooling.name})"
        )

    def close(self) -> None:
        """Wait for the calls in flight and free the model; later calls raise BadInput."""
        self._calls.close(
            lambda: BadInput(f"{self!r}: close() inside one of its calls; call it after that")
        )
        self._free()

    @property
    def model_id(self) -> str:
        """The catalog's name of the model, else its file name."""
        return self.card.id if self.card else self.path.stem

    @property
    def quant(self) -> str:
        """Quantization of the file, as llama.cpp spells it."""
        return self.header.quant

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        on_progress: Progress | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Vectors:
        """Vectors of texts: shape (dim,) for a str, (n, dim) for anything else; float32.

        See `EncodeOptions` for the options. Raises BadText, TextTooLong, BadOption, NativeFailed;
        rows are numbered as given.
        """
        single = isinstance(texts, str)
        with self._call():
            blocks = self.stream(
                [texts] if single else texts,
                on_progress=on_progress,
                window=ENCODE_WINDOW if isinstance(texts, Sequence) else WINDOW,
                **options,
            )
            parts = [block.vectors for block in blocks]
        if not parts:
            return np.empty((0, options.get("dimensions") or self.dim), np.float32)
        vectors = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return vectors[0] if single else vectors

    def encode_query(
        self,
        texts: str | Iterable[str],
        *,
        task: str | None = None,
        **options: Unpack[VectorOptions],
    ) -> Vectors:
        """`encode` with the model's query prompt; `task` replaces an instruct model's default.

        It overtakes the work of other calls.
        """
        options.setdefault("priority", Priority.QUERY)
        return self.encode(texts, prompt=self.prompt("query", task=task), **options)

    def encode_document(
        self, texts: str | Iterable[str], **options: Unpack[VectorOptions]
    ) -> Vectors:
        """`encode` with the model's document prompt."""
        return self.encode(texts, prompt=self.prompt("document"), **options)

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """Cosine of each row of `a` with each row of `b`, shape (n, m); (dim,) counts as a row."""
        left = finish(np.atleast_2d(a), dimensions=None, normalize=True)
        right = finish(np.atleast_2d(b), dimensions=None, normalize=True)
        return left @ right.T

    def prompt(self, name: str, *, task: str | None = None) -> str:
        """The text that `prompt_name=name` puts in front; "" where the model has none for it."""
        if self.card is not None:
            return self.card.prompt(name, task)
        if name in ("query", "document") and task is None:
            return ""
        raise BadOption(f"{self.model_id} is not in the catalog and has no prompt {name!r}")

    def tokenize(self, text: str) -> list[int]:
        """Token ids with special tokens, as the model sees them."""
        with self._call():
            return [int(token) for token in self._preparer.ids(text, row=0)]

    def count_tokens(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Number of tokens of each text, special tokens included, shape (n,)."""
        with self._call():
            return self._preparer.count([texts] if isinstance(texts, str) else texts)

    def token_vectors(self, text: str) -> Vectors:
        """One vector per token of a text, shape (n tokens, dim), before any pooling."""
        with self._call():
            tokens = self._preparer.ids(text, row=0)
            if len(tokens) > self.n_ctx:
                raise TextTooLong([(0, len(tokens))], self.n_ctx)
            caller = Caller()
            try:
                (done,) = self._scheduler.submit(caller, [tokens], Head.TOKENS).results()
            finally:
                self._scheduler.cancel(caller)
            return done.vectors

    def stream(
        self,
        texts: Iterable[str],
        *,
        on_progress: Progress | None = None,
        window: int = WINDOW,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[Block]:
        """`encode` block by block, in order, with memory for two windows of texts only.

        Texts that are too long (truncate="error") stop the work at the first one, but the rest of
        the input is still read, so that the error names all of them.
        """
        with self._call():
            request = self._request(options)
        return self._blocks(iter(texts), request, window, on_progress)

    def _blocks(
        self,
        texts: Iterator[str],
        request: _Request,
        window: int,
        on_progress: Progress | None,
    ) -> Generator[Block]:
        caller = Caller(priority=request.priority)
        in_flight: deque[tuple[Prepared, Ticket]] = deque()
        too_long: list[tuple[int, int]] = []
        start = 0
        try:
            while chunk := list(islice(texts, window)):
                with self._call():
                    prepared = self._preparer.rows(
                        chunk, start, prompt=request.prompt, truncate=request.truncate
                    )
                    start += len(chunk)
                    too_long += prepared.too_long
                    if too_long:
                        continue
                    ticket = self._scheduler.submit(caller, prepared.tokens)
                    in_flight.append((prepared, ticket))
                    if len(in_flight) < 2:
                        continue
                    block = self._collect(*in_flight.popleft(), request, on_progress)
                yield block
            if too_long:
                raise TextTooLong(sorted(too_long), self.n_ctx)
            while in_flight:
                with self._call():
                    block = self._collect(*in_flight.popleft(), request, on_progress)
                yield block
        finally:
            self._scheduler.cancel(caller)

    def _call(self) -> AbstractContextManager[None]:
        """Around each use of native memory: while one lasts, nothing is freed."""
        return self._calls.counted(lambda: BadInput(f"{self!r} is closed; open the model again"))

    def _request(self, options: EncodeOptions) -> _Request:
        """The options as they apply to this model. Raises BadOption."""
        prompt_name, prompt = options.get("prompt_name"), options.get("prompt")
        if prompt_name is not None and prompt is not None:
            raise BadOption("prompt_name and prompt exclude each other; pass one of them")
        truncate = options.get("truncate", "error")
        if truncate not in ("error", "end", "start"):
            raise BadOption(f"truncate={truncate!r}: choose 'error', 'end' or 'start'")
        on_error = options.get("on_error", "raise")
        if on_error not in ("raise", "skip"):
            raise BadOption(f"on_error={on_error!r}: choose 'raise' or 'skip'")
        card, dimensions = self.card, options.get("dimensions")
        check_dimensions(
            dimensions,
            dim=self.dim,
            mrl_min=card.mrl_min if card else None,
            mrl_dims=card.mrl_dims if card else (),
        )
        text = self.prompt(prompt_name) if prompt_name is not None else prompt or ""
        if text and (n_tokens := len(self._preparer.ids(text, row=0))) >= self.n_ctx:
            raise BadOption(
                f"the prompt takes {n_tokens} of n_ctx={self.n_ctx} tokens and leaves none for a "
                "text; shorten it"
            )
        return _Request(
            prompt=text,
            dimensions=dimensions,
            normalize=options.get("normalize", True),
            truncate=truncate,
            priority=options.get("priority", Priority.NORMAL),
            on_error=on_error,
        )

    def _collect(
        self,
        prepared: Prepared,
        ticket: Ticket,
        request: _Request,
        on_progress: Progress | None,
    ) -> Block:
        """Wait for the rows of a window and put them back in order."""
        n_same = np.bincount(prepared.place, minlength=len(prepared.tokens))
        dim = request.dimensions or self.dim
        vectors = np.empty((len(prepared.tokens), dim), np.float32)
        failed: list[FailedRow] = []
        for done in ticket.results():
            for index in done.bad:
                n_tokens = len(prepared.tokens[index])
                reason = _DIED if index in done.died else _NAN.format(self.model_id)
                if request.on_error == "raise":
                    row = prepared.first_rows[index]
                    raise NativeFailed(f"row {row}: {reason} ({n_tokens} tokens)")
                failed += [
                    FailedRow(row=prepared.start + int(row), n_tokens=n_tokens, reason=reason)
                    for row in np.flatnonzero(prepared.place == index)
                ]
            rows = list(done.rows)
            vectors[rows] = finish(
                done.vectors, dimensions=request.dimensions, normalize=request.normalize
            )
            vectors[list(done.bad)] = np.nan
            if on_progress is not None:
                on_progress(int(n_same[rows].sum()), done.n_tokens)
        counts = np.fromiter(map(len, prepared.tokens), np.int32, len(prepared.tokens))
        return Block(
            start=prepared.start,
            vectors=vectors[prepared.place],
            token_counts=counts[prepared.place],
            truncated=prepared.truncated[prepared.place],
            failed=tuple(sorted(failed, key=lambda each: each.row)),
        )


_NAN: Final = (
    "llama.cpp gives NaN for this text on every path; try another quantization of {}, or leave the "
    "row out"
)
_DIED: Final = "llama.cpp dies of this text; leave the row out, or split it"


def _free_anywhere(scheduler: Scheduler, tokenizers: Executor, backend: Backend) -> None:
    """Free what an Embedder held; also from the garbage collector, in whatever thread that is."""

    def free() -> None:
        scheduler.close()
        tokenizers.shutdown()
        backend.close()

    if threading.current_thread().name.startswith(_THREADS):  # which cannot wait for itself
        threading.Thread(target=free).start()
    else:
        free()
