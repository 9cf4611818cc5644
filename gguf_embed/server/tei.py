"""The dialect of text-embeddings-inference.

https://huggingface.github.io/text-embeddings-inference. It has no field for the model: requests go
to the default one, or to that of a field `model`, which is ours. What times a request took is told
in its x-compute headers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec
import numpy as np

from gguf_embed import __version__
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.offsets import token_places
from gguf_embed.engine.options import Truncate
from gguf_embed.engine.spelling import Spelling, spelling_of
from gguf_embed.server.answers import Answer, answered, dumps
from gguf_embed.server.asked import EmbedRequest, RerankRequest, Result, Times
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.failures import Failure, Kind, Refused
from gguf_embed.server.openai import texts_of
from gguf_embed.vectors import Vectors

Direction = Literal["Left", "Right", "left", "right"]
Inputs = str | list[str | int | list[int]]
_Id = Annotated[int, msgspec.Meta(ge=0)]


class _Cut(msgspec.Struct, kw_only=True):
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    model: str | None = None

    @property
    def cutting(self) -> Truncate:
        """Which end of a text that is too long goes."""
        if not self.truncate:
            return "error"
        return "start" if (self.truncation_direction or "").lower() == "left" else "end"


class Embed(_Cut, kw_only=True):
    """The body of POST /embed."""

    inputs: Inputs
    normalize: bool | None = None
    prompt_name: str | None = None
    dimensions: int | None = None


class EmbedAll(_Cut, kw_only=True):
    """The body of POST /embed_all."""

    inputs: Inputs
    prompt_name: str | None = None


class Rerank(_Cut, kw_only=True):
    """The body of POST /rerank. A document loses its end only, whichever direction is said."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False


class SimilarityInputs(msgspec.Struct, kw_only=True):
    """One sentence and those that it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(_Cut, kw_only=True):
    """How they are embedded."""

    prompt_name: str | None = None


class Similarity(msgspec.Struct, kw_only=True):
    """The body of POST /similarity."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class Root(_Cut, kw_only=True):
    """The body of POST /: of /embed, or of /similarity."""

    inputs: Inputs | SimilarityInputs
    normalize: bool | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    parameters: SimilarityParameters | None = None


class Tokenize(msgspec.Struct, kw_only=True):
    """The body of POST /tokenize."""

    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None
    model: str | None = None


class Decode(msgspec.Struct, kw_only=True):
    """The body of POST /decode."""

    ids: list[_Id | list[_Id]]
    skip_special_tokens: bool = True
    model: str | None = None


def _texts(inputs: Inputs) -> list[str] | list[list[int]]:
    texts = texts_of(inputs)
    if not all(texts):
        raise Refused(Kind.EMPTY, "`inputs` cannot be empty")
    return texts


async def embed(call: Call) -> Answer:
    """POST /embed."""
    return await _embedded(call, await call.json(Embed))


async def root(call: Call) -> Answer:
    """POST /, where the Hub's client sends every task: vectors, or the cosines of sentences."""
    body = await call.json(Root)
    if isinstance(body.inputs, SimilarityInputs):
        return await _similarity(call, body.inputs, body.parameters or SimilarityParameters())
    return await _embedded(call, body)


async def _embedded(call: Call, body: Embed | Root) -> Answer:
    assert not isinstance(body.inputs, SimilarityInputs), "embedded elsewhere"
    embedded = await call.embed(
        EmbedRequest(
            texts=_texts(body.inputs),
            model=body.model,
            prompt_name=body.prompt_name,
            dimensions=body.dimensions,
            normalize=body.normalize is not False,
            truncate=body.cutting,
        )
    )
    return Answer(body=dumps(list(embedded.vectors)), headers=_headers(embedded))


