"""Ollama's dialect: /api/embed and what its clients ask beside it.

https://github.com/ollama/ollama/blob/main/docs/api.md. As there, a text that is too long is cut
unless `truncate` is false: the header x-truncated counts those.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from gguf_embed import __version__
from gguf_embed.errors import GgufEmbedError
from gguf_embed.server.answers import LINES, Answer, answered, dumps, text
from gguf_embed.server.asked import EmbedRequest
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.failures import Failure, Kind, Refused, failure_of
from gguf_embed.server.offers import Offer

FOREVER: Final = 100 * 365 * 86400.0  # seconds
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


class Embed(msgspec.Struct, kw_only=True):
    """The body of POST /api/embed."""

    model: str
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class Embeddings(msgspec.Struct, kw_only=True):
    """The body of POST /api/embeddings, the older route."""

    model: str
    prompt: str | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class Show(msgspec.Struct, kw_only=True):
    """The body of POST /api/show."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class Pull(msgspec.Struct, kw_only=True):
    """The body of POST /api/pull."""

    model: str | None = None
    name: str | None = None
    insecure: bool | None = None
    stream: bool | None = None


def seconds(keep_alive: str | float | None) -> float | None:
    """A duration as Go spells it ("5m", "1h30m"), or a number of seconds; below 0: for ever."""
    if keep_alive is None:
        return None
    if isinstance(keep_alive, str):
        said = keep_alive.strip()
        negative, said = said.startswith("-"), said.lstrip("+-")
        parts = _DURATION.findall(said)
        if said.replace(".", "", 1).isdigit():
            parts = [(said, "s")]
        elif not parts or _DURATION.sub("", said):
            raise Refused(
                Kind.INVALID, f"keep_alive={keep_alive!r}: send seconds, or a duration such as 5m"
            )
        value = sum(float(number) * _UNITS[unit] for number, unit in parts)
        keep_alive = -1.0 if negative else value
    return -1.0 if keep_alive < 0 else min(keep_alive, FOREVER)


async def embed(call: Call) -> Answer:
    """POST /api/embed."""
    body = await call.json(Embed)
    given = body.input if body.input is not None else []
    embedded = await call.embed(
        EmbedRequest(
            texts=[given] if isinstance(given, str) else given,
            model=_named(body.model),
            dimensions=body.dimensions,
            truncate="error" if body.truncate is False else "end",
            keep_alive_s=seconds(body.keep_alive),
        )
    )
    return answered(
        {
            "model": body.model,
            "embeddings": list(embedded.vectors),
            "total_duration": round(embedded.times.total_s * 1e9),
            "load_duration": round(embedded.times.load_s * 1e9),
            "prompt_eval_count": embedded.n_tokens,
        }
    )


async def embeddings(call: Call) -> Answer:
    """POST /api/embeddings: one vector, which this route never normalized."""
    body = await call.json(Embeddings)
    embedded = await call.embed(
        EmbedRequest(
            texts=[body.prompt] if body.prompt else [],
            model=_named(body.model),
            normalize=False,
            truncate="end",
            keep_alive_s=seconds(body.keep_alive),
        )
    )
    return answered({"embedding": embedded.vectors[0] if len(embedded.vectors) else []})


async def tags(call: Call) -> Answer:
    """GET /api/tags."""
    offers = await call.service.in_thread(call.service.models.offers.refreshed)
    return answered({"models": [_listed(offer) for offer in offers]})


async def ps(call: Call) -> Answer:
    """GET /api/ps."""
    return answered(
        {
            "models": [
                {
                    **_listed(loaded.offer),
                    "expires_at": _time(loaded.expires_at),
                    "size": loaded.used_bytes,
                    "size_vram": loaded.gpu_bytes,
                    "context_length": loaded.model.n_ctx,
                }
                for loaded in call.service.models.loaded
            ]
        }
    )


