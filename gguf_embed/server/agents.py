"""The tools of an index over the Model Context Protocol; needs the extra `mcp`."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from gguf_embed import __version__
from gguf_embed.errors import BadOption, GgufEmbedError
from gguf_embed.index.agent_tools import AgentTool, AgentTools
from gguf_embed.server.answers import Answer

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server
    from starlette.types import Message

# What a tool answers to its arguments; raises errors of this package.
CallTool: TypeAlias = Callable[[str, Mapping[str, object]], Awaitable[dict[str, object]]]

_HINT = (
    "Search the user's documents before answering questions about them; cite file and lines. Ask "
    "in full words. Get shows more of a document than a result does."
)


def serve_stdio(tools: AgentTools) -> None:
    """Answer one client on standard input and output, until it goes. Raises BadOption."""
    check_installed()
    import anyio
    from mcp.server.stdio import stdio_server

    one_at_a_time = anyio.CapacityLimiter(1)  # tools open models when they are first asked

    async def call(name: str, arguments: Mapping[str, object]) -> dict[str, object]:
        answer = partial(tools.call, name, arguments)
        return await anyio.to_thread.run_sync(answer, limiter=one_at_a_time)

    async def serve() -> None:
        server = made(tools.tools, call)
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    anyio.run(serve)


def check_installed() -> None:
    """Raise BadOption where the SDK is not there."""
    try:
        import mcp.server.lowlevel  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise BadOption("an MCP server needs the SDK: pip install 'gguf-embed[mcp]'") from error


async def answer_http(
    server: Server[Any], scope: Mapping[str, Any], body: bytes, *, max_body_bytes: int
) -> Answer:
    """The SDK's answer to one POST of streamable HTTP, which stands for itself: no session."""
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    # It tells the log of each manager, and here is one for each request.
    logging.getLogger("mcp.server.streamable_http_manager").setLevel(logging.WARNING)
    manager = StreamableHTTPSessionManager(
        server, json_response=True, stateless=True, max_request_body_size=max_body_bytes
    )
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    async with manager.run():
        await manager.handle_request(dict(scope), receive, send)
    begin = next(each for each in sent if each["type"] == "http.response.start")
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in begin["headers"]}
    media = headers.pop("content-type", "application/json")
    headers.pop("content-length", None)
    parts = [each.get("body", b"") for each in sent if each["type"] == "http.response.body"]
    return Answer(status=begin["status"], body=b"".join(parts), media=media, headers=headers)


def made(tools: Sequence[AgentTool], call: CallTool) -> Server[Any]:
    """The server of the SDK around the tools."""
    import mcp_types as types
    from mcp.server.lowlevel import Server

    async def list_tools(context: object, asked: object) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[
                types.Tool(
                    name=tool.name,
                    description=tool.about,
                    input_schema=tool.schema,
                    annotations=types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
                )
                for tool in tools
            ]
        )

    async def call_tool(
        context: object, asked: types.CallToolRequestParams
    ) -> types.CallToolResult:
        try:
            answer = await call(asked.name, asked.arguments or {})
        except GgufEmbedError as error:
            said = types.TextContent(text=" ".join(str(error).split()))
            return types.CallToolResult(content=[said], is_error=True)
        text = types.TextContent(text=json.dumps(answer, ensure_ascii=False, indent=1))
        return types.CallToolResult(content=[text], structured_content=answer)

    return Server(
        "gguf-embed",
        version=__version__,
        instructions=_HINT,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
