"""`gguf-embed mcp`: an index as tools of an agent."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from gguf_embed.catalog import RERANKER
from gguf_embed.cli import options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.indexed import open_for

DESCRIPTION = """\
Serve an index to an agent over the Model Context Protocol, on standard input and output. The agent
starts this command itself; its tools are search, get and status, and they only read.

An update of the index is seen at once. Standard output holds nothing but the protocol. It needs the
extra mcp: pip install 'gguf-embed[mcp]'."""

EPILOG = """\
in the configuration of an agent:
  {"mcpServers": {"handbook": {"command": "gguf-embed", "args": ["mcp", "--index", "handbook"]}}}

examples:
  gguf-embed mcp --index handbook
  gguf-embed mcp --index handbook --rerank qwen3-reranker:0.6b"""


def add(commands: Any) -> None:
    """The parser of `mcp`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "mcp", help=COMMANDS["mcp"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("--index", metavar="NAME|PATH", required=True, help="the index")
    parser.add_argument(
        "--rerank",
        metavar="MODEL",
        help=f"let the agent ask for the judgement of a reranker, such as {RERANKER}",
    )
    options.add_model(parser)
    parser.set_defaults(model=None, quiet=True, run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until the client goes; returns 0."""
    from gguf_embed.index.agent_tools import AgentTools
    from gguf_embed.index.index import Index
    from gguf_embed.server.agents import serve_stdio

    with Index.open(args.index) as index:
        tools = AgentTools(
            index,
            partial(open_for, index.facts, args),
            partial(options.open_reranker, args.rerank, quiet=True) if args.rerank else None,
        )
        try:
            serve_stdio(tools)
        finally:
            tools.close()
    return 0
