"""The main path: texts in, vectors out.

prepare (prompt, tokenize, cut) -> pack -> run -> finish (cut, normalize) -> put in order
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from gguf_embed.catalog.catalog import BUILTIN
from gguf_embed.engine import tune
from gguf_embed.engine.opening import Found, Settings, end_token, find_model, wanted
from gguf_embed.engine.runner import Outcome, Runner, tap_works
from gguf_embed.engine.schedule import Microbatch, Shared, pack, shared_prefixes
from gguf_embed.engine.stacks import stack_pool
from gguf_embed.engine.tokenizer import RunTooLong, Tokenizer
from gguf_embed.errors import BadInput, BadOption, BadText, NativeFailed, TextTooLong
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.plan import Plan
from gguf_embed.store import hub
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Vectors, check_dimensions, finish

Truncate: TypeAlias = Literal["error", "end", "start"]
# Texts and tokens done since the last call; called in the thread that takes the results.
Progress: TypeAlias = Callable[[int, int], None]

WINDOW = 2048  # texts sorted and packed together by `stream`; two windows are in flight
ENCODE_WINDOW = 1 << 18  # the same for `encode`, whose caller holds all texts anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive results of `stream`; row i of each array is text `start + i`."""

    start: int
    vectors: Vectors  # (n, dim)
    token_counts: npt.NDArray[np.int32]  # (n,), after truncation
    truncated: npt.NDArray[np.bool_]  # (n,)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The choices of one call, already checked."""

    prompt: str
    dimensions: int | None
    normalize: bool
    truncate: Truncate
    on_progress: Progress | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Texts tokenized together: each different text once, `place` leads back to every row."""

    start: int
    tokens: list[Tokens]  # of the different texts
    first_rows: list[int]  # the row where each was seen first
    place: npt.NDArray[np.intp]  # (n rows,) -> index into tokens
    truncated: npt.NDArray[np.bool_]  # (different texts,)


_InFlight: TypeAlias = deque[tuple[_Window, list[tuple[Microbatch, Future[Outcome]]]]]


class Embedder(Closes):
    """A model ready to embed. Safe to use from several threads; close it or use `with`."""

    def __init__(
        self, found: Found, settings: Settings, on_status: Callable[[str], None] | None = None
    ) -> None:
        """Use `Embedder.open`, which finds the file."""
        path = self.path = found.path
        header = self.header = found.header
        card = self.card = found.choice.card
        self.settings = settings
        self.meaning = found.meaning
        self.pooling = self.meaning.pooling
        working = found.working
        self.remarks: tuple[str, ...] = (working.remark,) if working.remark else ()
        run_settings = tune.choose(
            path,
            header,
            self.meaning,
            working,
            wanted(settings),
            room=found.room,
            budget_s=tune.FIRST_USE_S if settings.tune else 0,
            on_status=on_status,
        )
        self.model = Model(path, n_gpu_layers=run_settings.n_gpu_layers, repack=run_settings.repack)
        try:
            if run_settings.tap and not tap_works(self.model, self.meaning, run_settings):
                found = replace(found, choice=found.choice.without(tap=True))
                n_tokens = min(run_settings.max_batch_tokens, found.choice.plan.max_batch_tokens)
                run_settings = replace(
                    run_settings,
                    tap=False,
                    max_batch_tokens=n_tokens,
                    batch_tokens=min(run_settings.batch_tokens, n_tokens),
                )
            self._runner = Runner(self.model, self.meaning, run_settings)
        except BaseException:
            self.model.close()
            raise
        self._closed = False
        self.plan: Plan = found.choice.plan  # what was considered, and why this
        self.room = found.room
        self.n_ctx = self.plan.n_ctx
        self.dim = self.model.dim
        self.prompts: Mapping[str, str] = card.prompts if card else {}
        self._specials = self.model.special_tokens()
        self._tokenizer = Tokenizer(
            path, header, self.model, end_token=end_token(header, card, self.pooling)
        )
        self._tokenizers = stack_pool(min(8, os.cpu_count() or 1), "gguf-embed-tokenize")

    @classmethod
    def open(
        cls,
        model: str | Path = BUILTIN,
        *,
        settings: Settings | None = None,
        on_status: Callable[[str], None] | None = None,
        on_download: hub.Progress | None = None,
    ) -> Embedder:
        """Open a model by catalog name, Hub repository, path, or "auto"; downloads it if need be.

        Quantization, GPU layers, context and microbatch are chosen for this machine, as far as
        `settings` leaves them open; `plan` tells why. A file that is here is used rather than
        another downloaded, unless that would find more room, or a better place (a GPU).

        `on_status` gets a line of text before something takes long: what was chosen, a download,
        the measurement on first use. `on_download` gets (bytes here, bytes in all).

        Raises ModelNotFound, BadModelFile, FetchFailed, DoesNotFit or NativeFailed; BadInput for a
        model not here whose licence forbids commercial use (`gguf-embed pull --accept-licence`).
        """
        settings = settings or Settings()
        return cls(find_model(model, settings, on_status, on_download), settings, on_status)

    def __repr__(self) -> str:
        return (
            f"Embedder({self.model_id!r}, quant={self.quant!r}, dim={self.dim}, "
            f"n_ctx={self.n_ctx}, pooling={self.pooling.name})"
        )

    def close(self) -> None:
        """Free the model; later calls raise BadInput."""
        self._closed = True
        self._tokenizers.shutdown()
        self._runner.close()
        self.model.close()

    @property
    def model_id(self) -> str:
        """The catalog's name of the model, else its file name."""
        return self.card.id if self.card else self.path.stem

    @property
    def quant(self) -> str:
        """Quantization of the file, as llama.cpp spells it."""
        return self.header.quant

    @overload
    def encode(
        self,
        texts: str,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: Truncate = "error",
        on_progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def encode(
        self,
        texts: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: Truncate = "error",
        on_progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]: ...
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: Truncate = "error",
        on_progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Vectors of texts: shape (dim,) for a str, (n, dim) for anything else; float32.

        `prompt_name` puts one of `prompts` in front, `prompt` any string. `dimensions` keeps the
        first values (MRL) before normalizing. A text longer than `n_ctx` is an error unless
        `truncate` says which end to cut; the end token is kept. Raises BadText, TextTooLong,
        BadOption, NativeFailed; rows are numbered as given.
        """
        single = isinstance(texts, str)
        blocks = self.stream(
            [texts] if single else texts,
            prompt_name=prompt_name,
            prompt=prompt,
            dimensions=dimensions,
            normalize=normalize,
            truncate=truncate,
            on_progress=on_progress,
            window=ENCODE_WINDOW if isinstance(texts, Sequence) else WINDOW,
        )
        parts = [block.vectors for block in blocks]
        if not parts:
            return np.empty((0, dimensions or self.dim), np.float32)
        vectors = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return vectors[0] if single else vectors

    def encode_query(
        self,
        texts: str | Iterable[str],
        *,
        task: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: Truncate = "error",
    ) -> npt.NDArray[np.float32]:
        """`encode` with the model's query prompt; `task` replaces an instruct model's default."""
        return self.encode(
            texts,
            prompt=self.prompt("query", task=task),
            dimensions=dimensions,
            normalize=normalize,
            truncate=truncate,
        )

    def encode_document(
        self,
        texts: str | Iterable[str],
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: Truncate = "error",
    ) -> npt.NDArray[np.float32]:
        """`encode` with the model's document prompt."""
        return self.encode(
            texts,
            prompt=self.prompt("document"),
            dimensions=dimensions,
            normalize=normalize,
            truncate=truncate,
        )

    def similarity(
        self, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
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
        return [int(token) for token in self._ids(text, row=0)]

    def count_tokens(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Number of tokens of each text, special tokens included, shape (n,)."""
        self._check_open()
        if isinstance(texts, str):
            texts = [texts]
        ids = self._tokenizers.map(self._ids, texts, range(len(texts)), chunksize=64)
        return np.fromiter(map(len, ids), np.int32, len(texts))

    def token_vectors(self, text: str) -> Vectors:
        """One vector per token of a text, shape (n tokens, dim), before any pooling."""
        tokens = self._ids(text, row=0)
        if len(tokens) > self.n_ctx:
            raise TextTooLong([(0, len(tokens))], self.n_ctx)
        return self._runner.token_vectors(tokens)

    def stream(
        self,
        texts: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: Truncate = "error",
        on_progress: Progress | None = None,
        window: int = WINDOW,
    ) -> Iterator[Block]:
        """`encode` block by block, in order, with memory for two windows of texts only.

        Texts that are too long (truncate="error") stop the work at the first one, but the rest of
        the input is still read, so that the error names all of them.
        """
        request = self._request(prompt_name, prompt, dimensions, normalize, truncate, on_progress)
        iterator = iter(texts)
        in_flight: _InFlight = deque()
        too_long: list[tuple[int, int]] = []
        start = 0
        try:
            while chunk := list(islice(iterator, window)):
                prepared = self._prepare(chunk, start, request, too_long)
                start += len(chunk)
                if not too_long:
                    in_flight.append((prepared, self._submit(prepared)))
                    if len(in_flight) > 1:
                        yield self._collect(in_flight, request)
            if too_long:
                raise TextTooLong(sorted(too_long), self.n_ctx)
            while in_flight:
                yield self._collect(in_flight, request)
        finally:
            for _, futures in in_flight:
                for _, future in futures:
                    future.cancel()

    def _request(
        self,
        prompt_name: str | None,
        prompt: str | None,
        dimensions: int | None,
        normalize: bool,
        truncate: Truncate,
        on_progress: Progress | None,
    ) -> _Request:
        if prompt_name is not None and prompt is not None:
            raise BadOption("prompt_name and prompt exclude each other; pass one of them")
        if truncate not in ("error", "end", "start"):
            raise BadOption(f"truncate={truncate!r}: choose 'error', 'end' or 'start'")
        card = self.card
        check_dimensions(
            dimensions,
            dim=self.dim,
            mrl_min=card.mrl_min if card else None,
            mrl_dims=card.mrl_dims if card else (),
        )
        text = self.prompt(prompt_name) if prompt_name is not None else prompt or ""
        if text and (n_tokens := len(self._ids(text, row=0))) >= self.n_ctx:
            raise BadOption(
                f"the prompt takes {n_tokens} of n_ctx={self.n_ctx} tokens and leaves none for a "
                "text; shorten it"
            )
        return _Request(
            prompt=text,
            dimensions=dimensions,
            normalize=normalize,
            truncate=truncate,
            on_progress=on_progress,
        )

    def _prepare(
        self, texts: list[str], start: int, request: _Request, too_long: list[tuple[int, int]]
    ) -> _Window:
        """Tokenize each different text once, in several threads, and cut what is too long."""
        self._check_open()
        for row, text in enumerate(texts):
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise BadText(start + row, f"is a {type(text).__name__}, not a str")
        unique: dict[str, int] = {}
        place = np.fromiter(
            (unique.setdefault(text, len(unique)) for text in texts), np.intp, len(texts)
        )
        first_rows = [0] * len(unique)
        for row in range(len(texts) - 1, -1, -1):
            first_rows[place[row]] = start + row
        tokens = list(
            self._tokenizers.map(
                self._ids, unique, first_rows, repeat(request.prompt), chunksize=64
            )
        )
        truncated = np.fromiter((len(t) > self.n_ctx for t in tokens), np.bool_, len(tokens))
        for index in np.flatnonzero(truncated):
            if request.truncate == "error":
                rows = np.flatnonzero(place == index)
                too_long.extend((start + int(row), len(tokens[index])) for row in rows)
            else:
                tokens[index] = self._cut(tokens[index], request)
        return _Window(
            start=start, tokens=tokens, first_rows=first_rows, place=place, truncated=truncated
        )

    def _ids(self, text: str, row: int, prompt: str = "") -> Tokens:
        self._check_open()
        try:
            return self._tokenizer.encode(prompt + text)
        except UnicodeEncodeError as error:
            raise BadText(
                row,
                f"character {error.start - len(prompt)} is a lone surrogate "
                f"(U+{ord(error.object[error.start]):04X}), which is no text; fix the decoding or "
                "use errors='replace'",
            ) from None
        except RunTooLong as error:
            raise BadText(row, str(error)) from None

    def _check_open(self) -> None:
        """Native pointers of a closed model lead nowhere."""
        if self._closed:
            raise BadInput(f"{self!r} is closed; open the model again")

    def _cut(self, tokens: Tokens, request: _Request) -> Tokens:
        """Cut to n_ctx from the end or the start of the text; prompt and special tokens stay."""
        tail = 1 if int(tokens[-1]) in self._specials else 0
        if request.truncate == "end":
            return np.concatenate([tokens[: self.n_ctx - tail], tokens[len(tokens) - tail :]])
        head = _agree(tokens, self._ids(request.prompt, row=0)) if request.prompt else 0
        head = max(head, 1 if int(tokens[0]) in self._specials else 0)
        return np.concatenate([tokens[:head], tokens[len(tokens) - (self.n_ctx - head) :]])

    def _submit(self, window: _Window) -> list[tuple[Microbatch, Future[Outcome]]]:
        """Pack the window and hand it to the contexts."""
        tokens, settings = window.tokens, self._runner.settings
        exact = self.settings.exact
        groups = [Shared(rows=tuple(range(len(tokens))), n_prefix=0)]
        if self._runner.can_share and len(tokens) > 1 and not exact:
            groups = shared_prefixes(tokens, group_cost=settings.batch_tokens // 8)
        batches: list[Microbatch] = []
        for group in groups:
            n_prefix = min(group.n_prefix, self._runner.max_prefix)
            lengths = [len(tokens[row]) - n_prefix for row in group.rows]
            # Attention runs over the prefix as well; a long one must still leave room for texts.
            room = settings.batch_tokens - min(n_prefix, settings.batch_tokens // 2)
            for batch in pack(
                lengths,
                max_tokens=room,
                max_seqs=1 if exact else settings.max_batch_seqs,
                n_prefix=n_prefix,
                n_contexts=settings.n_contexts,
            ):
                rows = tuple(group.rows[i] for i in batch.rows)
                batches.append(replace(batch, rows=rows))
        # Where there are fewer microbatches than contexts, each gets the threads of several.
        share = max(1, settings.n_contexts // max(1, len(batches)))
        return [
            (
                batch,
                self._runner.submit(
                    [tokens[row] for row in batch.rows], n_prefix=batch.n_prefix, share=share
                ),
            )
            for batch in batches
        ]

    def _collect(self, in_flight: _InFlight, request: _Request) -> Block:
        """Wait for the oldest window's microbatches and put their rows back in order.

        It leaves `in_flight` when it is done: whoever is interrupted before can cancel the rest.
        """
        self._check_open()
        window, futures = in_flight[0]
        n_same = np.bincount(window.place, minlength=len(window.tokens))
        dim = request.dimensions or self.dim
        vectors = np.empty((len(window.tokens), dim), np.float32)
        for batch, future in futures:
            outcome = future.result()
            if outcome.bad:
                row = window.first_rows[batch.rows[outcome.bad[0]]]
                raise NativeFailed(
                    f"row {row}: llama.cpp gives NaN for this text on every path; "
                    f"try another quantization of {self.model_id}, or leave the row out"
                )
            rows = list(batch.rows)
            vectors[rows] = finish(
                outcome.vectors, dimensions=request.dimensions, normalize=request.normalize
            )
            if request.on_progress is not None:
                request.on_progress(int(n_same[rows].sum()), batch.n_tokens)
        in_flight.popleft()
        counts = np.fromiter(map(len, window.tokens), np.int32, len(window.tokens))
        return Block(
            start=window.start,
            vectors=vectors[window.place],
            token_counts=counts[window.place],
            truncated=window.truncated[window.place],
        )


def _agree(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
