"""Cohere's dialect, v2: /v2/embed and /v2/rerank; and /v1/rerank, as its v1 and Jina have it.

https://docs.cohere.com/reference/embed, https://docs.cohere.com/reference/rerank,
https://docs.cohere.com/v1/reference/rerank, https://api.jina.ai/redoc.
`input_type` chooses the model's prompt where it has one.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

from gguf_embed.engine.options import Truncate
from gguf_embed.server.answers import Answer, answered
from gguf_embed.server.asked import EmbedRequest, Reranked, RerankRequest
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.encodings import ENCODINGS
from gguf_embed.server.failures import Failure, Kind, Refused

# Prompts of a model by `input_type`; a type that is not here names the prompt itself.
PROMPTS: Final[Mapping[str, str]] = {"search_query": "query", "search_document": "document"}
CUTS: Final[Mapping[str, Truncate]] = {"NONE": "error", "START": "start", "END": "end"}

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class Content(msgspec.Struct, kw_only=True):
    """A part of an input."""

    type: str
    text: str | None = None


class Input(msgspec.Struct, kw_only=True):
    """One of `inputs`: texts and images; only texts are taken here."""

    content: list[Content]


class Embed(msgspec.Struct, kw_only=True):
    """The body of POST /v2/embed."""

    model: str | None = None
    texts: list[str] | None = None
    inputs: list[Input] | None = None
    images: list[str] | None = None
    input_type: str | None = None
    embedding_types: list[EmbeddingType] | None = None
    output_dimension: int | None = None
    truncate: Literal["NONE", "START", "END"] | None = None


class Rerank(msgspec.Struct, kw_only=True):
    """The body of POST /v2/rerank and /v1/rerank.

    A document is cut to what the model takes, whatever a client says of tokens or chunks.
    """

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool | None = None
    rank_fields: list[str] | None = None  # of documents that are objects; else their `text`


async def embed(call: Call) -> Answer:
    """POST /v2/embed."""
    body = await call.json(Embed)
    texts = _texts(body)
    prompt_name = PROMPTS.get(body.input_type or "", body.input_type)
    embedded = await call.embed(
        EmbedRequest(
            texts=texts,
            model=body.model,
            prompt_name=prompt_name,
            prompt_if_known=True,
            dimensions=body.output_dimension,
            truncate=CUTS[body.truncate or "END"],
        )
    )
    types = body.embedding_types or ["float"]
    return answered(
        {
            "id": str(uuid.uuid4()),
            "embeddings": {type_: ENCODINGS[type_](embedded.vectors) for type_ in types},
            "texts": texts,
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": embedded.n_tokens},
            },
            "response_type": "embeddings_by_type",
        }
    )


def _texts(body: Embed) -> list[str]:
    if body.images or any(
        part.type != "text" for each in body.inputs or () for part in each.content
    ):
        raise Refused(Kind.INVALID, "images are not embedded here; send texts")
    texts = list(body.texts or ())
    for each in body.inputs or ():
        texts.append("\n".join(part.text or "" for part in each.content))
    if not texts:
        raise Refused(Kind.EMPTY, "texts is empty; send at least one text")
    return texts


async def rerank(call: Call) -> Answer:
    """POST /v2/rerank."""
    body = await call.json(Rerank)
    reranked, results = await _reranked(call, body)
    return answered({"id": str(uuid.uuid4()), "results": results, "meta": _meta(reranked, "2")})


async def rerank_v1(call: Call) -> Answer:
    """POST /v1/rerank: what the clients of both read, in one answer."""
    body = await call.json(Rerank)
    reranked, results = await _reranked(call, body)
    return answered(
        {
            "id": str(uuid.uuid4()),
            "object": "list",
            "model": reranked.model,
            "results": results,
            "usage": {"prompt_tokens": reranked.n_tokens, "total_tokens": reranked.n_tokens},
            "meta": _meta(reranked, "1"),
        }
    )


def _meta(reranked: Reranked, version: str) -> dict[str, object]:
    return {
        "api_version": {"version": version},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": reranked.n_tokens},
    }


async def _reranked(call: Call, body: Rerank) -> tuple[Reranked, list[dict[str, object]]]:
    if not body.documents:
        raise Refused(Kind.EMPTY, "documents is empty; send at least one")
    documents = [_document(each, body.rank_fields) for each in body.documents]
    reranked = await call.rerank(
        RerankRequest(query=body.query, documents=documents, model=body.model, truncate="end")
    )
    results: list[dict[str, object]] = []
    for row, score in reranked.best(body.top_n):
        result: dict[str, object] = {"index": row, "relevance_score": score}
        if body.return_documents:
            given = body.documents[row]
            result["document"] = {"text": given} if isinstance(given, str) else given
        results.append(result)
    return reranked, results


def _document(given: str | dict[str, Any], fields: Sequence[str] | None) -> str:
    """Of an object its `text`, or the fields that are named, a line for each."""
    if isinstance(given, str):
        return given
    if fields:
        missing = next((name for name in fields if name not in given), None)
        if missing is not None:
            raise Refused(Kind.INVALID, f"rank_fields names {missing!r}, which a document lacks")
        return "\n".join(str(given[name]) for name in fields)
    text = given.get("text")
    if not isinstance(text, str):
        raise Refused(Kind.INVALID, "a document is a text, or an object with its text in `text`")
    return text


def failed(failure: Failure) -> Answer:
    """{"message": message}, with an id."""
    body = {"id": str(uuid.uuid4()), "message": failure.message}
    return answered(body, status=failure.status)


COHERE: Final = Dialect(
    name="cohere",
    title="Cohere, and Jina's rerank",
    endpoints=(
        Endpoint(path="/v2/embed", handler=embed, summary="Vectors of texts", request=Embed),
        Endpoint(path="/v2/rerank", handler=rerank, summary="Scores of documents", request=Rerank),
        Endpoint(
            path="/v1/rerank",
            handler=rerank_v1,
            summary="The same, as Cohere's v1 and Jina have it",
            request=Rerank,
        ),
    ),
    failed=failed,
)
