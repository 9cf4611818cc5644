"""The main path: texts in, vectors out.

prepare (prompt, tokenize, cut) -> pack -> run -> finish (cut, normalize) -> put in order
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import numpy.typing as npt

from gguf_embed.catalog import BUILTIN
from gguf_embed.engine import arguments, bar, late
from gguf_embed.engine.address import Address
from gguf_embed.engine.options import Block, EncodeOptions, OnProgress, Truncate, VectorOptions
from gguf_embed.engine.pending import Meter, Pending, prepared
from gguf_embed.engine.running import Lifetime, Running
from gguf_embed.engine.stream import (
    ENCODE_WINDOW,
    WINDOW,
    Request,
    blocks,
)
from gguf_embed.engine.token_vectors import token_vectors
from gguf_embed.engine.trier import started_trier
from gguf_embed.engine.turns import Priority
from gguf_embed.errors import BadOption
from gguf_embed.plan.settings import Settings
from gguf_embed.plan.values import check_number, check_switch
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable
from gguf_embed.vectors import Vectors, check_dimensions, finish

if TYPE_CHECKING:
    from gguf_embed.engine.fingerprint import Fingerprint
    from gguf_embed.engine.opening import Opened
    from gguf_embed.plan.plan import Plan
    from gguf_embed.store import download


class Embedder(Closes):
    """A model ready to embed. Safe to use from several threads; close it or use `with`."""

    _ready = False

    def __init__(self, opened: Opened) -> None:
        """Use `Embedder.open`, which opens the model; it is this object's to close."""
        self.path = opened.path
        self.header = opened.header
        self.card = opened.card
        self.settings = opened.settings  # what the caller said
        self.run_settings = opened.run  # how it runs
        self.mode = opened.mode
        self.pooling = opened.mode.pooling
        self.remarks = opened.remarks
        self.plan: Plan = opened.plan  # what was considered, and why this
        self.target = opened.target
        self.n_ctx = opened.run.n_ctx
        self.dim = opened.backend.dim
        self.prompts = opened.prompts
        self._source = opened.source
        self._again = opened.again
        self._remote = opened.remote
        self._lifetime = Lifetime(
            opened.backend,
            opened.reopen,
            n_ctx=self.n_ctx,
            shown=repr(self),
            learning=opened.learning,
        )
        self.meter = Meter(self._lifetime)
        self._ready = True

    @classmethod
    def open(
        cls,
        model: str | Path = BUILTIN,
        *,
        settings: Settings | None = None,
        on_status: Callable[[str], None] | None = None,
        on_download: download.OnDownload | None = None,
        isolated: bool = False,
    ) -> Embedder:
        """Open a model by catalog name, Hub repository, path, or "auto"; downloads it if need be.

        Quantization, GPU layers, context and microbatch are chosen for this machine, as far as
        `settings` leaves them open; `plan` tells why. A file that is here is used rather than
        another downloaded, unless that would find more room, or a better place (a GPU).

        `on_status` gets a line of text before something takes long: what was chosen, a download,
        the proof of a file that is new here. `on_download` gets (bytes here, bytes in all).

        `isolated` runs the model in a child process: should a text crash native code, that text is
        named and this process goes on. It computes the same vectors.

        Raises ModelNotFound, BadModelFile, FetchFailed, DoesNotFit or NativeFailed; BadInput for a
        model not here whose licence forbids commercial use (`gguf-embed pull --accept-licence`).
        """
        name, settings, isolated = arguments.check_opening(
            model, settings, isolated, on_status=on_status, on_download=on_download
        )
        with started_trier() as worker:
            from gguf_embed.engine.opening import open_model  # half of all that is imported

            opened = open_model(
                name,
                settings,
                isolated=isolated,
                on_status=on_status,
                on_download=on_download,
                worker=worker,
            )
        try:
            return cls(opened)
        except BaseException:
            opened.close()
            raise

    @classmethod
    def connect(cls, url: str, model: str | None = None, *, api_key: str | None = None) -> Embedder:
        """A model that `gguf-embed serve` has at an address: the same calls, the same vectors.

        Without `model` its default one; without `api_key` that of $GGUF_EMBED_API_KEY. Raises
        FetchFailed where the server is not reached.
        """
        return _open_remote(cls, Address.of(url, model, api_key))

    def __repr__(self) -> str:
        return (
            f"Embedder({self.model_id!r}, quant={self.quant!r}, dim={self.dim}, "
            f"n_ctx={self.n_ctx}, pooling={self.pooling.name})"
        )

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse what would have no effect."""
        if self._ready and not hasattr(type(self), name):
            raise BadOption(
                f"{name} of an Embedder cannot be set; say it when it is opened "
                f"(Settings(n_ctx=...)) or when it is called (encode(..., dimensions=...))"
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled and copied as what opens the same file again, there: no weights travel."""
        if self._remote is not None:  # its key stays here
            return _open_remote, (type(self), replace(self._remote, api_key=None))
        model, settings, isolated = self._again
        return partial(type(self).open, settings=settings, isolated=isolated), (model,)

    def close(self) -> None:
        """Wait for the calls in flight and free the model; later calls raise BadInput."""
        self._lifetime.close()

    @property
    def model_id(self) -> str:
        """The catalog's name of the model, else its file name."""
        return self.card.id if self.card else printable(Path(self.path.stem))

    @property
    def quant(self) -> str:
        """Quantization of the file, as llama.cpp spells it."""
        return self.header.quant

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        progress: bool | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Vectors:
        """Vectors of texts: shape (dim,) for a str, (n, dim) for anything else; float32.

        See `EncodeOptions` for the options, engine/bar.py for `progress`. Raises BadInput, BadText,
        TextTooLong, BadOption, NativeFailed; rows are numbered as given.
        """
        window = ENCODE_WINDOW if isinstance(texts, Sequence) else WINDOW
        arguments.check_callback("on_progress", on_progress)
        with self._lifetime.call(), bar.watched(texts, progress, on_progress) as watch:
            blocks = self.stream(texts, on_progress=watch, window=window, **options)
            parts = [block.vectors for block in blocks]
        if not parts:
            return np.empty((0, options.get("dimensions") or self.dim), np.float32)
        vectors = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_query(
        self,
        texts: str | Iterable[str],
        *,
        task: str | None = None,
        progress: bool | None = None,
        **options: Unpack[VectorOptions],
    ) -> Vectors:
        """`encode` with the model's query prompt; `task` replaces an instruct model's default.

        It overtakes the work of other calls.
        """
        options.setdefault("priority", Priority.QUERY)
        return self._encode_with("query", task, texts, progress, options)

    def encode_document(
        self,
        texts: str | Iterable[str],
        *,
        progress: bool | None = None,
        **options: Unpack[VectorOptions],
    ) -> Vectors:
        """`encode` with the model's document prompt."""
        return self._encode_with("document", None, texts, progress, options)

    def _encode_with(
        self,
        prompt: str,
        task: str | None,
        texts: str | Iterable[str],
        progress: bool | None,
        options: VectorOptions,
    ) -> Vectors:
        for name in ("prompt", "prompt_name"):
            if name in options:
                raise BadOption(f"the {prompt} prompt is the model's own; use encode({name}=...)")
        return self.encode(
            texts, prompt=self.prompt(prompt, task=task), progress=progress, **options
        )

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """Cosine of each row of `a` with each row of `b`, shape (n, m); (dim,) counts as a row.

        Raises BadInput for vectors of different lengths, or with NaN.
        """
        left, right = (
            finish(vectors, dimensions=None, normalize=True)
            for vectors in arguments.check_vectors(a, b)
        )
        return np.clip(left @ right.T, -1, 1)  # rounding gives 1.0000001

    def prompt(self, name: str, *, task: str | None = None) -> str:
        """The text that `prompt_name=name` puts in front; "" where the model has none for it."""
        arguments.check_string("task", task)
        arguments.check_text(name, "the name of a prompt")
        if self.card is not None:
            return self.card.prompt(name, task)
        if name in ("query", "document") and task is None:
            return ""
        raise BadOption(f"{self.model_id} is not in the catalog and has no prompt {name!r}")

    def fingerprint(self, **options: Unpack[EncodeOptions]) -> Fingerprint:
        """What the vectors of such a call mean: those of equal fingerprints may be compared.

        Reads the model file once, where its hash is not known.
        """
        from gguf_embed.engine.fingerprint import Fingerprint, known_sha256

        with self._lifetime.call() as running:
            request = self._request(running, options)
            return Fingerprint(
                sha256=self._source.sha256 or known_sha256(self.path),
                pooling=self.pooling.name.lower(),
                causal=self.mode.causal,
                special_tokens=tuple(running.preparer.ids("", row=0).tolist()),
                prompt=request.prompt,
                dim=request.dim,
                normalized=request.normalize,
            )

    def tokenize(self, text: str) -> list[int]:
        """Token ids with special tokens, as the model sees them."""
        with self._lifetime.call() as running:
            return running.preparer.ids(arguments.check_text(text), row=0).tolist()

    def count_tokens(self, texts: str | Iterable[str]) -> npt.NDArray[np.int32]:
        """Number of tokens of each text, special tokens included, shape (n,)."""
        with self._lifetime.call() as running:
            return running.preparer.count(list(arguments.check_texts(texts)))

    def token_vectors(self, text: str | Sequence[int], *, truncate: Truncate = "error") -> Vectors:
        """One vector per token of a text, or of its ids, shape (n tokens, dim), before any pooling.

        A model whose dense layers come after pooling (EmbeddingGemma) has them applied to each.
        """
        cut = arguments.check_truncate(truncate)
        with self._lifetime.call() as running:
            return token_vectors(running, text, self.header.n_vocab, cut)

    def encode_chunks(
        self,
        document: str,
        spans: Sequence[tuple[int, int]],
        *,
        windows: bool = False,
        **options: Unpack[EncodeOptions],
    ) -> Vectors:
        """Late chunking: vectors of parts of a document that went through the model whole.

        `spans` are (start, end) in characters; the result has shape (len(spans), dim). See
        engine/late.py for what a vector is. A document longer than `n_ctx` is an error; with
        `windows` it goes through in parts, each of as many whole spans as fit.

        Raises BadOption for a model that pools its first token, BadInput, BadText, TextTooLong,
        NativeFailed.
        """
        late.check_pooling(self.pooling, self.model_id)
        checked = late.check_spans(spans, len(arguments.check_text(document, "the document")))
        windows = check_switch("windows", windows)
        if options.get("truncate", "error") != "error":
            raise BadOption("a document that is cut would lose chunks; pass windows=True")
        with self._lifetime.call() as running:
            request = self._request(running, options)
            if not checked:
                return np.empty((0, request.dim), np.float32)
            return late.chunk_vectors(
                running, document, checked, request, pooling=self.pooling, windows=windows
            )

    def stream(
        self,
        texts: Iterable[str],
        *,
        on_progress: OnProgress | None = None,
        window: int = WINDOW,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[Block]:
        """`encode` block by block, in order, with memory for two windows of texts only.

        Texts that are too long (truncate="error") stop the work at the first one, but the rest of
        the input is still read, so that the error names all of them.
        """
        window = check_number("window", window, least=1)
        arguments.check_callback("on_progress", on_progress)
        with self._lifetime.call() as running:
            request = self._request(running, options)
        checked = arguments.check_texts(texts)
        return blocks(self._lifetime, checked, request, window=window, on_progress=on_progress)

    def prepare(
        self, texts: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[EncodeOptions]
    ) -> Pending[Block]:
        """A call that no thread waits for: tokenized and checked here, computed by its `submit`.

        Texts may come as token ids of this model. Options and errors are those of `encode`.
        """
        with self._lifetime.call() as running:
            request = self._request(running, options)
            return prepared(self._lifetime, running, texts, request, self.header.n_vocab)

    def _request(self, running: Running, options: EncodeOptions) -> Request:
        """The options as they apply to this model. Raises BadOption."""
        arguments.check_names(options)
        prompt_name = arguments.check_string("prompt_name", options.get("prompt_name"))
        prompt = arguments.check_string("prompt", options.get("prompt"))
        if prompt_name is not None and prompt is not None:
            raise BadOption("prompt_name and prompt exclude each other; pass one of them")
        truncate = arguments.check_truncate(options.get("truncate", "error"))
        card, dimensions = self.card, options.get("dimensions")
        if dimensions is not None:
            dimensions = check_number("dimensions", dimensions, least=1)
        check_dimensions(
            dimensions,
            dim=self.dim,
            mrl_min=card.mrl_min if card else None,
            mrl_dims=card.mrl_dims if card else (),
        )
        text = self.prompt(prompt_name) if prompt_name is not None else prompt or ""
        n_ctx = arguments.check_max_tokens(options.get("max_tokens"), self.n_ctx)
        if text and (n_tokens := len(running.preparer.ids(text, row=0))) >= n_ctx:
            raise BadOption(
                f"the prompt takes {n_tokens} of n_ctx={n_ctx} tokens and leaves none for a "
                "text; shorten it"
            )
        return Request(
            prompt=text,
            dim=dimensions or self.dim,
            dimensions=dimensions,
            normalize=check_switch("normalize", options.get("normalize", True)),
            truncate=truncate,
            n_ctx=n_ctx,
            priority=arguments.check_priority(options.get("priority", Priority.NORMAL)),
            on_error=arguments.check_on_error(options.get("on_error", "raise")),
        )


def _open_remote(kind: type[Embedder], address: Address) -> Embedder:
    """Connect; also undoes `Embedder.__reduce__`."""
    from gguf_embed.engine.remote import open_remote

    return kind(open_remote(address))
