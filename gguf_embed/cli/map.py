"""`gguf-embed map`: the passages of an index as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.show import add_passages, check_filled, only_index
from gguf_embed.errors import BadOption, counted

if TYPE_CHECKING:
    from gguf_embed.index.map_page import MappedPassages
    from gguf_embed.vectors import Vectors

MOST: Final = 20_000  # passages: more of them are no picture, and take minutes

DESCRIPTION = """\
Draw a map of an index: one HTML page that holds all and loads nothing, to be opened in a browser.
Passages that are about the same lie together; colours are groups, each named by words that tell it
from the others. Point at a passage to read it, choose it to see its place, search for words.

With -o NAME.parquet it is a table in place of a page, which embedding-atlas and others open:
columns text, source, position, headings, id, group, projection_x, projection_y, vector."""

EPILOG = """\
examples:
  gguf-embed map --index handbook -o handbook.html
  gguf-embed map --index handbook -o travel.html --path 'travel/**' --groups 6
  gguf-embed map --index handbook -o handbook.parquet"""


def add(commands: Any) -> None:
    """The parser of `map`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "map", help=COMMANDS["map"], description=DESCRIPTION, epilog=EPILOG
    )
    add_passages(parser)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="NAME.html or NAME.parquet"
    )
    parser.add_argument(
        "--groups",
        type=options.positive,
        default=12,
        metavar="N",
        help="that are told apart by colour (default: %(default)s)",
    )
    parser.add_argument(
        "--most",
        type=options.positive,
        default=MOST,
        metavar="N",
        help="passages; of more, so many are taken evenly (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the map; returns 0."""
    from gguf_embed.index.clusters import clusters_of, names_of
    from gguf_embed.index.index import Index
    from gguf_embed.index.map_page import MappedPassages, map_page
    from gguf_embed.index.plane import on_plane
    from gguf_embed.system.files import write_whole

    output, ending = Path(args.output), Path(args.output).suffix.lower()
    if ending not in (".html", ".parquet"):
        raise BadOption(f"-o {args.output}: give it the ending .html or .parquet")
    name: str = args.index or only_index()
    with Index.open(name) as index:
        hits, vectors = index.passages(paths=args.path, most=args.most)
        n_all = index.status().n_passages
        space = index.facts.space
    check_filled(name, hits)
    clusters = clusters_of(vectors, args.groups)
    numbers: list[int] = clusters.numbers.tolist()
    names = names_of([hit.passage.text for hit in hits], clusters.numbers, clusters.n)
    of_all = "" if len(hits) == n_all else f" of {n_all:,}"
    shown = MappedPassages(
        title=Path(name).stem,
        about=f"{counted(len(hits), 'passage')}{of_all}, {space.model_id} {space.quant}",
        hits=hits,
        points=on_plane(vectors),
        numbers=numbers,
        names=names,
    )
    if ending == ".html":
        write_whole(output, map_page(shown))
    else:
        _write_table(output, shown, vectors)
    console.say(
        f"{args.output}: {counted(len(hits), 'passage')}{of_all} in "
        f"{counted(clusters.n, 'group')}, {output.stat().st_size / 2**20:.1f} MiB"
    )
    return 0


def _write_table(output: Path, shown: MappedPassages, vectors: Vectors) -> None:
    from gguf_embed.io.tables import table_bytes
    from gguf_embed.system.files import printable, write_whole

    hits, points = shown.hits, shown.points
    columns: dict[str, Any] = {
        "id": [hit.id for hit in hits],
        "text": [hit.passage.text for hit in hits],
        "source": [printable(hit.path) for hit in hits],
        "position": [hit.passage.first_line for hit in hits],
        "last_position": [hit.passage.last_line for hit in hits],
        "headings": [" > ".join(hit.passage.headings) for hit in hits],
        "group": [shown.names[number] for number in shown.numbers],
        "projection_x": points[:, 0],
        "projection_y": points[:, 1],
    }
    write_whole(output, table_bytes(columns, vectors))
