"""`gguf-embed pull`: fetch a model from the Hub, verified, and say where it is."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import DoesNotFit

if TYPE_CHECKING:
    from gguf_embed.store.local import Source

DESCRIPTION = """\
Fetch a model file into the cache that other Hub tools share. The size and the free disk are checked
before, the SHA-256 after; a pull that was killed goes on where it stopped. Without --quant it is
the file that `gguf-embed plan` chooses for this machine."""

EPILOG = """\
where from:
  HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as they do for other Hub tools

examples:
  gguf-embed pull qwen3-embedding:0.6b
  gguf-embed pull bge-m3 --quant Q4_K_M
  gguf-embed pull hf:owner/repo/file.gguf --json
  gguf-embed pull jina-embeddings-v5-text-small --accept-licence"""


def add(commands: Any) -> None:
    """The parser of `pull`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "pull", help=COMMANDS["pull"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a name of `gguf-embed models`, owner/repo, hf:..., or auto"
    )
    parser.add_argument("--quant", metavar="Q", help="quantization, such as Q8_0")
    options.add_accept_licence(parser)
    parser.add_argument("--json", action="store_true", help="file, size and licence as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch and print the path; returns 0."""
    from gguf_embed.gguf.header import read_header
    from gguf_embed.store import download

    source = _source(args)
    if source.path is not None and source.where == "file":
        read_header(source.path)  # any file has a name; this one must be a model
    with console.transfer(source.label, quiet=args.quiet) as moved:
        path = download.fetch(source, progress=moved, accept_licence=args.accept_licence)
    if args.json:
        licence = source.card.licence if source.card is not None else None
        console.print_json(
            "pull",
            {
                "model": source.name,
                "file": str(path),
                "n_bytes": path.stat().st_size,
                "quant": source.quant,
                "licence": licence,
            },
        )
        return 0
    console.out(str(path))
    return 0


def _source(args: argparse.Namespace) -> Source:
    """The file asked for, else the one that this machine would run."""
    from gguf_embed.engine import choice
    from gguf_embed.machine import probe as hardware
    from gguf_embed.plan import plan
    from gguf_embed.plan.settings import Settings
    from gguf_embed.store import names

    if args.model != plan.AUTO:
        offered = names.offered(args.model, args.quant)
        source = next((s for s in offered if s.path), offered[0])
        options.agree_to_licence(source, accepted=args.accept_licence)  # before a header is read
        if args.quant or len(offered) == 1:
            return source
    try:
        chosen = choice.choose(args.model, hardware.probe(), Settings(quant=args.quant))
    except DoesNotFit as error:
        raise DoesNotFit(
            f"{error}. To fetch a file for another machine name its quantization with --quant",
            needed_bytes=error.needed_bytes,
            free_bytes=error.free_bytes,
        ) from error
    if not args.quiet:
        console.say(chosen.plan.in_short)
    return chosen.source
