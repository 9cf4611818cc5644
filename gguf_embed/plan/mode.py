"""What decides the vectors of a model: what the user said, else the catalog, else the file.

A wrong answer gives wrong vectors without a word, so each is decided once, here, as a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gguf_embed.catalog.card import ModelCard
from gguf_embed.errors import BadModelFile, BadOption
from gguf_embed.gguf.check import check_embedder, needs_pooling
from gguf_embed.gguf.header import ENCODERS, Header
from gguf_embed.plan.settings import Settings
from gguf_embed.vectors import Pooling

_RERANKER: Final = "{}: a reranker scores pairs of texts; it gives no vectors"
_SCORES: Final = ("cls.output.weight", "cls.output.bias")  # tensors that only a reranker has


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedMode:
    """Pooling, attention, and whether the model runs without a cache."""

    pooling: Pooling
    causal: bool
    encoder: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Tokens that stand at the ends of every text, also where the file does not add them.

    None leaves an end as llama.cpp's tokenizer makes it.
    """

    first: int | None = None
    last: int | None = None


def embed_mode(
    header: Header, card: ModelCard | None, settings: Settings, *, rerankers: bool = False
) -> EmbedMode:
    """How the file is to be run; `rerankers`: even one that is made to score, not to embed.

    Raises BadModelFile for what is no embedder, BadOption for what its architecture cannot do.
    """
    said = (settings.pooling, card.pooling if card else None, header.pooling)
    pooling = next((each for each in said if each not in (None, Pooling.NONE)), None)
    check_embedder(header, pooling=pooling)
    if not rerankers:
        check_no_reranker(card, header.source)
        if _scores(header):
            raise BadModelFile(_RERANKER.format(header.source))
    if settings.pooling is Pooling.NONE:
        raise BadOption("pooling=NONE gives a text no vector; leave it out, and use token_vectors")
    if pooling is None:
        raise BadModelFile(needs_pooling(header) or f"{header.source}: no pooling")
    if pooling is Pooling.RANK:
        raise BadModelFile(_RERANKER.format(header.source))
    encoder = header.architecture in ENCODERS
    if encoder and settings.causal:
        raise BadOption(
            f"causal=True: {header.source} is a {header.architecture}, which llama.cpp never runs "
            "causally; leave it out"
        )
    causal = card.causal if card else header.causal
    causal = causal if settings.causal is None else settings.causal
    return EmbedMode(pooling=pooling, causal=causal and not encoder, encoder=encoder)


def layers_pooling(pooling: Pooling, *, encoder: bool) -> Pooling:
    """How the layers of a model are pooled: a reranker's head reads one token's vector."""
    if pooling is not Pooling.RANK:
        return pooling
    return Pooling.CLS if encoder else Pooling.LAST


def is_reranker(card: ModelCard | None, header: Header | None) -> bool:
    """Whether a model scores pairs, as the catalog says, else its file."""
    if card is not None:
        return card.kind == "reranker"
    return header is not None and _scores(header)


def _scores(header: Header) -> bool:
    return header.pooling is Pooling.RANK or any(map(header.tensor, _SCORES))


def check_no_reranker(card: ModelCard | None, name: str) -> None:
    """Raise BadModelFile for a model that the catalog knows as a reranker."""
    if card is not None and card.kind == "reranker":
        raise BadModelFile(_RERANKER.format(name))


def special_tokens(header: Header, card: ModelCard | None, mode: EmbedMode) -> SpecialTokens:
    """What the catalog says of the ends of a text; for LAST pooling, which reads the last token,
    else what the file says.
    """
    first = _within(header, card.bos_id if card and card.add_bos else None)
    if card is not None and card.add_eos is not None:
        return SpecialTokens(
            first=first, last=_within(header, card.eos_id if card.add_eos else None)
        )
    by_file = mode.pooling is Pooling.LAST and header.add_eos is not False
    return SpecialTokens(first=first, last=header.eos_id if by_file else None)


def _within(header: Header, token: int | None) -> int | None:
    """The token, if the vocabulary of the file has it."""
    return token if token is not None and token < header.n_vocab else None
