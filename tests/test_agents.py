"""An index as tools of an agent, asked by the client of the MCP SDK over standard streams."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from gguf_embed.errors import BadOption
from gguf_embed.index.agent_tools import AgentTools
from gguf_embed.index.index import Index
from gguf_embed.index.making import Wanted, make_index
from gguf_embed.testing import FakeEmbedder, FakeReranker

COMMAND = """
import sys, time
from gguf_embed import cli
from gguf_embed.cli import options
from gguf_embed.errors import BadOption
from gguf_embed.testing import FakeEmbedder

opened = []

def open_embedder(model, settings=None, **how):
    opened.append(model)
    time.sleep(0.1)  # a second question would come in meanwhile
    if len(opened) > 1:
        raise BadOption("opened twice")
    return FakeEmbedder.open(model)

options.open_embedder = open_embedder
sys.exit(cli.main())
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    folder.mkdir()
    matter = "---\ntags: [money]\n---\n"
    text = "# Refunds\n\nWe refund late parcels.\n\nAt once.\n"
    (folder / "refunds.md").write_text(matter + text)
    (folder / "travel.md").write_text("# Travel\n\nTrains are booked by the office.\n")
    place = tmp_path / "made.index"
    with FakeEmbedder.open() as embedder:
        make_index(place, embedder, Wanted(folders={folder: "house rules"}), model="fake")
    return place


@pytest.mark.slow
def test_a_client_of_the_sdk(place: Path):
    mcp = pytest.importorskip("mcp")
    command = mcp.StdioServerParameters(
        command=sys.executable, args=["-c", COMMAND, "mcp", "--index", str(place)]
    )

    async def talk() -> dict[str, Any]:
        async with mcp.Client(command) as client:
            listed = await client.list_tools()
            at_once: list[Any] = []

            async def ask() -> None:
                at_once.append(await client.call_tool("search", {"query": "late parcels"}))

            async with anyio.create_task_group() as group:
                group.start_soon(ask)
                group.start_soon(ask)
            return {
                "at once": at_once,
                "server": client.server_info.name,
                "tools": {tool.name: tool for tool in listed.tools},
                "found": await client.call_tool("search", {"query": "late parcels", "limit": 1}),
                "unknown": await client.call_tool("search", {"query": "x", "colour": "red"}),
                "status": await client.call_tool("status", {}),
                "got": await client.call_tool("get", {"file": "travel.md", "first_line": 3}),
            }

    said = anyio.run(talk)
    assert said["server"] == "gguf-embed"
    assert [answer.is_error for answer in said["at once"]] == [False, False]
    assert said["tools"].keys() == {"search", "get", "status"}
    assert said["tools"]["search"].input_schema["additionalProperties"] is False
    assert "house rules" in said["tools"]["search"].description
    (hit,) = said["found"].structured_content["results"]
    assert hit["file"].endswith("handbook/refunds.md")
    assert (hit["last_line"], hit["about"]) == (8, "house rules")
    assert json.loads(said["found"].content[0].text) == said["found"].structured_content
    assert said["unknown"].is_error
    assert "search has no parameter 'colour'" in said["unknown"].content[0].text
    assert said["status"].structured_content["n_passages"] == 2
    (excerpt,) = said["got"].structured_content["excerpts"]
    assert excerpt["text"] == "Trains are booked by the office."


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("find", {}, "no tool 'find'"),
        ("search", {}, "search needs query"),
        ("search", {"query": 3}, "query=3: give a JSON string"),
        ("search", {"query": "x", "limit": True}, "limit=True: give a JSON integer"),
        ("search", {"query": "x", "limit": 99}, "limit=99: give 1 to 50"),
        ("search", {"query": "x", "by": "luck"}, "by='luck': choose one of"),
        ("search", {"query": "x", "paths": [1]}, "give a JSON array"),
        ("search", {"query": "x", "where": "lang=en"}, "where='lang=en': give a JSON array"),
        ("search", {"query": "x", "where": ["lang"]}, "--where 'lang': write KEY=VALUE"),
        ("search", {"query": "x", "rerank": True}, "no parameter 'rerank'"),
        ("get", {}, "takes an id, or a file"),
        ("get", {"id": "aaaa", "file": "x"}, "takes an id, or a file"),
        ("status", {"verbose": True}, "status has no parameter 'verbose'; it has none"),
    ],
)
def test_what_is_refused(place: Path, name: str, arguments: dict[str, object], message: str):
    with Index.open(place) as index:
        tools = AgentTools(index, FakeEmbedder.open)
        with pytest.raises(BadOption, match=message):
            tools.call(name, arguments)


def test_metadata_chooses(place: Path):
    with Index.open(place) as index:
        tools = AgentTools(index, FakeEmbedder.open)
        search, _, status = tools.tools
        assert "keys: ext, modified, tags" in str(search.parameters["where"]["description"])
        found = tools.call("search", {"query": "x", "where": ["ext=md", "tags=money"]})["results"]
        assert [Path(hit["file"]).name for hit in found] == ["refunds.md"]
        assert tools.call(status.name, {})["metadata_keys"] == ["ext", "modified", "tags"]


def test_a_reranker_judges_anew(place: Path):
    with Index.open(place) as index:
        tools = AgentTools(index, FakeEmbedder.open, FakeReranker.open)
        asked = {"query": "trains booked", "rerank": True, "limit": 1}
        (hit,) = tools.call("search", asked)["results"]
        assert hit["file"].endswith("travel.md")
        assert hit["score"] == 0.8808
        assert tools.call("search", {**asked, "min_score": 0.9}) == {"results": []}
        (excerpt,) = tools.call("get", {"id": hit["id"], "context": 9})["excerpts"]
        assert excerpt["text"].startswith("# Travel\n\nTrains")
        tools.close()
