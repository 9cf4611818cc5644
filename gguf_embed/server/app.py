"""The ASGI application: every dialect's routes behind the same door."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from gguf_embed.server.agent_routes import agent_routes
from gguf_embed.server.answers import Answer
from gguf_embed.server.call import Bodies, Call
from gguf_embed.server.cohere import COHERE
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.failures import Kind, Refused
from gguf_embed.server.front import Door, Front
from gguf_embed.server.general import general
from gguf_embed.server.meters import Meters
from gguf_embed.server.native import NATIVE
from gguf_embed.server.ollama import HEAD, OLLAMA
from gguf_embed.server.openai import OPENAI
from gguf_embed.server.pages import pages
from gguf_embed.server.safety import Keys
from gguf_embed.server.searching import SEARCHING
from gguf_embed.server.service import Service
from gguf_embed.server.tei import TEI
from gguf_embed.server.traces import Traces


def dialects(meters: Meters, origins: Sequence[str] = ()) -> tuple[Dialect, ...]:
    """All; of a path and a method that two of them have, the first one's is taken."""
    spoken = (OPENAI, OLLAMA, TEI, COHERE, NATIVE, SEARCHING, agent_routes(origins))
    return (*spoken, general(meters, pages(spoken)))


def application(
    service: Service,
    meters: Meters,
    *,
    keys: Keys,
    hosts: frozenset[str] | None = None,
    origins: Sequence[str] = (),
    traces: Traces | None = None,
    lifespan: Callable[[], AbstractAsyncContextManager[None]] | None = None,
) -> ASGIApp:
    """For an ASGI server. `hosts` None: any; `origins`: web pages that may ask (CORS)."""
    door = Door(
        service=service,
        meters=meters,
        bodies=Bodies(service.limits.max_bodies_bytes),
        keys=keys,
        hosts=hosts,
        traces=traces or Traces(),
    )
    spoken = dialects(meters, origins)
    by_path: dict[str, dict[str, tuple[Dialect, Endpoint]]] = {}
    for dialect in spoken:
        for endpoint in dialect.endpoints:
            methods = by_path.setdefault(endpoint.path, {})
            methods.setdefault(endpoint.method, (dialect, endpoint))
    for methods in by_path.values():
        if "GET" in methods:
            methods.setdefault("HEAD", methods["GET"])
    by_path["/"]["HEAD"] = (OLLAMA, HEAD)

    @asynccontextmanager
    async def living(_: Any) -> AsyncGenerator[None]:
        if lifespan is None:
            yield
            return
        async with lifespan():
            yield

    router = Router(
        [Route(path, Front(door, methods)) for path, methods in by_path.items()],
        redirect_slashes=False,
        default=_Nowhere(door, spoken),
        lifespan=living,
    )
    if not origins:
        return router
    return CORSMiddleware(
        router,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
        expose_headers=["x-request-id", "x-truncated"],
    )


class _Nowhere:
    """What has no route is refused in the dialect that its path looks like."""

    def __init__(self, door: Door, spoken: Sequence[Dialect]) -> None:
        self._fronts = {dialect.name: Front(door, _every(dialect, _no_route)) for dialect in spoken}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":  # a WebSocket
            await receive()
            await send({"type": "websocket.close", "code": 1002})
            return
        path: str = scope["path"]
        prefixes = {"/v1/": "openai", "/api/": "ollama", "/v2/": "cohere", "/gguf-embed/": "native"}
        name = next((prefixes[each] for each in prefixes if path.startswith(each)), "general")
        await self._fronts[name](scope, receive, send)


async def _no_route(call: Call) -> Answer:
    raise Refused(
        Kind.NO_ROUTE,
        f"there is no route {call.scope['method']} {call.scope['path']}; /docs lists those that "
        "there are",
    )


def _every(
    dialect: Dialect, handler: Callable[[Call], Awaitable[Answer]]
) -> Mapping[str, tuple[Dialect, Endpoint]]:
    """Any method of a path that is not there."""
    endpoint = Endpoint(path="(none)", handler=handler, summary="")
    methods = ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS")
    return dict.fromkeys(methods, (dialect, endpoint))
