"""Passages that answer a question: for people, and for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_embed.cli import console, layout

if TYPE_CHECKING:
    from gguf_embed.index.index import Excerpt, Hit
    from gguf_embed.io.record import Record

_INDENT = " " * 11
_EXCERPT_LINES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownHit:
    """A text with its score and its place."""

    score: float
    id: str
    source: str
    position: int  # line on which it begins
    last_position: int
    text: str
    more: Mapping[str, object] = field(default_factory=dict[str, object])  # further keys, of JSON
    path: Path | None = None  # of the file, for terminals that open it
    headings: Sequence[str] = ()
    about: str = ""  # what is in its folder

    @classmethod
    def of_record(cls, score: float, record: Record, **more: object) -> ShownHit:
        """Of a text that was read just now."""
        return cls(
            score=score,
            id=record.id,
            source=record.source,
            position=record.position,
            last_position=record.last_position,
            text=record.text,
            more=more,
        )

    @classmethod
    def of_index(cls, hit: Hit, score: float, **more: object) -> ShownHit:
        """Of a passage of an index."""
        from gguf_embed.system.files import printable

        extra: dict[str, object] = {
            "similarity": None if hit.similarity is None else round(hit.similarity, 6),
            "words": None if hit.words is None else round(hit.words, 6),
            "headings": list(hit.passage.headings),
            "folder": printable(hit.folder.path),
            "about": hit.folder.about,
        }
        return cls(
            score=score,
            id=hit.id,
            source=printable(hit.path),
            position=hit.passage.first_line,
            last_position=hit.passage.last_line,
            text=hit.passage.text,
            more=extra | more,
            path=hit.path,
            headings=hit.passage.headings,
            about=hit.folder.about,
        )

    def as_dict(self) -> dict[str, object]:
        """For programs."""
        return {
            "score": round(self.score, 6),
            **self.more,
            "id": self.id,
            "source": self.source,
            "position": self.position,
            "last_position": self.last_position,
            "text": self.text,
        }

    def print(self, rank: int, excerpt: Excerpt | None = None) -> None:
        """Its place and how it begins, or the lines around it."""
        place = f"{self.source}:{self.position}"
        if self.path is not None:
            place = f"{near(self.path)}:{self.position}"
            if self.last_position > self.position:
                place += f"-{self.last_position}"
        own_id = "" if self.id == place else f"  {console.plain(self.id)}"
        shown = console.linked(place, self.path, self.position)
        console.out(f"{rank:>2}  {self.score:.3f}  {shown}{own_id}")
        above = " > ".join(self.headings)
        if self.about:
            above = f"{above}  [{self.about}]" if above else f"[{self.about}]"
        if above:
            console.out(console.plain(f"{_INDENT}{above}"))
        if excerpt is not None:
            print_lines(excerpt)
            return
        for line in textwrap.wrap(
            console.plain(" ".join(self.text.split())),
            width=min(layout.width(), layout.MAX_HELP_WIDTH),
            initial_indent=_INDENT,
            subsequent_indent=_INDENT,
            max_lines=_EXCERPT_LINES,
            placeholder=" ...",
        ):
            console.out(line)


def print_lines(excerpt: Excerpt) -> None:
    """Lines of a document with their numbers."""
    width = len(str(excerpt.first_line + len(excerpt.lines)))
    for number, line in enumerate(excerpt.lines, excerpt.first_line):
        console.out(f"{number:>{width}}  {console.plain(line)}".rstrip())


def near(path: Path) -> str:
    """A path as a person here would write it."""
    from gguf_embed.system.files import printable

    try:
        return printable(path.relative_to(Path.cwd()))
    except ValueError:
        return printable(path)
