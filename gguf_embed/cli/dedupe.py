"""`gguf-embed dedupe`: passages of an index that say nearly the same."""

from __future__ import annotations

import argparse
from typing import Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.hits import near
from gguf_embed.cli.show import add_passages, only_index
from gguf_embed.errors import BadOption, counted

DESCRIPTION = """\
Name groups of passages of an index that are nearly the same: each is linked to another of its group
by a cosine of --above or more. All pairs are compared, and nothing is changed.

A result shows the passage that comes first, and below it the others with their cosine to it, which
may be less where a third one links them. 100,000 passages of the built-in model take minutes."""

EPILOG = """\
examples:
  gguf-embed dedupe --index handbook
  gguf-embed dedupe --index handbook --above 0.99 --path '*.md' --top 100
  gguf-embed dedupe --index handbook --json"""


def add(commands: Any) -> None:
    """The parser of `dedupe`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "dedupe", help=COMMANDS["dedupe"], description=DESCRIPTION, epilog=EPILOG
    )
    add_passages(parser)
    parser.add_argument(
        "--above",
        type=float,
        default=0.95,
        metavar="X",
        help="the least cosine of a pair, above 0 and up to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--top",
        type=options.positive,
        default=20,
        metavar="N",
        help="groups that are printed, the largest first (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="all groups as one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print groups; returns 0, also where there is none."""
    from gguf_embed.index.agent_tools import hit_dict
    from gguf_embed.index.index import Index

    if not 0 < args.above <= 1:
        raise BadOption(f"--above {args.above:g}: a cosine is above 0 and at most 1 here")
    name = args.index or only_index()
    with Index.open(name) as index:
        groups = index.duplicates(args.above, paths=args.path)
    if args.json:
        found = [[hit_dict(hit, hit.score) for hit in group] for group in groups]
        console.print_json("dedupe", {"index": name, "above": args.above, "groups": found})
        return 0
    for number, group in enumerate(groups[: args.top], 1):
        console.out(f"{number:>2}  {counted(len(group), 'passage')}")
        for hit in group:
            lines = f"{hit.passage.first_line}-{hit.passage.last_line}"
            place = f"{near(hit.path)}:{lines}"
            shown = console.linked(place, hit.path, hit.passage.first_line)
            console.out(f"    {hit.score:.3f}  {shown}  {hit.id}")
    n_more = sum(map(len, groups)) - len(groups)
    console.say(
        f"{name}: {counted(len(groups), 'group')}; {counted(n_more, 'passage')} beside the first "
        "of each"
    )
    return 0
