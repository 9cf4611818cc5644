"""A query and its documents as rows of tokens: what stands before, between and after them.

    Qwen3-Reranker   <|im_start|>system ... <Query>: QUERY\\n<Document>: DOCUMENT<|im_end|> ...
    XLM-RoBERTa      <s> QUERY </s></s> DOCUMENT </s>

The tokens before the document are the same in every row, so the scheduler has them computed once.
Words that look like control tokens are control tokens in the template only, never in a query or in
a document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np

from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine.options import OnError
from gguf_embed.engine.prepare import Prepared, Preparer, living
from gguf_embed.errors import BadInput, BadModelFile, BadOption, BadText
from gguf_embed.gguf.header import Header
from gguf_embed.native.model import Tokens
from gguf_embed.plan.reranker import Template

LEAST_DOCUMENT: Final = 32  # tokens that a query must leave for a document that has as many
_CONTROL, _USER_DEFINED = 3, 4  # llama.h, `enum llama_token_type`


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What is around the documents of one query."""

    before: Tokens
    prompt: str  # tokenized together with the document
    after: Tokens


class Pairing:
    """How the pairs of one model are made."""

    def __init__(
        self,
        *,
        template: Template | None,
        controls: Mapping[str, int],
        first: int | None = None,
        last: int | None = None,
    ) -> None:
        """Without a template `first` and `last` are the tokens at the ends of a text."""
        self.template = template
        self._controls = controls
        self._first, self._last = first, last

    def frame(self, preparer: Preparer, query: str, task: str | None) -> Frame:
        """What is around the documents. Raises BadInput, BadOption."""
        try:
            query.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"the query: character {error.start} is a lone surrogate, which is no text; fix "
                "the decoding or use errors='replace'"
            ) from None
        template = self.template
        if template is None:
            if task is not None:
                raise BadOption("this reranker takes no task; leave it out")
            assert self._first is not None
            assert self._last is not None
            try:
                words = preparer.bare(query)
            except BadText as error:
                raise BadInput(f"the query {str(error).removeprefix('row 0: ')}") from None
            around = [np.array([token], np.int32) for token in (self._first, self._last)]
            return Frame(
                before=np.concatenate([around[0], words, around[1], around[1]]),
                prompt="",
                after=around[1],
            )
        return Frame(
            before=self._template_ids(preparer, template.before),
            prompt=template.up_to_document(query, task),
            after=self._template_ids(preparer, template.after),
        )

    def rows(
        self,
        preparer: Preparer,
        query: str,
        documents: Sequence[str],
        *,
        n_ctx: int,
        task: str | None = None,
        cut: bool = True,
        on_error: OnError = "raise",
    ) -> Prepared:
        """A row for each different document, its end cut where it does not fit.

        Without `cut` those are among `too_long`. Raises BadInput, BadText, BadOption.
        """
        for row, document in enumerate(documents):
            if not isinstance(document, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise BadText(row, f"is a {type(document).__name__}, not a str")
        unique: dict[str, int] = {}
        place = np.fromiter(
            (unique.setdefault(text, len(unique)) for text in documents), np.intp, len(documents)
        )
        first_rows = [0] * len(unique)
        for row in range(len(documents) - 1, -1, -1):
            first_rows[place[row]] = row
        frame = self.frame(preparer, query, task)
        ids, first_rows, place, untokenized = living(
            preparer.each(unique, first_rows, prompt=frame.prompt, on_error=on_error),
            first_rows,
            place,
            0,
        )
        bodies = [preparer.without_ends(each) for each in ids]
        fits = n_ctx - len(frame.before) - len(frame.after)
        n_prompt = len(preparer.bare(frame.prompt)) if frame.prompt else 0
        longest = max(map(len, bodies), default=0)
        if bodies and fits < min(n_prompt + LEAST_DOCUMENT, longest):
            n_query = n_ctx - fits + n_prompt
            raise BadInput(
                f"the query takes {n_query} of n_ctx={n_ctx} tokens with what is around it, and "
                f"must leave {LEAST_DOCUMENT} for a document; ask a shorter one, or open the model "
                "with a larger n_ctx"
            )
        truncated = np.fromiter((len(ids) > fits for ids in bodies), np.bool_, len(bodies))
        n_around = n_ctx - fits
        too_long = [
            (row, n_around + len(bodies[index]))
            for row, index in enumerate(cast("list[int]", place.tolist()))
            if index >= 0 and truncated[index] and not cut
        ]
        return Prepared(
            start=0,
            tokens=[np.concatenate([frame.before, ids[:fits], frame.after]) for ids in bodies],
            first_rows=first_rows,
            place=place,
            truncated=truncated,
            too_long=tuple(too_long),
            untokenized=untokenized,
        )

    def _template_ids(self, preparer: Preparer, text: str) -> Tokens:
        """Control tokens as such, and the words between them."""
        spelled = sorted((name for name in self._controls if name in text), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, spelled))})", text) if spelled else [text]
        ids = [
            np.array([self._controls[piece]], np.int32)
            if piece in self._controls
            else preparer.bare(piece)
            for piece in pieces
            if piece
        ]
        return np.concatenate(ids) if ids else np.empty(0, np.int32)


def pairing_of(header: Header, card: ModelCard | None, template: Template | None) -> Pairing:
    """How the pairs of a file are made; `header` was read with `keep_arrays`.

    Raises BadModelFile.
    """
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    types = header.metadata.get("tokenizer.ggml.token_type")
    assert isinstance(tokens, tuple), "read_header(path, keep_arrays=True)"
    controls: dict[str, int] = {}
    if isinstance(types, tuple):
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False)):
            if kind in (_CONTROL, _USER_DEFINED) and isinstance(token, str) and token:
                controls[token] = number
    if template is not None:
        inside = next((name for name in controls if name in template.pair), None)
        if inside is not None:
            raise BadModelFile(
                f"{header.source}: its template has {inside!r} in the line of the query or the "
                "document, which is not supported; get a GGUF of another reranker"
            )
        return Pairing(template=template, controls=controls)
    first, last = (card.bos_id, card.eos_id) if card else (header.bos_id, header.eos_id)
    n_vocab = len(tokens)
    if first is None or last is None or not (0 <= first < n_vocab and 0 <= last < n_vocab):
        raise BadModelFile(
            f"{header.source}: the file does not say which tokens begin and end a text "
            "(tokenizer.ggml.bos_token_id, tokenizer.ggml.eos_token_id); get another GGUF of it"
        )
    return Pairing(template=None, controls=controls, first=first, last=last)
