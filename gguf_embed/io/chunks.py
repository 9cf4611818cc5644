"""Where long text may be cut: Markdown sections, paragraphs, lines, words. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# About 200 tokens of English: small enough for a model of 256 or 512 tokens, large enough to
# hold a thought. A number of characters, so that the rows do not depend on the model.
PASSAGE_CHARS = 800
# A line that only looks like a heading must not be repeated in front of every passage.
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+\S.{0,199}")
_FENCE = re.compile(r" {0,3}(`{3,}(?!.*`)|~{3,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A part of a text, with the lines it stands on, from 1."""

    text: str
    first_line: int
    last_line: int


def split_markdown(lines: Iterable[str]) -> Iterator[Passage]:
    """The passages of a Markdown or plain text.

    A passage is a run of paragraphs of one section, of at most PASSAGE_CHARS characters where
    a cut between paragraphs, lines or words allows it; code between fences is one paragraph.
    Each begins with its section's heading, repeated where a section gives several passages;
    headings with nothing under them stand in front of the next. No word is left out.
    """
    headings: list[str] = []
    parts: list[str] = []
    first_line = last_line = 0
    n_chars = 0
    headed = False  # a passage with these headings is out, or begun

    def passage() -> Passage:
        text = "\n\n".join(["\n".join(headings), *parts] if headings else parts)
        return Passage(text=text, first_line=first_line, last_line=last_line)

    for line, text, is_heading in _blocks(lines):
        if is_heading:
            if parts or (headings and not headed and n_chars > PASSAGE_CHARS // 2):
                yield passage()
                headed = True
            if headed or not headings:
                headings, parts, first_line, n_chars, headed = [], [], line, 0, False
            headings.append(text)
            last_line = line
            n_chars += len(text)
            continue
        for offset, piece in _cut(text, PASSAGE_CHARS):
            if parts and n_chars + len(piece) > PASSAGE_CHARS:
                yield passage()
                parts, n_chars = [], sum(map(len, headings))
            if not parts and (headed or not headings):
                first_line = line + offset
            headed = True
            last_line = line + offset + piece.count("\n")
            parts.append(piece)
            n_chars += len(piece)
    if parts or (headings and not headed):
        yield passage()


def split_to_fit(
    text: str, *, count_tokens: Callable[[str], int], max_tokens: int
) -> Iterator[str]:
    """The text, cut near the middle (between lines, else words) until each part fits.

    Parts without a visible character are left out.
    """
    todo = [text]
    while todo:
        text = todo.pop()
        if len(text) < 2 or count_tokens(text) <= max_tokens:
            yield text
        else:
            at = _break(text, 0, (len(text) + 1) // 2)
            todo += [part for part in (text[at:], text[:at]) if part.strip()]


def _blocks(lines: Iterable[str]) -> Iterator[tuple[int, str, bool]]:
    """(line from 1, text, is a heading) of each heading and paragraph."""
    block: list[str] = []
    start = 1
    fence: str | None = None
    for number, line in enumerate(lines, 1):
        mark = _FENCE.match(line)
        if fence is not None:
            block.append(line)
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = None
            continue
        heading = mark is None and _HEADING.fullmatch(line) is not None
        if block and (heading or not line.strip()):
            yield start, "\n".join(block), False
            block = []
        if heading:
            yield number, line, True
        elif line.strip():
            if not block:
                start = number
            block.append(line)
            fence = mark[1] if mark else None
    if block:
        yield start, "\n".join(block), False


def _cut(text: str, n_chars: int) -> Iterator[tuple[int, str]]:
    """(lines before it, piece) of each piece of at most `n_chars`; only white space is lost."""
    line = start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= n_chars else _break(text, start, n_chars)
        if piece := text[start:end].rstrip():
            yield line, piece
        line += text.count("\n", start, end)
        start = end


def _break(text: str, start: int, n_chars: int) -> int:
    """Where a piece from `start` ends: after a line end, else a blank, else at `n_chars`."""
    end = start + n_chars
    for mark in ("\n", " "):
        # A cut in the first quarter would leave a crumb.
        at = text.rfind(mark, start + n_chars // 4, end)
        if at > start:
            return at + 1
    return end
