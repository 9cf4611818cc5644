"""Cohere's dialect, v2: /v2/embed and /v2/rerank; and Jina's /v1/rerank, which is like it.

https://docs.cohere.com/reference/embed. `input_type` chooses the model's prompt where it has one.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from gguf_embed.engine.options import Truncate
from gguf_embed.server.answers import Answer, answered
from gguf_embed.server.asked import EmbedRequest, RerankRequest
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
    """The body of POST /v2/rerank and of Jina's /v1/rerank."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = False


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
    return answered(
        {
            "id": str(uuid.uuid4()),
            "results": await _results(call, body),
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }
    )


async def jina_rerank(call: Call) -> Answer:
    """POST /v1/rerank, as Jina has it."""
    body = await call.json(Rerank)
    results = await _results(call, body)
    return answered({"model": body.model, "object": "list", "results": results})


async def _results(call: Call, body: Rerank) -> list[dict[str, object]]:
    documents = [_document(each) for each in body.documents]
    asked = RerankRequest(query=body.query, documents=documents, model=body.model, truncate="end")
    scores = await call.service.rerank(asked)
    ranked = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results: list[dict[str, object]] = []
    for index in ranked:
        result: dict[str, object] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": documents[index]}
        results.append(result)
    return results


def _document(given: str | dict[str, Any]) -> str:
    text = given if isinstance(given, str) else given.get("text")
    if not isinstance(text, str):
        raise Refused(Kind.INVALID, "a document is a text, or an object with its text in `text`")
    return text


def failed(failure: Failure) -> Answer:
    """{"message": message}, with an id."""
    body = {"id": str(uuid.uuid4()), "message": failure.message}
    return answered(body, status=failure.status)


COHERE: Final = Dialect(
    name="cohere",
    title="Cohere v2, and Jina's rerank",
    endpoints=(
        Endpoint(path="/v2/embed", handler=embed, summary="Vectors of texts", request=Embed),
        Endpoint(path="/v2/rerank", handler=rerank, summary="Scores of documents", request=Rerank),
        Endpoint(
            path="/v1/rerank", handler=jina_rerank, summary="The same for Jina", request=Rerank
        ),
    ),
    failed=failed,
)
