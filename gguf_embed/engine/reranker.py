"""How well documents answer a query: a model that reads both at once.

    with Reranker.open("qwen3-reranker:0.6b") as reranker:
        scores = reranker.score("what is late chunking?", documents)  # float32, (n,), 0 to 1
        best = reranker.rank("what is late chunking?", documents, top=3)

pair (template, tokens, cut) -> pack -> run -> score (head, logistic) -> put in order
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack, cast

import numpy as np

from gguf_embed.catalog import RERANKER, catalog
from gguf_embed.engine import arguments
from gguf_embed.engine.fingerprint import Fingerprint, known_sha256
from gguf_embed.engine.opening import Opened, open_reranker
from gguf_embed.engine.options import OnProgress, Ranked, RerankOptions
from gguf_embed.engine.pairs import Pairing, pairing_of
from gguf_embed.engine.prepare import Prepared
from gguf_embed.engine.running import Lifetime, Running
from gguf_embed.engine.score_head import ScoreHead, logistic, read_head
from gguf_embed.engine.stream import DIED, NO_VECTOR, no_vector
from gguf_embed.engine.turns import Caller, Priority
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """The pairs of a call and their scores, row by row."""

    scores: Vectors  # (n,)
    n_tokens: Sequence[int]
    truncated: Sequence[bool]


class Reranker(Closes):
    """A model ready to score. Safe to use from several threads; close it or use `with`."""

    def __init__(self, opened: Opened, pairing: Pairing, head: ScoreHead) -> None:
        """Use `Reranker.open`, which opens the model; it is this object's to close."""
        self.path = opened.path
        self.header = opened.header
        self.card = opened.card
        self.settings = opened.settings  # what the caller said
        self.run_settings = opened.run  # how it runs
        self.remarks = opened.remarks
        self.plan: Plan = opened.plan  # what was considered, and why this
        self.n_ctx = opened.run.n_ctx
        self._pairing = pairing
        self._head = head
        self._mode = opened.mode
        self._source = opened.source
        self._again = opened.again
        self._lifetime = Lifetime(opened.backend, opened.reopen, n_ctx=self.n_ctx, shown=repr(self))

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

    def _scored(self, query: str, documents: list[str], options: RerankOptions) -> _Scored:
        """pair -> submit -> score -> put back in order."""
        arguments.check_names(options, RerankOptions)
        arguments.check_text(query, "the query")
        truncate = arguments.check_document_truncate(options.get("truncate", "end"))
        task = arguments.check_string("task", options.get("task"))
        raw = check_switch("raw", options.get("raw", False))
        on_error = arguments.check_on_error(options.get("on_error", "raise"))
        priority = arguments.check_priority(options.get("priority", Priority.NORMAL))
        on_progress = options.get("on_progress")
        arguments.check_callback("on_progress", on_progress)
        with self._lifetime.call() as running:
            pairs = self._pairing.rows(
                running.preparer,
                query,
                documents,
                n_ctx=self.n_ctx,
                task=task,
                cut=truncate == "end",
                on_error=on_error,
            )
            if pairs.too_long:
                raise TextTooLong(pairs.too_long, self.n_ctx)
            logits, reasons = self._logits(running, pairs, Caller(priority=priority), on_progress)
        for index, reason in sorted(reasons.items()):
            if on_error == "raise":
                raise no_vector(pairs.first_rows[index], len(pairs.tokens[index]), reason)
        # The last one stands for documents that have no tokens.
        place = pairs.place
        truncated = cast("list[bool]", np.append(pairs.truncated, False)[place].tolist())
        if any(truncated):
            _log.warning(
                "%d of %d documents cut to fit into %d tokens beside the query (first: row %d); "
                "truncate='error' (--truncate error) refuses them",
                sum(truncated),
                len(truncated),
                self.n_ctx,
                truncated.index(True),
            )
        scores: Vectors = logits if raw else logistic(logits)
        n_tokens = np.fromiter(map(len, pairs.tokens), np.int32, len(pairs.tokens))
        return _Scored(
            scores=np.append(scores, np.float32(np.nan))[place],
            n_tokens=cast("list[int]", np.append(n_tokens, 0)[place].tolist()),
            truncated=truncated,
        )

    def _logits(
        self,
        running: Running,
        pairs: Prepared,
        caller: Caller,
        on_progress: OnProgress | None,
    ) -> tuple[Vectors, dict[int, str]]:
        """Of each different pair, NaN where there is none; and why there is none."""
        logits = np.full(len(pairs.tokens), np.nan, np.float32)
        reasons: dict[int, str] = {}
        n_same = np.bincount(pairs.place[pairs.place >= 0], minlength=len(pairs.tokens))
        if pairs.untokenized and on_progress is not None:
            on_progress(len(pairs.untokenized), 0)
        try:
            for done in running.scheduler.submit(caller, pairs.tokens).results():
                rows = np.array(done.rows, np.intp)
                with np.errstate(all="ignore"):  # what is not finite is found below
                    logits[rows] = self._head.logits(done.vectors)
                bad = {int(row) for row in rows[~np.isfinite(logits[rows])]} | set(done.bad)
                for row in bad:
                    logits[row] = np.nan
                    reasons[row] = DIED if row in done.died else NO_VECTOR
                if on_progress is not None:
                    on_progress(int(n_same[rows].sum()), done.n_tokens)
        finally:
            running.scheduler.cancel(caller)
        return logits, reasons


def _documents(documents: object) -> Iterable[str]:
    if isinstance(documents, str):
        raise BadOption("documents is one str; pass a list: [document]")
    return arguments.check_texts(documents)
