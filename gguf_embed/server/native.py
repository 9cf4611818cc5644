"""Our own dialect, which `Embedder.connect` speaks: token ids and vectors as they are.

`gguf_embed/engine/remote.py` is the other end.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.stream import DIED
from gguf_embed.server.answers import Answer, answered
from gguf_embed.server.asked import EmbedRequest
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.encodings import joined_base64
from gguf_embed.server.failures import Failure, Kind, Refused


class About(msgspec.Struct, kw_only=True):
    """The body of POST /gguf-embed/v1/model."""

    model: str | None = None


class Tokens(msgspec.Struct, kw_only=True):
    """The body of POST /gguf-embed/v1/tokens."""

    texts: list[str]
    model: str | None = None


class Run(msgspec.Struct, kw_only=True):
    """The body of POST /gguf-embed/v1/run: token ids end to end, int32 in base64."""

    ids: bytes
    lengths: list[int]
    tokens: bool = False  # a vector for each token of the one text
    model: str | None = None


async def about(call: Call) -> Answer:
    """POST /gguf-embed/v1/model: all that decides what a vector means."""
    body = await call.json(About)
    offer = await call.service.in_thread(lambda: call.service.models.offers.find(body.model))

    def facts(embedder: Embedder) -> dict[str, Any]:
        header, mode = embedder.header, embedder.mode
        file_type = header.metadata.get("general.file_type")
        return {
            "id": offer.id,
            "card": embedder.card.id if embedder.card else None,
            "file": embedder.path.name,
            "sha256": embedder.fingerprint().sha256,
            "architecture": header.architecture,
            "file_type": file_type if isinstance(file_type, int) else 0,
            "quant": embedder.quant,
            "n_vocab": header.n_vocab,
            "dim": embedder.dim,
            "n_ctx": embedder.n_ctx,
            "pooling": embedder.pooling.name.lower(),
            "causal": mode.causal,
            "encoder": mode.encoder,
            "specials": list(embedder.fingerprint().special_tokens),
            "prompts": dict(embedder.prompts),
        }

    return answered(await call.service.with_embedder(body.model, facts))


async def tokens(call: Call) -> Answer:
    """POST /gguf-embed/v1/tokens."""
    body = await call.json(Tokens)
    call.service.limits.check_texts(body.texts)
    if not body.texts:
        raise Refused(Kind.EMPTY, "texts is empty; send at least one text")

    def tokenized(embedder: Embedder) -> list[list[int]]:
        return [embedder.tokenize(each) for each in body.texts]

    ids = await call.service.with_embedder(body.model, tokenized)
    flat = np.concatenate([np.asarray(each, np.int32) for each in ids])
    return answered({"ids": joined_base64(flat), "lengths": [len(each) for each in ids]})


async def run(call: Call) -> Answer:
    """POST /gguf-embed/v1/run: vectors before any cut or normalizing."""
    body = await call.json(Run)
    flat = np.frombuffer(body.ids[: len(body.ids) // 4 * 4], "<i4").astype(np.int32)
    if not body.lengths or min(body.lengths) < 1 or sum(body.lengths) != len(flat):
        raise Refused(Kind.INVALID, "lengths do not add up to the ids")
    rows = [each.tolist() for each in np.split(flat, np.cumsum(body.lengths)[:-1])]
    if body.tokens:
        if len(rows) != 1:
            raise Refused(Kind.INVALID, "token vectors are computed of one text at a time")
        vectors = await call.service.with_embedder(
            body.model, lambda embedder: embedder.token_vectors(rows[0])
        )
        return answered({"vectors": joined_base64(vectors), "bad": [], "died": []})
    embedded = await call.embed(
        EmbedRequest(texts=rows, model=body.model, normalize=False, on_error="skip")
    )
    failed = embedded.failed
    return answered(
        {
            "vectors": joined_base64(np.nan_to_num(embedded.vectors)),
            "bad": [each.row for each in failed],
            "died": [each.row for each in failed if each.reason == DIED],
        }
    )


def failed(failure: Failure) -> Answer:
    """{"error": message, "code": code}."""
    return answered({"error": failure.message, "code": failure.kind.value}, status=failure.status)


NATIVE: Final = Dialect(
    name="native",
    title="gguf-embed's own, for Embedder.connect",
    endpoints=(
        Endpoint(path="/gguf-embed/v1/model", handler=about, summary="A model", request=About),
        Endpoint(path="/gguf-embed/v1/tokens", handler=tokens, summary="Tokens", request=Tokens),
        Endpoint(path="/gguf-embed/v1/run", handler=run, summary="Vectors of tokens", request=Run),
    ),
    failed=failed,
)
