"""The tools of an index over the Model Context Protocol; needs the extra `mcp`."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from gguf_embed import __version__
from gguf_embed.errors import BadOption, GgufEmbedError
from gguf_embed.index.agent_tools import AgentTools

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server

_HINT = (
    "Search the user's documents before answering questions about them; cite file and lines. Ask "
    "in full words. Get shows more of a document than a result does."
)


def serve_stdio(tools: AgentTools) -> None:
    """Answer one client on standard input and output, until it goes. Raises BadOption."""
    try:
        import anyio
        from mcp.server.stdio import stdio_server
    except ImportError as error:
        raise BadOption("an MCP server needs the SDK: pip install 'gguf-embed[mcp]'") from error
    server = made(tools)

    async def serve() -> None:
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    anyio.run(serve)


def made(tools: AgentTools) -> Server[Any]:
    """The server of the SDK around the tools."""
    import anyio
    import mcp_types as types
    from mcp.server.lowlevel import Server

    one_at_a_time = anyio.CapacityLimiter(1)

    async def list_tools(context: object, asked: object) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[
                types.Tool(
                    name=tool.name,
                    description=tool.about,
                    input_schema=tool.schema,
                    annotations=types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
                )
                for tool in tools.tools
            ]
        )

    async def call_tool(
        context: object, asked: types.CallToolRequestParams
    ) -> types.CallToolResult:
        call = partial(tools.call, asked.name, asked.arguments or {})
        try:
            answer = await anyio.to_thread.run_sync(call, limiter=one_at_a_time)
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