async def embed_all(call: Call) -> Answer:
    """POST /embed_all: a vector for each token."""
    body = await call.json(EmbedAll)
    begin = time.monotonic()
    texts = _texts(body.inputs)
    call.service.limits.check_texts(texts)

    def computed(embedder: Embedder) -> tuple[list[Vectors], int]:
        prompt = embedder.prompt(body.prompt_name) if body.prompt_name else ""
        rows = [
            embedder.tokenize(prompt + each) if isinstance(each, str) else each for each in texts
        ]
        n_cut = sum(len(ids) > embedder.n_ctx for ids in rows)
        return [embedder.token_vectors(ids, truncate=body.cutting) for ids in rows], n_cut

    vectors, n_truncated = await call.service.with_embedder(body.model, computed)
    seconds = time.monotonic() - begin
    result = Result(
        model=body.model or "",
        served=call.service.models.offers.find(body.model).id,
        token_counts=np.array([len(each) for each in vectors], np.int32),
        n_tokens=sum(map(len, vectors)),
        n_truncated=n_truncated,
        n_chars=sum(map(len, texts)),
        times=Times(total_s=seconds, load_s=0, tokenize_s=0, queue_s=0, compute_s=seconds),
    )
    call.results.append(result)
    return Answer(body=dumps([list(each) for each in vectors]), headers=_headers(result))


async def similarity(call: Call) -> Answer:
    """POST /similarity: the cosine of one text to each of others."""
    body = await call.json(Similarity)
    return await _similarity(call, body.inputs, body.parameters or SimilarityParameters())


async def _similarity(call: Call, inputs: SimilarityInputs, how: SimilarityParameters) -> Answer:
    if not inputs.sentences:
        raise Refused(Kind.EMPTY, "`inputs.sentences` cannot be empty")
    embedded = await call.embed(
        EmbedRequest(
            texts=[inputs.source_sentence, *inputs.sentences],
            model=how.model,
            prompt_name=how.prompt_name,
            truncate=how.cutting,
        )
    )
    scores = embedded.vectors[1:] @ embedded.vectors[0]
    return Answer(body=dumps(scores.clip(-1, 1)), headers=_headers(embedded))


async def rerank(call: Call) -> Answer:
    """POST /rerank."""
    body = await call.json(Rerank)
    if not body.texts:
        raise Refused(Kind.EMPTY, "`texts` cannot be empty")
    asked = RerankRequest(
        query=body.query,
        documents=body.texts,
        model=body.model,
        raw_scores=body.raw_scores,
        truncate="end" if body.truncate else "error",
    )
    reranked = await call.rerank(asked)
    rows = [
        {"index": row, "score": score} | ({"text": body.texts[row]} if body.return_text else {})
        for row, score in reranked.best()
    ]
    return Answer(body=dumps(rows), headers=_headers(reranked))


async def tokenize(call: Call) -> Answer:
    """POST /tokenize: places are in bytes, of the text with its prompt in front, as there."""
    body = await call.json(Tokenize)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if not texts:
        raise Refused(Kind.EMPTY, "`inputs` cannot be empty")
    call.service.limits.check_texts(texts)

    def tokens(embedder: Embedder) -> list[list[dict[str, object]]]:
        spelling = spelling_of(embedder.path)
        prompt = embedder.prompt(body.prompt_name) if body.prompt_name else ""
        return [
            [
                each
                for each in _tokens(prompt + text, embedder.tokenize(prompt + text), spelling)
                if body.add_special_tokens or not each["special"]
            ]
            for text in texts
        ]

    return answered(await call.service.with_embedder(body.model, tokens))


def _tokens(text: str, ids: Sequence[int], spelling: Spelling) -> Iterator[dict[str, object]]:
    """Each with the part of the text that it stands for, as far as that is known."""
    raw = text.encode()
    for token, place in zip(ids, token_places(text, ids, spelling), strict=True):
        start, stop = place or (None, None)
        yield {
            "id": token,
            "text": spelling.text(token) if place is None else raw[start:stop].decode(),
            "special": not spelling.is_text(token),
            "start": start,
            "stop": stop,
        }


