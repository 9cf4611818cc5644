"""What makes a model a reranker: how a pair is put to it, and which tensors make the score. Pure.

Its layers run as an embedder's do. The score is made of the vector of the last token (decoders:
Qwen3-Reranker) or of the first one (XLM-R: bge-reranker-v2-m3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Final

from gguf_embed.catalog.card import ModelCard
from gguf_embed.errors import BadModelFile, BadOption
from gguf_embed.gguf.check import check_embedder
from gguf_embed.gguf.header import ENCODERS, Header
from gguf_embed.plan.mode import EmbedMode, layers_pooling
from gguf_embed.plan.settings import Settings
from gguf_embed.vectors import Pooling

OUTPUT: Final = "cls.output.weight"
DENSE: Final = "cls.weight"
_PLACES: Final = re.compile(r"\{(task|query|document)\}")
_FETCH: Final = (
    "fetch one that has it, such as `gguf-embed pull bge-reranker-v2-m3` or `gguf-embed pull "
    "qwen3-reranker:0.6b`, or convert the model with a current convert_hf_to_gguf.py"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A pair in words. Control tokens are looked for in `before` and `after` only."""

    before: str
    pair: str  # from the line with the query to the place of the document, which ends it
    after: str
    default_task: str | None  # None: the task cannot be chosen

    @classmethod
    def of(cls, text: str, default_task: str | None) -> Template:
        """Cut at the line of the first place and after "{document}". Raises ValueError."""
        places = [found[1] for found in _PLACES.finditer(text)]
        if "query" not in places or places.count("document") != 1 or places[-1] != "document":
            raise ValueError("needs {query}, and {document} once, as the last place")
        first = _PLACES.search(text)
        assert first, "found above"
        start = text.rfind("\n", 0, first.start()) + 1
        end = text.rindex("{document}") + len("{document}")
        return cls(
            before=text[:start], pair=text[start:end], after=text[end:], default_task=default_task
        )

    def up_to_document(self, query: str, task: str | None) -> str:
        """The pair with the query in it, in front of the document. Raises BadOption."""
        if task is not None and self.default_task is None:
            raise BadOption("the template of this reranker has no place for a task; leave it out")
        filled = {"query": query, "task": task or self.default_task or "", "document": ""}
        # In one go: what a query says must not be taken for a place.
        return _PLACES.sub(lambda place: filled[place[1]], self.pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankForm:
    """How a file reranks."""

    template: Template | None  # None: a plain pair, each text between the model's own end tokens
    output: str  # the tensor whose rows turn a vector into a score
    rows: tuple[int, ...] | None  # of it: "yes" and "no"; None: it is the language-model head
    dense: bool  # a layer and a tanh lie between the vector and the output


def rerank_mode(header: Header, card: ModelCard | None, settings: Settings) -> EmbedMode:
    """How the layers of a reranker are run. Raises BadModelFile for what is none, BadOption."""
    check_is_reranker(card, header.source)
    if settings.pooling not in (None, Pooling.RANK):
        raise BadOption(
            f"pooling={settings.pooling.name}: a reranker scores with its own head; leave it out"
        )
    encoder = header.architecture in ENCODERS
    pooling = layers_pooling(Pooling.RANK, encoder=encoder)
    check_embedder(header, pooling=pooling)
    if card is None and header.pooling is not Pooling.RANK and header.tensor(OUTPUT) is None:
        raise BadModelFile(_no_reranker(header.source))
    form_of(header, card, ())
    causal = card.causal if card else header.causal
    causal = causal if settings.causal is None else settings.causal
    return EmbedMode(pooling=pooling, causal=causal and not encoder, encoder=encoder)


def check_is_reranker(card: ModelCard | None, name: str) -> None:
    """Raise BadModelFile for a model that the catalog knows as an embedder."""
    if card is not None and card.kind != "reranker":
        raise BadModelFile(_no_reranker(name))


def form_of(header: Header, card: ModelCard | None, known: Iterable[ModelCard]) -> RerankForm:
    """How the file reranks; the catalog may know its template. Raises BadModelFile."""
    if header.architecture in ENCODERS:
        return _pair_form(header)
    text = header.metadata.get("tokenizer.chat_template.rerank")
    template = _template(header, card, text if isinstance(text, str) else None, known)
    output = header.tensor(OUTPUT)
    if output is None:
        # The recipe of the model card: two rows of the language-model head.
        if card is None or header.split[1] > 1:
            raise BadModelFile(_headless(header.source))
        tied = header.tensor("output.weight") is None
        name = "token_embd.weight" if tied else "output.weight"
        return RerankForm(template=template, output=name, rows=None, dense=False)
    labels = header.metadata.get(f"{header.architecture}.classifier.output_labels", ("yes", "no"))
    n_rows = prod(output.shape[1:])
    if n_rows != 2 or not isinstance(labels, tuple) or set(labels) != {"yes", "no"}:
        raise BadModelFile(
            f"{header.source}: {OUTPUT} has {n_rows} rows for {labels}, not those of yes and no; "
            "it is another kind of classifier"
        )
    rows = (labels.index("yes"), labels.index("no"))
    return RerankForm(template=template, output=OUTPUT, rows=rows, dense=False)


def _pair_form(header: Header) -> RerankForm:
    """An encoder's: query and document one after the other, as XLM-R puts them."""
    output = header.tensor(OUTPUT)
    if output is None or header.tensor(DENSE) is None:
        # The converter drops the layer between vector and output of a plain BERT.
        missing = OUTPUT if output is None else DENSE
        raise BadModelFile(_headless(header.source, missing))
    types = header.tensor("token_types.weight")
    n_types = 1 if types is None else prod(types.shape[1:])
    if header.architecture != "bert" or n_types > 1:
        what = f"a {header.architecture}" + (f" of {n_types} token types" if n_types > 1 else "")
        raise BadModelFile(
            f"{header.source}: {what}, which llama.cpp cannot give a pair as it was trained; take "
            "an XLM-RoBERTa such as bge-reranker-v2-m3"
        )
    if (n_rows := prod(output.shape[1:])) != 1:
        raise BadModelFile(
            f"{header.source}: {OUTPUT} has {n_rows} rows, a reranker's has one; it is another "
            "kind of classifier"
        )
    return RerankForm(template=None, output=OUTPUT, rows=(0,), dense=True)


def _template(
    header: Header, card: ModelCard | None, text: str | None, known: Iterable[ModelCard]
) -> Template:
    """The catalog's, else the file's own, which the catalog may know with a place for the task."""
    if card is not None and card.rerank_template is not None:
        return Template.of(card.rerank_template, card.default_task)
    if text is None:
        raise BadModelFile(
            f"{header.source}: the file does not say how a pair is put to the model (no "
            f"tokenizer.chat_template.rerank); {_FETCH}"
        )
    for other in known:
        template, task = other.rerank_template, other.default_task
        if template is not None and task is not None and template.replace("{task}", task) == text:
            return Template.of(template, task)
    try:
        return Template.of(text.replace("{task}", ""), None)
    except ValueError as error:
        raise BadModelFile(
            f"{header.source}: tokenizer.chat_template.rerank {error}; {_FETCH}"
        ) from None


def _no_reranker(name: str) -> str:
    return (
        f"{name}: it gives vectors, not scores of pairs; name a reranker, such as "
        "qwen3-reranker:0.6b or bge-reranker-v2-m3"
    )


def _headless(name: str, tensor: str = OUTPUT) -> str:
    return f"{name}: a reranker without its head (no {tensor}), its scores would be noise; {_FETCH}"
