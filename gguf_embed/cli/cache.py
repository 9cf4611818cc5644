"""`gguf-embed cache`: what is in the cache of vectors, and how large it may be."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import BadOption

if TYPE_CHECKING:
    from gguf_embed.jobs.cached import CacheUse

DESCRIPTION = """\
Show the cache of vectors, make it smaller, or move it.

With `--cache`, embed, index, search and serve take the vectors of texts that it knows from there,
and keep new ones there. A vector is found by its text and the fingerprint of its space: model file,
prompt, pooling, dimensions. The cache is one SQLite file with a limit; what was not used for
longest goes first."""

EPILOG = """\
A vector of a quantized model depends, in its last bits, on the texts that were computed beside it:
one from the cache is as it was computed then.

examples:
  gguf-embed cache
  gguf-embed cache limit 10GiB
  gguf-embed cache prune --unused-days 90
  gguf-embed cache prune --space 0123456789abcdef
  gguf-embed cache prune --to 0
  gguf-embed cache move /data/"""


def add(commands: Any) -> None:
    """The parser of `cache`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "cache",
        help=COMMANDS["cache"],
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("show", "limit", "prune", "move"),
        default="show",
        help="show what is in it (default), set its limit, prune it, or move it",
    )
    parser.add_argument(
        "value", nargs="?", help="of limit: a SIZE; of move: the new FILE or FOLDER"
    )
    group = parser.add_argument_group("prune")
    group.add_argument("--to", type=options.size, metavar="SIZE", help="the oldest beyond it go")
    group.add_argument(
        "--unused-days", type=options.positive, metavar="N", help="what nobody used for N days goes"
    )
    group.add_argument("--space", metavar="ID", help="all vectors of one fingerprint go")
    parser.add_argument("--json", action="store_true", help="what is in it, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns 0."""
    from gguf_embed.jobs.cache import VectorCache

    pruning = (args.to, args.unused_days, args.space) != (None, None, None)
    if pruning != (args.action == "prune"):
        raise BadOption("prune takes --to, --unused-days or --space, and nothing else does")
    if (args.value is not None) != (args.action in ("limit", "move")):
        raise BadOption("limit takes a SIZE and move a FILE or FOLDER, and nothing else does")
    with VectorCache.open() as cache:
        if args.action == "limit":
            try:
                cache.set_limit(options.size(args.value))
            except argparse.ArgumentTypeError as error:
                raise BadOption(f"limit: {error}") from error
        elif args.action == "prune":
            days = args.unused_days
            n = cache.prune(
                to_bytes=args.to,
                unused_s=None if days is None else days * 86_400.0,
                space=args.space,
            )
            console.say(f"{console.counted(n, 'vector')} forgotten")
        elif args.action == "move":
            moved = cache.move(Path(args.value))
            console.say(f"the cache of vectors is {console.plain(str(moved))} from now on")
            return 0
        _show(cache.use(), as_json=args.json)
    return 0


def _show(use: CacheUse, *, as_json: bool) -> None:
    if as_json:
        spaces = [
            {
                "fingerprint": each.space.fingerprint,
                "model": each.space.label,
                "dim": each.space.dim,
                "n_vectors": each.n_vectors,
                "n_bytes": each.n_bytes,
                "used_at": _day(each.used_at),
            }
            for each in use.spaces
        ]
        console.print_json(
            "cache",
            {
                "file": str(use.path),
                "n_bytes": use.n_bytes,
                "limit_bytes": use.limit_bytes,
                "spaces": spaces,
            },
        )
        return
    mib = 2**20
    console.print_pairs(
        [
            ("file", console.plain(str(use.path))),
            ("size", f"{use.n_bytes / mib:,.1f} MiB of {use.limit_bytes / mib:,.0f} MiB"),
        ]
    )
    if use.spaces:
        console.out("")
        console.print_table(
            ("space", "model", "dims", "vectors", "MiB", "last used"),
            [
                (
                    each.space.fingerprint,
                    console.plain(each.space.label),
                    str(each.space.dim),
                    f"{each.n_vectors:,}",
                    f"{each.n_bytes / mib:,.1f}",
                    _day(each.used_at),
                )
                for each in use.spaces
            ],
        )


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
