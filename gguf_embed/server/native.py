"""Our own dialect, of `Embedder.connect` and `Reranker.connect`: ids, vectors, scores as they are.

`gguf_embed/engine/remote.py` and `remote_scores.py` are the other end.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
import numpy as np

from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.reranker import Reranker
from gguf_embed.engine.stream import DIED
from gguf_embed.errors import TextTooLong
from gguf_embed.server.answers import Answer, answered
from gguf_embed.server.asked import EmbedRequest, RerankRequest
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.encodings import joined_base64
from gguf_embed.server.failures import Failure, Kind, Refused
from gguf_embed.server.offers import Offer


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


class AboutReranker(About, kw_only=True):
    """The body of POST /gguf-embed/v1/reranker."""

    task: str | None = None
    raw: bool = False


class Score(AboutReranker, kw_only=True):
    """The body of POST /gguf-embed/v1/score."""

    query: str
    documents: list[str]
    truncate: Literal["end", "error"] = "end"


async def about(call: Call) -> Answer:
    """POST /gguf-embed/v1/model: all that decides what a vector means."""
    body = await call.json(About)
    offer = await call.service.in_thread(lambda: call.service.models.offers.find(body.model))

    def facts(embedder: Embedder) -> dict[str, Any]:
        fingerprint = embedder.fingerprint()
        return {
            **_facts(offer, embedder),
            "sha256": fingerprint.sha256,
            "dim": embedder.dim,
            "pooling": embedder.pooling.name.lower(),
            "causal": embedder.mode.causal,
            "encoder": embedder.mode.encoder,
            "specials": list(fingerprint.special_tokens),
            "prompts": dict(embedder.prompts),
        }

    return answered(await call.service.with_embedder(body.model, facts))


async def about_reranker(call: Call) -> Answer:
    """POST /gguf-embed/v1/reranker: the same of a model that scores."""
    body = await call.json(AboutReranker)

    def facts(reranker: Reranker) -> dict[str, Any]:
        fingerprint = reranker.fingerprint(task=body.task, raw=body.raw)
        return {
            **_facts(offer, reranker),
            "sha256": fingerprint.sha256,
            "dim": 1,
            "pooling": "rank",
            "causal": fingerprint.causal,
            "encoder": not fingerprint.causal,
            "specials": [],
            "prompts": {},
            "default_task": reranker.default_task,
            "fingerprint": fingerprint.as_dict(),
        }

    models = call.service.models
    if body.model is None:
        offer = models.offers.default_for(scores=True)
    else:
        offer = await call.service.in_thread(lambda: models.offers.find(body.model))
    return answered(await call.service.with_reranker(body.model, facts))


def _facts(offer: Offer, model: Embedder | Reranker) -> dict[str, Any]:
    """Of either kind."""
    header = model.header
    file_type = header.metadata.get("general.file_type")
    return {
        "id": offer.id,
        "card": model.card.id if model.card else None,
        "file": model.path.name,
        "architecture": header.architecture,
        "file_type": file_type if isinstance(file_type, int) else 0,
        "quant": model.quant,
        "n_vocab": header.n_vocab,
        "n_ctx": model.n_ctx,
    }


async def score(call: Call) -> Answer:
    """POST /gguf-embed/v1/score: as `Reranker.score`; what has no score is told, not an error."""
    body = await call.json(Score)
    if not body.documents:
        raise Refused(Kind.EMPTY, "documents is empty; send at least one text")
    asked = RerankRequest(
        query=body.query,
        documents=body.documents,
        model=body.model,
        task=body.task,
        raw_scores=body.raw,
        truncate=body.truncate,
        on_error="skip",
    )
    try:
        scored = (await call.rerank(asked)).scored
    except TextTooLong as error:
        nothing: list[object] = []
        return answered(
            {
                "scores": "",
                "n_tokens": nothing,
                "truncated": nothing,
                "failed": nothing,
                "too_long": error.rows,
            }
        )
    return answered(
        {
            "scores": joined_base64(scored.scores),
            "n_tokens": list(scored.n_tokens),
            "truncated": list(scored.truncated),
            "failed": [(each.row, each.n_tokens, each.reason) for each in scored.failed],
            "too_long": [],
        }
    )


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
    """{"error": message, "code": code}; of one bad text also its row, and why."""
    told: dict[str, object] = {"error": failure.message, "code": failure.kind.value}
    if failure.bad_text is not None:
        told |= {"row": failure.bad_text.row, "reason": failure.bad_text.reason}
    return answered(told, status=failure.status)


NATIVE: Final = Dialect(
    name="native",
    title="gguf-embed's own, for Embedder.connect and Reranker.connect",
    endpoints=(
        Endpoint(path="/gguf-embed/v1/model", handler=about, summary="A model", request=About),
        Endpoint(path="/gguf-embed/v1/tokens", handler=tokens, summary="Tokens", request=Tokens),
        Endpoint(path="/gguf-embed/v1/run", handler=run, summary="Vectors of tokens", request=Run),
        Endpoint(
            path="/gguf-embed/v1/reranker",
            handler=about_reranker,
            summary="A reranker",
            request=AboutReranker,
        ),
        Endpoint(path="/gguf-embed/v1/score", handler=score, summary="Scores", request=Score),
    ),
    failed=failed,
)
