"""OpenAI's dialect: /v1/embeddings and /v1/models.

https://platform.openai.com/docs/api-reference/embeddings; beyond it, as fields of our own:
`input_type` or `prompt_name` (the model's prompt), `truncate` ("error", "end" or "start"),
`normalize`.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from gguf_embed.engine.options import Truncate
from gguf_embed.server.answers import Answer, answered
from gguf_embed.server.asked import EmbedRequest
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.encodings import ENCODINGS
from gguf_embed.server.failures import Failure, Kind, Refused
from gguf_embed.server.offers import Offer


class Embeddings(msgspec.Struct, kw_only=True):
    """The body of POST /v1/embeddings."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    input_type: str | None = None
    prompt_name: str | None = None
    truncate: Truncate | None = None
    normalize: bool = True


def texts_of(given: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    """One text or several, each as str or as token ids. Raises Refused."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise Refused(Kind.EMPTY, "input is empty; send at least one text")
    if all(isinstance(each, str) for each in given):
        return [each for each in given if isinstance(each, str)]
    if all(isinstance(each, int) for each in given):
        return [[each for each in given if isinstance(each, int)]]
    if all(isinstance(each, list) for each in given):
        return [each for each in given if isinstance(each, list)]
    raise Refused(
        Kind.INVALID, "input mixes texts and token ids; send texts, or lists of token ids"
    )


async def embeddings(call: Call) -> Answer:
    """POST /v1/embeddings."""
    body = await call.json(Embeddings)
    if body.input_type is not None and body.prompt_name is not None:
        raise Refused(Kind.INVALID, "input_type and prompt_name are the same; send one of them")
    embedded = await call.embed(
        EmbedRequest(
            texts=texts_of(body.input),
            model=body.model,
            prompt_name=body.prompt_name or body.input_type,
            dimensions=body.dimensions,
            normalize=body.normalize,
            truncate=body.truncate or "error",
        )
    )
    rows = ENCODINGS[body.encoding_format or "float"](embedded.vectors)
    usage = {"prompt_tokens": embedded.n_tokens, "total_tokens": embedded.n_tokens}
    return answered(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": row}
                for index, row in enumerate(rows)
            ],
            "model": embedded.model,
            "usage": usage,
        }
    )


async def models(call: Call) -> Answer:
    """GET /v1/models."""
    offers = await call.service.in_thread(call.service.models.offers.refreshed)
    return answered({"object": "list", "data": [_model(offer, call) for offer in offers]})


async def model(call: Call) -> Answer:
    """GET /v1/models/NAME."""
    name = call.params["name"]
    offer = await call.service.in_thread(lambda: call.service.models.offers.find(name))
    return answered(_model(offer, call))


def _model(offer: Offer, call: Call) -> dict[str, object]:
    return {
        "id": offer.id,
        "object": "model",
        "created": int(call.service.started_at),
        "owned_by": offer.card.source_repo.partition("/")[0] if offer.card else "local",
        "gives": "scores" if offer.is_reranker else "vectors",  # ours
    }


_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def failed(failure: Failure) -> Answer:
    """{"error": {"message", "type", "param", "code"}}."""
    type_ = "server_error" if failure.is_ours else "invalid_request_error"
    error = {
        "message": failure.message,
        "type": _TYPES.get(failure.status, type_),
        "param": "model" if failure.kind is Kind.NO_MODEL else None,
        "code": failure.kind.value,
    }
    return answered({"error": error}, status=failure.status)


OPENAI: Final = Dialect(
    name="openai",
    title="OpenAI",
    endpoints=(
        Endpoint(
            path="/v1/embeddings",
            handler=embeddings,
            summary="Vectors of texts",
            request=Embeddings,
        ),
        Endpoint(path="/v1/models", handler=models, summary="The models", method="GET"),
        Endpoint(path="/v1/models/{name:path}", handler=model, summary="A model", method="GET"),
    ),
    failed=failed,
)