async def decode(call: Call) -> Answer:
    """POST /decode."""
    body = await call.json(Decode)
    rows = [each for each in body.ids if isinstance(each, list)]
    if not rows:
        rows = [[each for each in body.ids if isinstance(each, int)]]
    elif len(rows) != len(body.ids):
        raise Refused(Kind.INVALID, "ids mixes tokens and lists of tokens; send one of the two")

    def texts(embedder: Embedder) -> list[str]:
        spelling = spelling_of(embedder.path)
        return [spelling.decode(ids, skip_special=body.skip_special_tokens) for ids in rows]

    return answered(await call.service.with_embedder(body.model, texts))


async def info(call: Call) -> Answer:
    """GET /info."""
    limits, offer = call.service.limits, call.service.models.offers.default

    async with call.service.models.lease(offer.id, scores=None) as loaded:
        model = loaded.model
    kind: dict[str, object] = {
        "reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    }
    if isinstance(model, Embedder):
        kind = {"embedding": {"pooling": model.pooling.name.lower()}}
    return answered(
        {
            "model_id": offer.card.source_repo if offer.card else offer.id,
            "model_sha": None,
            "model_dtype": model.quant,
            "served_model_name": offer.id,
            "model_type": kind,
            "max_concurrent_requests": limits.max_requests,
            "max_input_length": model.n_ctx,
            "max_batch_tokens": model.run_settings.batch_tokens,
            "max_batch_requests": model.run_settings.max_batch_seqs,
            "max_client_batch_size": limits.max_texts,
            "auto_truncate": False,
            "tokenization_workers": 8,
            "version": __version__,
            "sha": None,
            "docker_label": None,
        }
    )


def _headers(result: Result) -> dict[str, str]:
    """Milliseconds, as there."""
    times = result.times
    return {
        "x-compute-type": "cpu",
        "x-compute-characters": str(result.n_chars),
        "x-compute-tokens": str(result.n_tokens),
        "x-compute-time": _ms(times.total_s),
        "x-total-time": _ms(times.total_s),
        "x-tokenization-time": _ms(times.tokenize_s),
        "x-queue-time": _ms(times.queue_s),
        "x-inference-time": _ms(times.compute_s),
    }


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))


# Its ErrorType, each with the status that it has there.
_TYPES: Final[Mapping[Kind, tuple[str, int]]] = {
    Kind.EMPTY: ("empty", 400),
    Kind.BAD_TEXT: ("tokenizer", 422),
    Kind.TOO_LONG: ("validation", 413),
    Kind.INVALID: ("validation", 413),
    Kind.TOO_LARGE: ("validation", 413),
    Kind.BUSY: ("overloaded", 429),
    Kind.NATIVE: ("backend", 424),
    Kind.ENDING: ("unhealthy", 503),
    Kind.NO_MEMORY: ("unhealthy", 503),
}


def failed(failure: Failure) -> Answer:
    """{"error": message, "error_type": type}."""
    type_, status = _TYPES.get(failure.kind, (failure.kind.value, failure.status))
    return answered({"error": failure.message, "error_type": type_}, status=status)


TEI: Final = Dialect(
    name="tei",
    title="text-embeddings-inference",
    endpoints=(
        Endpoint(path="/embed", handler=embed, summary="Vectors of texts", request=Embed),
        Endpoint(path="/", handler=root, summary="The same, or cosines", request=Root),
        Endpoint(path="/embed_all", handler=embed_all, summary="Token vectors", request=EmbedAll),
        Endpoint(path="/similarity", handler=similarity, summary="Cosines", request=Similarity),
        Endpoint(path="/rerank", handler=rerank, summary="Scores of pairs", request=Rerank),
        Endpoint(path="/tokenize", handler=tokenize, summary="Tokens", request=Tokenize),
        Endpoint(path="/decode", handler=decode, summary="Text of tokens", request=Decode),
        Endpoint(path="/info", handler=info, summary="The default model", method="GET"),
    ),
    failed=failed,
)
