"""Text and tables in the width of a terminal; words stay whole. Pure but for `width`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence

MAX_HELP_WIDTH = 100  # longer lines are hard to read
_NO_TERMINAL = 10**6
_GAP = 2
_ENTRY = re.compile(r"( +)(\S.*?)(?: {2,}(\S.*))?")
_SHELL_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|\S)+""")


def width() -> int:
    """Columns of the terminal, or $COLUMNS; a file or a pipe takes lines of any length."""
    return _columns(_NO_TERMINAL)


def _columns(otherwise: int) -> int:
    """As shutil finds them, which takes every kind of archive along when it is imported."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    if sys.__stdout__ is None:
        return otherwise
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or otherwise
    except (ValueError, OSError):  # closed, or no terminal
        return otherwise


class HelpFormatter(argparse.HelpFormatter):
    """Help in the width of the terminal; descriptions keep their lists and examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(_columns(80), MAX_HELP_WIDTH))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrap(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(reflow(text, width))


def reflow(text: str, width: int) -> Iterator[str]:
    """The lines of a text: paragraphs filled, list entries with their remark in its column.

    An entry is an indented line, `  term   remark`; lines that are indented further belong to
    it. A command that is too long goes on after a backslash.
    """
    paragraph: list[str] = []
    entry: list[str] = []

    def done() -> Iterator[str]:
        if paragraph:
            yield from _wrap(" ".join(paragraph), width)
            paragraph.clear()
        if entry:
            yield from _entry(entry, width)
            entry.clear()

    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            yield from done()
            yield ""
        elif not indent:
            if entry:
                yield from done()
            paragraph.append(line)
        elif entry and indent > len(entry[0]) - len(entry[0].lstrip()):
            entry.append(line.strip())
        else:
            yield from done()
            entry.append(line)
    yield from done()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """The lines of a table; cells that are too wide go on below, between words.

    Where even the longest words do not fit beside each other, a row is its first cell, and below
    it the others with the names of their columns.
    """
    cells = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    least = [max(map(_longest_word, column)) for column in zip(*cells, strict=True)]
    gaps = _GAP * (len(widths) - 1)
    if sum(least) + gaps > width:
        yield from _lists(columns, rows, width)
        return
    while sum(widths) + gaps > width:
        # The column that can best spare it: the widest one that its words let shrink.
        shrinking = [i for i in range(len(widths)) if widths[i] > least[i]]
        widths[max(shrinking, key=widths.__getitem__)] -= 1
    for row in cells:
        wrapped = [_wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
        for n in range(max(map(len, wrapped))):
            parts = [cell[n] if n < len(cell) else "" for cell in wrapped]
            line = (" " * _GAP).join(p.ljust(w) for p, w in zip(parts, widths, strict=True))
            yield line.rstrip()


def pairs(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """The lines of names and values, the values in one column."""
    column = max((len(name) for name, _ in rows), default=0) + _GAP
    for name, value in rows:
        yield from _wrap(value, width, first=name.ljust(column), rest=" " * column)


def indented(text: str, width: int, indent: str = "") -> Iterator[str]:
    """The lines of a text that goes on under its first word."""
    yield from _wrap(text, width, first=indent, rest=indent)


def _lists(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    for row in rows:
        yield from _wrap(row[0], width, rest="  ")
        others = zip(columns[1:], row[1:], strict=True)
        text = "; ".join(f"{name} {cell}".strip() for name, cell in others if cell)
        yield from _wrap(text, width, first="  ", rest="  ")


def _entry(lines: Sequence[str], width: int) -> Iterator[str]:
    found = _ENTRY.fullmatch(" ".join(lines))
    assert found is not None, "an indented line"
    indent, term, remark = found.groups("")
    column = found.start(3) if remark else 0
    whole = found[0]
    if len(whole) <= width:
        yield whole
    elif "gguf-embed " in term:
        yield from _command(indent, term, width)
        if remark:
            yield from _wrap(remark, width, first=indent + " " * 6, rest=indent + " " * 6)
    elif remark:
        yield from _wrap(remark, width, first=whole[:column], rest=" " * column)
    else:
        yield from _wrap(term, width, first=indent, rest=indent + "  ")


def _command(indent: str, command: str, width: int) -> Iterator[str]:
    line = indent
    for word in _SHELL_WORD.findall(command):
        if len(line) + 1 + len(word) > width - 2 and line.strip():
            yield f"{line} \\"
            line = indent + "   "
        line += word if line == indent else f" {word}"
    yield line


def _wrap(text: str, width: int, *, first: str = "", rest: str = "") -> list[str]:
    if not text:
        return [first.rstrip()] if first.strip() else []
    lines = textwrap.wrap(
        text,
        max(width, len(first) + 1, len(rest) + 1),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.rstrip() for line in lines]


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)
