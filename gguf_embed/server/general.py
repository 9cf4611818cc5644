"""What belongs to no dialect: health, meters, the page, the description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gguf_embed import __version__
from gguf_embed.engine.embedder import Embedder
from gguf_embed.server.answers import HTML, TEXT, Answer, answered, text
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.failures import Failure
from gguf_embed.server.meters import Meters
from gguf_embed.server.models import Loaded

PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"


async def health(call: Call) -> Answer:
    """GET /health: the process lives and answers."""
    return text("ok")


async def ready(call: Call) -> Answer:
    """GET /ready: what is loaded at the start is there, and the server does not end."""
    service = call.service
    if service.ending:
        return text("ending", status=503)
    return text("ready") if service.ready else text("loading", status=503)


def failed(failure: Failure) -> Answer:
    """{"error": message, "code": code}."""
    return answered({"error": failure.message, "code": failure.kind.value}, status=failure.status)


def general(meters: Meters, pages: Callable[[str], Answer]) -> Dialect:
    """The routes; `pages` gives a page by its path."""

    async def metrics(call: Call) -> Answer:
        meters.models({each.offer.id: _state(each) for each in call.service.models.loaded})
        return Answer(body=meters.text(), media=PROMETHEUS)

    async def status(call: Call) -> Answer:
        return answered(_status(call, meters))

    async def root(call: Call) -> Answer:
        accept = call.header(b"accept") or ""
        if "text/html" in accept:
            return pages("/")
        return text("gguf-embed is running")

    async def page(call: Call) -> Answer:
        return pages(call.scope["path"])

    return Dialect(
        name="general",
        title="Of the server",
        failed=failed,
        endpoints=(
            Endpoint(
                path="/health",
                handler=health,
                summary="Alive",
                method="GET",
                public=True,
                media=TEXT,
            ),
            Endpoint(
                path="/ready", handler=ready, summary="Ready", method="GET", public=True, media=TEXT
            ),
            Endpoint(
                path="/metrics",
                handler=metrics,
                summary="For Prometheus",
                method="GET",
                media=PROMETHEUS,
            ),
            Endpoint(path="/status", handler=status, summary="Models and load", method="GET"),
            Endpoint(
                path="/", handler=root, summary="A page", method="GET", public=True, media=HTML
            ),
            Endpoint(
                path="/docs", handler=page, summary="A page", method="GET", public=True, media=HTML
            ),
            Endpoint(
                path="/openapi.json",
                handler=page,
                summary="This description",
                method="GET",
                public=True,
            ),
        ),
    )


def _state(loaded: Loaded) -> tuple[int, int]:
    """Tokens that wait, and deaths of the child."""
    return loaded.model.meter.waiting_tokens, loaded.model.meter.n_deaths


def _status(call: Call, meters: Meters) -> dict[str, object]:
    service = call.service
    return {
        "version": __version__,
        "started_at": service.started_at,
        "ready": service.ready and not service.ending,
        "requests_in_flight": meters.in_flight,
        "models": [_loaded(each) for each in service.models.loaded],
        "default": service.models.offers.default_for(scores=False).id,
    }


def _loaded(loaded: Loaded) -> dict[str, object]:
    model = loaded.model
    gives: dict[str, object] = {"gives": "scores"}
    if isinstance(model, Embedder):
        gives = {"gives": "vectors", "dim": model.dim, "prompts": dict(model.prompts)}
    return {
        "id": loaded.offer.id,
        **gives,
        "quant": model.quant,
        "n_ctx": model.n_ctx,
        "memory_bytes": loaded.used_bytes,
        "tokens_per_s": round(loaded.tokens_per_s, 1),
        "waiting_tokens": model.meter.waiting_tokens,
        "expires_at": loaded.expires_at,
    }
