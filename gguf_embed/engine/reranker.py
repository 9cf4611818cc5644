"""How well documents answer a query: a model that reads both at once.

    with Reranker.open("qwen3-reranker:0.6b") as reranker:
        scores = reranker.score("what is late chunking?", documents)  # float32, (n,), 0 to 1
        best = reranker.rank("what is late chunking?", documents, top=3)

pair (template, tokens, cut) -> pack -> run -> score (head, logistic) -> put in order
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn, Unpack, cast

import numpy as np

from gguf_embed.catalog import RERANKER, catalog
from gguf_embed.engine import arguments
from gguf_embed.engine.address import Address
from gguf_embed.engine.fingerprint import Fingerprint, known_sha256
from gguf_embed.engine.opening import Opened, open_reranker
from gguf_embed.engine.options import Ranked, RerankOptions, Scored
from gguf_embed.engine.pairs import Pairing, pairing_of
from gguf_embed.engine.pending import Meter, Pending
from gguf_embed.engine.running import Lifetime, Running
from gguf_embed.engine.score_head import ScoreHead, read_head
from gguf_embed.engine.scoring import Asked, Scoring
from gguf_embed.engine.turns import Caller
from gguf_embed.errors import BadModelFile, BadOption, TextTooLong
from gguf_embed.gguf.header import read_header
from gguf_embed.plan.plan import Plan
from gguf_embed.plan.reranker import form_of
from gguf_embed.plan.settings import Settings
from gguf_embed.plan.values import check_number, check_switch
from gguf_embed.store import download
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable
from gguf_embed.vectors import Vectors

_log = logging.getLogger(__name__)


class Reranker(Closes):
    """A model ready to score. Safe to use from several threads; close it or use `with`."""

    def __init__(self, opened: Opened, pairing: Pairing, head: ScoreHead) -> None:
        """Use `Reranker.open`, which opens the model; it is this object's to close."""
        self._keep(opened)
        self._pairing = pairing
        self._head = head

    def _keep(self, opened: Opened) -> None:
        """What every reranker has of its model."""
        self.path = opened.path
        self.header = opened.header
        self.card = opened.card
        self.settings = opened.settings  # what the caller said
        self.run_settings = opened.run  # how it runs
        self.remarks = opened.remarks
        self.plan: Plan = opened.plan  # what was considered, and why this
        self.n_ctx = opened.run.n_ctx
        self._mode = opened.mode
        self._source = opened.source
        self._again = opened.again
        self._lifetime = Lifetime(opened.backend, opened.reopen, n_ctx=self.n_ctx, shown=repr(self))
        self.meter = Meter(self._lifetime)

    @classmethod
    def open(
        cls,
        model: str | Path = RERANKER,
        *,
        settings: Settings | None = None,
        on_status: Callable[[str], None] | None = None,
        on_download: download.OnDownload | None = None,
        isolated: bool = False,
    ) -> Reranker:
        """Open a reranker by catalog name, Hub repository or path; downloads it if need be.

        All arguments are those of `Embedder.open`. A file without what makes a score of a vector
        is refused with the way to one that has it.

        Raises ModelNotFound, BadModelFile, FetchFailed, DoesNotFit, NativeFailed, BadInput.
        """
        name, settings, isolated = arguments.check_opening(
            model, settings, isolated, on_status=on_status, on_download=on_download
        )
        opened = open_reranker(
            name, settings, isolated=isolated, on_status=on_status, on_download=on_download
        )
        try:
            return cls.of(opened)
        except BaseException:
            opened.close()
            raise

    @classmethod
    def connect(cls, url: str, model: str | None = None, *, api_key: str | None = None) -> Reranker:
        """A reranker that `gguf-embed serve` has at an address: the same scores.

        Without `model` the first one that it has; without `api_key` that of $GGUF_EMBED_API_KEY.
        Raises FetchFailed where the server is not reached, BadInput where it has no reranker.
        """
        return _connected(Address.of(url, model, api_key))

    @classmethod
    def of(cls, opened: Opened) -> Reranker:
        """What the corridor has opened; with the head, which is read from the file."""
        header = read_header(opened.path, keep_arrays=True)
        form = form_of(header, opened.card, catalog.cards())
        pairing = pairing_of(header, opened.card, form.template)

        def token_of(word: str) -> int:
            ids = [int(token) for token in opened.backend.tokenize(word)]
            ids = [token for token in ids if token not in opened.backend.specials]
            if len(ids) != 1:
                raise BadModelFile(
                    f"{header.source}: its vocabulary has no token {word!r}; it is another model "
                    "than its name says"
                )
            return ids[0]

        return cls(opened, pairing, read_head(opened.path, header, form, token_of))

    def __repr__(self) -> str:
        return f"Reranker({self.model_id!r}, quant={self.quant!r}, n_ctx={self.n_ctx})"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled and copied as what opens the same file again, there: no weights travel."""
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

    @property
    def default_task(self) -> str | None:
        """The instruction that `task` replaces; None: the model takes none."""
        template = self._pairing.template
        return template.default_task if template else None

    def score(
        self, query: str, documents: Iterable[str], **options: Unpack[RerankOptions]
    ) -> Vectors:
        """How well each document answers the query: float32, shape (n,), from 0 to 1.

        A document that occurs twice is computed once. See `RerankOptions` for the options. Raises
        BadInput, BadText, TextTooLong, BadOption, NativeFailed; rows are numbered as given.
        """
        return self._scored(query, list(_documents(documents)), options).scores

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top: int | None = 10,
        **options: Unpack[RerankOptions],
    ) -> list[Ranked]:
        """The `top` documents by score, the best first; None: all of them.

        Of equal scores the first given comes first. What has no score (`on_error="skip"`) is left
        out.
        """
        if top is not None:
            top = check_number("top", top, least=1)
        texts = list(_documents(documents))
        scored = self._scored(query, texts, options)
        # NaN comes last.
        order = cast("list[int]", np.argsort(-scored.scores, kind="stable").tolist())
        return [
            Ranked(
                index=row,
                score=float(scored.scores[row]),
                document=texts[row],
                n_tokens=scored.n_tokens[row],
                truncated=scored.truncated[row],
            )
            for row in order[:top]
            if not np.isnan(scored.scores[row])
        ]

    def fingerprint(self, *, task: str | None = None, raw: bool = False) -> Fingerprint:
        """What the scores of such a call mean: those of equal fingerprints may be compared.

        Reads the model file once, where its hash is not known.
        """
        arguments.check_string("task", task)
        template = self._pairing.template
        with self._lifetime.call() as running:
            frame = self._pairing.frame(running.preparer, "", task)
            return Fingerprint(
                sha256=self._source.sha256 or known_sha256(self.path),
                pooling="rank",
                causal=self._mode.causal,
                special_tokens=tuple(frame.before.tolist() + frame.after.tolist()),
                prompt=template.up_to_document("", task) if template else "",
                dim=1,
                normalized=not check_switch("raw", raw),
            )

    def prepare(
        self, query: str, documents: Iterable[str], **options: Unpack[RerankOptions]
    ) -> Pending[Scored]:
        """A call that no thread waits for: paired and checked here, computed by its `submit`.

        Options and errors are those of `score`, but for `on_progress`, which it does not take.
        """
        asked = Asked.of(options)
        if asked.on_progress is not None:
            raise BadOption("a call that no thread waits for tells no progress; use score")
        with self._lifetime.call() as running:
            scoring = self._scoring(running, query, list(_documents(documents)), asked)
        return Pending(
            scoring.pairs, asked.priority, self._lifetime, running, collect=scoring.scored
        )

    def _scored(self, query: str, documents: list[str], options: RerankOptions) -> Scored:
        """pair -> submit -> score -> put back in order."""
        asked = Asked.of(options)
        on_progress = asked.on_progress
        with self._lifetime.call() as running:
            scoring = self._scoring(running, query, documents, asked)
            pairs = scoring.pairs
            if pairs.untokenized and on_progress is not None:
                on_progress(len(pairs.untokenized), 0)
            caller = Caller(priority=asked.priority)
            try:
                for done in running.scheduler.submit(caller, pairs.tokens).results():
                    n_documents = scoring.add(done)
                    if on_progress is not None:
                        on_progress(n_documents, done.n_tokens)
            finally:
                running.scheduler.cancel(caller)
        scored = scoring.scored()
        if any(scored.truncated):
            _log.warning(
                "%d of %d documents cut to fit into %d tokens beside the query (first: row %d); "
                "truncate='error' (--truncate error) refuses them",
                sum(scored.truncated),
                len(scored.truncated),
                self.n_ctx,
                list(scored.truncated).index(True),
            )
        return scored

    def _scoring(self, running: Running, query: str, documents: list[str], asked: Asked) -> Scoring:
        """The pairs of a call, and nothing scored yet. Raises TextTooLong."""
        pairs = self._pairing.rows(
            running.preparer,
            arguments.check_text(query, "the query"),
            documents,
            n_ctx=self.n_ctx,
            task=asked.task,
            cut=asked.cut,
            on_error=asked.on_error,
        )
        if pairs.too_long:
            raise TextTooLong(pairs.too_long, self.n_ctx)
        return Scoring(pairs, self._head, raw=asked.raw, on_error=asked.on_error)


class _Served(Reranker):
    """What `Reranker.connect` gives: scored there, put in order here."""

    def __init__(self, opened: Opened, default_task: str | None) -> None:
        self._keep(opened)
        self._default_task = default_task
        assert opened.remote is not None
        self._address = opened.remote

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled and copied as what connects again; its key stays here."""
        return _connected, (replace(self._address, api_key=None),)

    @property
    def default_task(self) -> str | None:
        """As there."""
        return self._default_task

    def fingerprint(self, *, task: str | None = None, raw: bool = False) -> Fingerprint:
        """As there."""
        from gguf_embed.engine.remote_scores import fingerprint

        with self._lifetime.call() as running:
            return fingerprint(running.backend, task=task, raw=raw)

    def prepare(self, *_: object, **options: Unpack[RerankOptions]) -> NoReturn:
        """Not of a served reranker, whose calls wait in threads."""
        raise BadOption("a served reranker is asked by score and rank; use them in a thread")

    def _scored(self, query: str, documents: list[str], options: RerankOptions) -> Scored:
        from gguf_embed.engine.remote_scores import scored

        with self._lifetime.call() as running:
            return scored(running.backend, query, documents, Asked.of(options), n_ctx=self.n_ctx)


def _connected(address: Address) -> Reranker:
    """Connect; also undoes `_Served.__reduce__`."""
    from gguf_embed.engine.remote_scores import open_remote

    return _Served(*open_remote(address))


def _documents(documents: object) -> Iterable[str]:
    if isinstance(documents, str):
        raise BadOption("documents is one str; pass a list: [document]")
    return arguments.check_texts(documents)
