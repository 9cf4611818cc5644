"""Agents over HTTP: the tools of each index that is served, by the Model Context Protocol.

Every request passes the front, as all others do: host, key, limits, log. What a web page of another
origin sends is refused, as the protocol wants it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadOption
from gguf_embed.index.agent_tools import AgentTools
from gguf_embed.server.agents import answer_http, check_installed, made
from gguf_embed.server.answers import Answer
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.failures import Kind, Refused
from gguf_embed.server.native import failed


def agent_routes(origins: Sequence[str]) -> Dialect:
    """`origins`: web pages that may ask, beside the server's own."""

    async def ask(call: Call) -> Answer:
        """POST /mcp, /mcp/INDEX."""
        _check_origin(call, origins)
        return await _asked(call)

    summary = "An index for agents (streamable HTTP of the Model Context Protocol)"
    return Dialect(
        name="mcp",
        title="Model Context Protocol",
        endpoints=(
            Endpoint(path="/mcp", handler=ask, summary=summary),
            Endpoint(path="/mcp/{index}", handler=ask, summary=summary),
        ),
        failed=failed,
    )


def _check_origin(call: Call, origins: Sequence[str]) -> None:
    """Raise Refused for a page of elsewhere; what is no browser sends no origin."""
    origin = call.header(b"origin")
    if origin is None or origin in origins or "*" in origins:
        return
    if urlsplit(origin).netloc != (call.header(b"host") or ""):
        raise Refused(
            Kind.FORBIDDEN,
            "web pages of another origin may not ask; allow this one with --cors-origin if that is "
            "right",
        )


async def _asked(call: Call) -> Answer:
    service = call.service
    offer, index = service.indexes.find(call.scope.get("path_params", {}).get("index"))
    try:
        check_installed()
    except BadOption as error:
        raise Refused(Kind.NO_INDEX, f"{error}, on the server") from error
    body = await call.body()

    def tools_with(embedder: Embedder | None) -> AgentTools:
        def open_embedder() -> Embedder:
            assert embedder is not None, "leased for every tool that embeds"
            return embedder  # the server's to close

        return AgentTools(index, open_embedder)

    async def call_tool(name: str, arguments: Mapping[str, object]) -> dict[str, object]:
        if name == "search" and arguments.get("by") != "words":
            return await service.with_embedder(
                offer.model, lambda embedder: tools_with(embedder).call(name, arguments)
            )
        return await service.in_thread(lambda: tools_with(None).call(name, arguments))

    tools = (await service.in_thread(lambda: tools_with(None))).tools
    return await answer_http(
        made(tools, call_tool), call.scope, body, max_body_bytes=service.limits.max_body_bytes
    )
