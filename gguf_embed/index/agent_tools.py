"""The tools that an agent has of an index: search, get, status. Knows nothing of any protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from gguf_embed.errors import BadOption, shown
from gguf_embed.index.index import RANKINGS, Excerpt, Hit, Index
from gguf_embed.system.files import printable

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.reranker import Reranker

MOST_HITS: Final = 50
CANDIDATES: Final = 50  # that a reranker judges
MOST_LINES: Final = 2000
MOST_KEYS: Final = 40  # that a description names
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTool:
    """A tool: its name, what it does, and the JSON schema of its parameters."""

    name: str
    about: str
    parameters: Mapping[str, Mapping[str, object]]
    required: Sequence[str] = ()

    @property
    def schema(self) -> dict[str, object]:
        """For protocols; nothing but the parameters is allowed."""
        return {
            "type": "object",
            "properties": {name: dict(each) for name, each in self.parameters.items()},
            "required": list(self.required),
            "additionalProperties": False,
        }

    def check(self, arguments: Mapping[str, object]) -> None:
        """Refuse what the schema refuses. Raises BadOption, which names the parameter."""
        known = ", ".join(self.parameters) or "none"
        for name, value in arguments.items():
            schema = self.parameters.get(name)
            if schema is None:
                raise BadOption(f"{self.name} has no parameter {name!r}; it has {known}")
            kind = cast(str, schema["type"])
            right = isinstance(value, _TYPES[kind]) and (
                kind == "boolean" or not isinstance(value, bool)
            )
            if right and kind == "array":
                right = all(isinstance(each, str) for each in cast("list[object]", value))
            if not right:
                raise BadOption(f"{name}={shown(value)}: give a JSON {kind}")
            if "enum" in schema and value not in cast("list[object]", schema["enum"]):
                raise BadOption(f"{name}={shown(value)}: choose one of {schema['enum']}")
            if kind in ("integer", "number"):
                number = cast(float, value)
                least, most = schema.get("minimum", number), schema.get("maximum", number)
                if not cast(float, least) <= number <= cast(float, most):
                    raise BadOption(f"{name}={shown(value)}: give {least} to {most}")
        for name in self.required:
            if name not in arguments:
                raise BadOption(f"{self.name} needs {name}")


class AgentTools:
    """The tools of one index. Models are opened when the first question needs them."""

    def __init__(
        self,
        index: Index,
        open_embedder: Callable[[], Embedder],
        open_reranker: Callable[[], Reranker] | None = None,
    ) -> None:
        self._index = index
        self._open_embedder = open_embedder
        self._open_reranker = open_reranker
        self._embedder: Embedder | None = None
        self._reranker: Reranker | None = None
        self.tools = _tools(index, reranks=open_reranker is not None)

    def call(self, name: str, arguments: Mapping[str, object]) -> dict[str, object]:
        """What a tool answers, fit for JSON. Raises errors of this package."""
        tool = next((each for each in self.tools if each.name == name), None)
        if tool is None:
            raise BadOption(f"no tool {name!r}; there are search, get and status")
        tool.check(arguments)
        given = cast("Mapping[str, Any]", arguments)
        if name == "search":
            return self._search(given)
        return self._get(given) if name == "get" else self._status()

    def close(self) -> None:
        """Close what was opened here."""
        for model in (self._embedder, self._reranker):
            if model is not None:
                model.close()

    def _search(self, given: Mapping[str, Any]) -> dict[str, object]:
        by, limit = given.get("by", "both"), given.get("limit", 8)
        if by != "words" and self._embedder is None:
            self._embedder = self._open_embedder()
        reranks = bool(given.get("rerank", False))
        found = self._index.search(
            given["query"],
            self._embedder,
            top=max(limit, CANDIDATES) if reranks else limit,
            by=by,
            paths=given.get("paths", ()),
            where=given.get("where", ()),
            min_score=None if reranks else given.get("min_score"),
        )
        scores = [hit.score for hit in found]
        if reranks and self._open_reranker is not None:
            if self._reranker is None:
                self._reranker = self._open_reranker()
            texts = [hit.passage.text for hit in found]
            ranked = self._reranker.rank(given["query"], texts, top=limit)
            least = given.get("min_score", -1)
            ranked = [each for each in ranked if each.score >= least]
            found, scores = [found[each.index] for each in ranked], [each.score for each in ranked]
        return {"results": [hit_dict(hit, score) for hit, score in zip(found, scores, strict=True)]}

    def _get(self, given: Mapping[str, Any]) -> dict[str, object]:
        context = given.get("context", 0)
        if ("id" in given) == ("file" in given):
            raise BadOption("get takes an id, or a file with first_line and last_line")
        if "id" in given:
            found = self._index.passage(given["id"], context=context)
        else:
            first = given.get("first_line", 1)
            last = given.get("last_line", first + MOST_LINES)
            found = [self._index.lines(given["file"], max(1, first - context), last + context)]
        return {"excerpts": [excerpt_dict(each) for each in found]}

    def _status(self) -> dict[str, object]:
        status = self._index.status()
        return {
            "model": status.facts.space.model_id,
            "quant": status.facts.space.quant,
            "n_files": status.n_files,
            "n_passages": status.n_passages,
            "updated_at": status.updated_at,
            "n_unfinished": status.unfinished,
            "n_unread": len(status.unread),
            "metadata_keys": list(status.metadata_keys),
            "folders": [
                {
                    "folder": printable(folder.path),
                    "about": folder.about,
                    "n_files": status.files_of.get(folder.id, 0),
                }
                for folder in status.folders
            ],
        }


def hit_dict(hit: Hit, score: float) -> dict[str, object]:
    """A result for programs."""
    return {
        "id": hit.id,
        "score": round(score, 4),
        "file": printable(hit.path),
        "first_line": hit.passage.first_line,
        "last_line": hit.passage.last_line,
        "headings": list(hit.passage.headings),
        "about": hit.folder.about,
        "text": hit.passage.text,
    }


def excerpt_dict(excerpt: Excerpt) -> dict[str, object]:
    """Lines for programs; of very many the first."""
    lines = excerpt.lines[:MOST_LINES]
    return {
        "file": printable(excerpt.path),
        "first_line": excerpt.first_line,
        "last_line": excerpt.first_line + len(lines) - 1,
        "n_left_out": len(excerpt.lines) - len(lines),
        "headings": list(excerpt.headings),
        "changed_since": excerpt.stale,
        "text": "\n".join(lines),
    }


def _tools(index: Index, *, reranks: bool) -> tuple[AgentTool, ...]:
    status = index.status()
    folders, keys = status.folders, ", ".join(status.metadata_keys[:MOST_KEYS])
    about = "; ".join(f"{folder.path.name}: {folder.about}" for folder in folders if folder.about)
    lines = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
    parameters: dict[str, Mapping[str, object]] = {
        "query": {"type": "string", "description": "the question, in full words"},
        "limit": {"type": "integer", "minimum": 1, "maximum": MOST_HITS, "default": 8},
        "by": {
            "type": "string",
            "enum": list(RANKINGS),
            "default": "both",
            "description": "rank by meaning and words, or by one of them; words for exact names",
        },
        "paths": {
            "type": "array",
            "items": {"type": "string"},
            "description": "only files that match one of these patterns, such as docs/*.md",
        },
        "where": {
            "type": "array",
            "items": {"type": "string"},
            "description": "only files of which all of these hold: KEY=VALUE, or KEY>=VALUE and "
            "KEY<=VALUE for numbers and dates, such as date>=2024-05"
            + (f"; keys: {keys}" if keys else ""),
        },
        "min_score": {"type": "number", "description": "only results with at least this score"},
    }
    if reranks:
        parameters["rerank"] = {
            "type": "boolean",
            "default": False,
            "description": "judge the best 50 anew: better, and slower",
        }
    return (
        AgentTool(
            name="search",
            about="Passages of the user's documents that answer a question, the best first, with "
            "file, lines and id." + (f" The documents: {about}." if about else ""),
            parameters=parameters,
            required=("query",),
        ),
        AgentTool(
            name="get",
            about="A document around a passage, by the id of a result or by file and lines.",
            parameters={
                "id": {"type": "string", "description": "of a search result"},
                "file": {"type": "string", "description": "a path, or the end of one"},
                "first_line": lines,
                "last_line": lines,
                "context": {
                    "type": "integer",
                    "minimum": 0,
                    "maximum": MOST_LINES,
                    "default": 0,
                    "description": "lines before and after",
                },
            },
        ),
        AgentTool(
            name="status",
            about="How many files and passages there are, of which folders, and when they were "
            "last brought up to date.",
            parameters={},
        ),
    )
