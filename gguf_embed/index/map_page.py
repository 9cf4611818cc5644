"""A map of passages as one HTML page that loads nothing: points, groups, texts. Pure."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Final

from gguf_embed.system.files import printable

if TYPE_CHECKING:
    from gguf_embed.index.index import Hit
    from gguf_embed.index.plane import Points

MAX_CHARS: Final = 600  # of a passage


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedPassages:
    """What a map shows; row i of each is passage i."""

    title: str
    about: str  # a line: which model, how many passages
    hits: Sequence[Hit]
    points: Points  # (n, 2)
    numbers: Sequence[int]  # of groups
    names: Sequence[str]  # of groups


def map_page(shown: MappedPassages) -> str:
    """The page."""
    files: dict[str, int] = {}
    rows: list[list[object]] = []
    for hit, (x, y), number in zip(shown.hits, shown.points.tolist(), shown.numbers, strict=True):
        file = files.setdefault(printable(hit.path), len(files))
        passage = hit.passage
        text = passage.text.strip()
        text = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …"
        headings = " > ".join(passage.headings)
        lines = [passage.first_line, passage.last_line]
        rows.append([round(x, 4), round(y, 4), number, file, *lines, hit.id, headings, text])
    data = {"files": [*files], "groups": [*shown.names], "rows": rows}
    # A text of the passages must not end the element that it is in.
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    values = {
        "TITLE": html.escape(shown.title),
        "ABOUT": html.escape(shown.about),
        "DATA": encoded.encode("utf-8", "replace").decode(),
    }
    page = resources.files("gguf_embed.index").joinpath("map.html").read_text("utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: values[place[1]], page)
