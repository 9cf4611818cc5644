"""`gguf-embed show`: a passage of an index in its document."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.hits import near, print_lines
from gguf_embed.cli.indexed import open_in_editor
from gguf_embed.errors import BadInput, BadOption

if TYPE_CHECKING:
    from gguf_embed.index.index import Excerpt, Hit

AROUND = 10  # lines, of a passage
_MOST = 2**31 - 1

DESCRIPTION = """\
Print a document of an index around a passage, by the id that `search --index` shows, or by lines:
FILE:FROM-TO, FILE:LINE or FILE. A file may be named by the end of its path.

What is printed is what the index has of the document; it says so where the file has changed since.
The lines of a .pdf, .html or .docx are those of the text that was made of it."""

EPILOG = """\
examples:
  gguf-embed show 1f0a9c3e
  gguf-embed show 1f0a9c3e --index handbook --context 40
  gguf-embed show refunds.md:10-40 --index handbook
  gguf-embed show 1f0a9c3e --open"""


def add(commands: Any) -> None:
    """The parser of `show`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "show", help=COMMANDS["show"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("what", metavar="ID|FILE:FROM-TO", help="the passage, or the lines")
    parser.add_argument(
        "--index",
        metavar="NAME|PATH",
        help="the index (default: the only one that has a name)",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help=f"lines around it (default: {AROUND} of a passage)"
    )
    parser.add_argument(
        "--open", action="store_true", help="open the file in $VISUAL or $EDITOR, at its line"
    )
    parser.add_argument("--json", action="store_true", help="the lines as one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print lines; returns 0."""
    from gguf_embed.index.index import Index

    if args.context is not None and args.context < 0:
        raise BadOption(f"--context {args.context}: give a number of lines, from 0")
    with Index.open(args.index or only_index()) as index:
        if re.fullmatch(r"#?[0-9a-fA-F]{4,32}", args.what):
            around: int = AROUND if args.context is None else args.context
            found = index.passage(args.what, context=around)
        else:
            name, first, last = lines_of(args.what)
            around = args.context or 0
            found = [index.lines(name, max(1, first - around), min(last + around, _MOST))]
    if args.json:
        console.print_json("show", {"excerpts": [as_dict(each) for each in found]})
        return 0
    for each in found:
        if each.stale:
            console.say(f"{near(each.path)}: has changed since it was indexed")
        last = each.first_line + len(each.lines) - 1
        place = f"{near(each.path)}:{each.first_line}-{last}"
        console.out(console.linked(place, each.path, each.first_line))
        if each.headings:
            console.out(console.plain(" > ".join(each.headings)))
        console.out("")
        print_lines(each)
    if args.open:
        open_in_editor(found[0].path, found[0].first_line)
    return 0


def add_passages(parser: argparse.ArgumentParser) -> None:
    """--index and --path: the passages that a command is about."""
    parser.add_argument(
        "--index", metavar="NAME|PATH", help="the index (default: the only one that has a name)"
    )
    options.add_path(parser)


def only_index() -> str:
    """The name of the index where there is one. Raises BadOption."""
    from gguf_embed.index.places import named_indexes

    names = named_indexes()
    if len(names) != 1:
        shown = f"there are {', '.join(names)}" if names else "none has a name here"
        raise BadOption(f"which index? say it with --index NAME; {shown}")
    return names[0]


def check_filled(name: str, hits: Sequence[Hit]) -> None:
    """Raise BadInput for an index that has no passages."""
    if not hits:
        raise BadInput(f"{name}: has no passages yet; fill it: gguf-embed index -o {name}")


def lines_of(what: str) -> tuple[str, int, int]:
    """(file, first line, last line) of FILE:FROM-TO, FILE:LINE or FILE. Raises BadInput."""
    found = re.fullmatch(r"(.+?):(\d+)(?:-(\d+))?", what)
    if found is None:
        return what, 1, _MOST
    first = int(found[2])
    last = int(found[3] or first)
    if not 1 <= first <= last:
        raise BadInput(f"{what}: lines count from 1, and the last is not before the first")
    return found[1], first, last


def as_dict(excerpt: Excerpt) -> dict[str, object]:
    """For programs."""
    from gguf_embed.system.files import printable

    return {
        "id": excerpt.id,
        "source": printable(excerpt.path),
        "position": excerpt.first_line,
        "last_position": excerpt.first_line + len(excerpt.lines) - 1,
        "headings": list(excerpt.headings),
        "about": excerpt.folder.about,
        "stale": excerpt.stale,
        "text": "\n".join(excerpt.lines),
    }
