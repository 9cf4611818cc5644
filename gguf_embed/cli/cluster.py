"""`gguf-embed cluster`: what an index is about."""

from __future__ import annotations

import argparse
from typing import Any, Final

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.hits import near
from gguf_embed.cli.show import add_passages, check_filled, only_index
from gguf_embed.errors import counted

_NEAREST: Final = 3  # passages that are printed of each group

DESCRIPTION = """\
Put the passages of an index into groups that are about the same (k-means by cosine), the largest
first, each with words that tell it from the others and the passages nearest to its middle. The same
index gives the same groups."""

EPILOG = """\
examples:
  gguf-embed cluster --index handbook
  gguf-embed cluster --index handbook --groups 30 --path '*.md'
  gguf-embed cluster --index handbook --json"""


def add(commands: Any) -> None:
    """The parser of `cluster`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "cluster", help=COMMANDS["cluster"], description=DESCRIPTION, epilog=EPILOG
    )
    add_passages(parser)
    parser.add_argument(
        "--groups",
        type=options.positive,
        default=12,
        metavar="N",
        help="at most so many (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="all passages of all groups as one JSON document"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print groups; returns 0."""
    import numpy as np

    from gguf_embed.index.agent_tools import hit_dict
    from gguf_embed.index.clusters import clusters_of, names_of
    from gguf_embed.index.index import Index

    name: str = args.index or only_index()
    with Index.open(name) as index:
        hits, vectors = index.passages(paths=args.path)
    check_filled(name, hits)
    clusters = clusters_of(vectors, args.groups)
    names = names_of([hit.passage.text for hit in hits], clusters.numbers, clusters.n)
    groups: list[dict[str, object]] = []
    for number, words in enumerate(names):
        rows = np.flatnonzero(clusters.numbers == number)
        nearness = vectors[rows] @ clusters.centres[number]
        order = np.argsort(-nearness, kind="stable")
        members = [(hits[rows[at]], float(nearness[at])) for at in order.tolist()]
        if args.json:
            passages = [hit_dict(hit, score) for hit, score in members]
            groups.append({"words": words, "n_passages": len(members), "passages": passages})
            continue
        console.out(f"{number + 1:>2}  {counted(len(members), 'passage')}: {console.plain(words)}")
        for hit, score in members[:_NEAREST]:
            place = f"{near(hit.path)}:{hit.passage.first_line}-{hit.passage.last_line}"
            shown = console.linked(place, hit.path, hit.passage.first_line)
            console.out(f"    {score:.3f}  {shown}  {hit.id}")
    if args.json:
        console.print_json("cluster", {"index": name, "groups": groups})
    return 0