async def show(call: Call) -> Answer:
    """POST /api/show."""
    body = await call.json(Show)
    name = _named(body.model or body.name)
    offer = await call.service.in_thread(lambda: call.service.models.offers.find(name))
    card = offer.card
    architecture = card.architecture if card else ""
    info: dict[str, object] = {"general.architecture": architecture}
    if card is not None:
        info |= {
            "general.parameter_count": card.parameters,
            f"{architecture}.context_length": card.n_ctx_train,
            f"{architecture}.embedding_length": card.dim,
            f"{architecture}.pooling_type": int(card.pooling),
        }
    return answered(
        {
            "license": f"{card.licence} {card.licence_url or ''}".strip() if card else "",
            "modelfile": "",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": _details(offer),
            "model_info": info,
            "capabilities": [] if offer.is_reranker else ["embedding"],
            "modified_at": _listed(offer)["modified_at"],
        }
    )


async def pull(call: Call) -> Answer:
    """POST /api/pull."""
    body = await call.json(Pull)
    name = _named(body.model or body.name)
    puller = call.service.puller
    if puller is None:
        raise Refused(
            Kind.FORBIDDEN,
            "this server fetches no models for its clients; run `gguf-embed pull` beside it, or "
            "start it with --allow-pull",
        )
    progress = puller.pull(name)
    if body.stream is False:
        async for _ in progress:
            pass
        return answered({"status": "success"})
    return Answer(media=LINES, parts=_lines(progress))


async def _lines(progress: AsyncIterator[dict[str, object]]) -> AsyncIterator[bytes]:
    """Each step as a line; what goes wrong on the way is one, too."""
    try:
        async for step in progress:
            yield dumps(step) + b"\n"
    except asyncio.CancelledError:
        raise
    except (GgufEmbedError, OSError) as error:
        yield dumps({"error": failure_of(error).message}) + b"\n"
        return
    yield dumps({"status": "success"}) + b"\n"


async def version(call: Call) -> Answer:
    """GET /api/version."""
    return answered({"version": __version__})


async def running(call: Call) -> Answer:
    """HEAD /."""
    return text("gguf-embed is running")


def _named(name: str | None) -> str:
    if not name or not name.strip():
        raise Refused(Kind.INVALID, "model is required; GET /api/tags lists those that there are")
    return name


def _listed(offer: Offer) -> dict[str, object]:
    source = offer.source
    path = source.path if source else None
    try:
        modified: float | None = path.stat().st_mtime if path else None
    except OSError:
        modified = None
    name = offer.id if ":" in offer.id else f"{offer.id}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": _time(modified),
        "size": (source.n_bytes if source else None) or 0,
        "digest": (source.sha256 if source else None) or "",
        "details": _details(offer),
    }


def _details(offer: Offer) -> dict[str, object]:
    card, parameters = offer.card, offer.card.parameters if offer.card else None
    family = card.architecture if card else ""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": f"{parameters / 1e6:.0f}M" if parameters else "",
        "quantization_level": offer.quant or (offer.source.quant if offer.source else None) or "",
    }


def _time(seconds: float | None) -> str:
    """As Go writes times; for ever, or not known, is year 1 or far."""
    if seconds is None:
        return "0001-01-01T00:00:00Z"
    last = datetime(9999, 1, 1, tzinfo=UTC).timestamp()
    return datetime.fromtimestamp(min(seconds, last), UTC).isoformat()


def failed(failure: Failure) -> Answer:
    """{"error": message}."""
    message = failure.message
    if failure.kind is Kind.NO_MODEL:
        message = f"{message}; or try pulling it first"
    return answered({"error": message}, status=failure.status)


# Its clients ask whether it runs.
HEAD: Final = Endpoint(path="/", handler=running, summary="Runs", method="HEAD", public=True)

OLLAMA: Final = Dialect(
    name="ollama",
    title="Ollama",
    endpoints=(
        Endpoint(path="/api/embed", handler=embed, summary="Vectors of texts", request=Embed),
        Endpoint(
            path="/api/embeddings",
            handler=embeddings,
            summary="A vector that is not normalized (the older route)",
            request=Embeddings,
        ),
        Endpoint(path="/api/tags", handler=tags, summary="The models", method="GET"),
        Endpoint(path="/api/ps", handler=ps, summary="Models in memory", method="GET"),
        Endpoint(path="/api/show", handler=show, summary="Facts of a model", request=Show),
        Endpoint(path="/api/pull", handler=pull, summary="Fetch a model", request=Pull),
        Endpoint(path="/api/version", handler=version, summary="The version", method="GET"),
    ),
    failed=failed,
)
