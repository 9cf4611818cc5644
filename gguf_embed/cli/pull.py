"""`gguf-embed pull`: fetch a model from the Hub, verified, and say where it is."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import BadOption, DoesNotFit

if TYPE_CHECKING:
    from gguf_embed.plan.plan import Plan
    from gguf_embed.store.local import Source

DESCRIPTION = """\
Fetch a model file into the cache that other Hub tools share. The size and the free disk are checked
before, the SHA-256 after; a pull that was killed goes on where it stopped. Without --quant it is
the file that `gguf-embed plan` chooses for this machine.

With --make a level that is not offered, and is faster on this CPU, is made here: its F16 is fetched
once and quantized, with the importance matrix that is published beside it, if one is. Texts in
several languages verify the result, which goes into this package's store."""

EPILOG = """\
where from:
  HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as they do for other Hub tools

examples:
  gguf-embed pull qwen3-embedding:0.6b
  gguf-embed pull bge-m3 --quant Q4_K_M
  gguf-embed pull qwen3-embedding:0.6b --make --drop-source
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
    parser.add_argument(
        "--make", action="store_true", help="make a level that is faster here than those offered"
    )
    parser.add_argument(
        "--drop-source", action="store_true", help="of --make: remove the F16 that it fetched"
    )
    parser.add_argument(
        "--yes", action="store_true", help="on a terminal, ask nothing before a large file"
    )
    options.add_accept_licence(parser)
    parser.add_argument("--json", action="store_true", help="file, size and licence as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch and print the path; returns 0."""
    from gguf_embed.engine.fetching import announced
    from gguf_embed.gguf.header import read_header
    from gguf_embed.store import download, hub

    if args.drop_source and not args.make:
        raise BadOption("--drop-source belongs to --make")
    if args.make and (made := _make(args)):
        return _done(made, args)
    source, plan = _source(args)
    if source.path is not None and source.where == "file":
        read_header(source.path)  # any file has a name; this one must be a model
    with console.transfer(source.label, quiet=args.quiet, ask=not args.yes) as moved:
        if not args.quiet:
            moved = announced(source, plan, hub.places(), on_status=console.say, on_download=moved)
        path = download.fetch(source, progress=moved, accept_licence=args.accept_licence)
    return _done(replace(source, path=path), args)


def _done(source: Source, args: argparse.Namespace) -> int:
    assert source.path is not None, "it is here now"
    if args.json:
        licence = source.card.licence if source.card is not None else None
        console.print_json(
            "pull",
            {
                "model": source.name,
                "file": str(source.path),
                "n_bytes": source.path.stat().st_size,
                "quant": source.quant,
                "licence": licence,
            },
        )
    else:
        console.out(str(source.path))
    return 0


def _make(args: argparse.Namespace) -> Source | None:
    """The level made here; None where one that is offered is as good."""
    from gguf_embed.catalog import catalog
    from gguf_embed.lab import making
    from gguf_embed.machine import probe as hardware
    from gguf_embed.plan.settings import Settings

    card = catalog.find(args.model)
    if card is None:
        raise BadOption(
            f"--make {args.model}: is no model of `gguf-embed models`; make a level of another "
            "with gguf-embed quantize"
        )

    def say(text: str) -> None:
        if not args.quiet:
            console.say(text)

    level, why = making.level_to_make(card, hardware.probe(), Settings(quant=args.quant))
    if level is None:
        say(f"nothing is made: {why}")
        return None
    say(f"{card.id} {level} is made here: {why}")
    with console.transfer(card.id, quiet=args.quiet, ask=not args.yes) as moved:
        done = making.make_level(
            card,
            level,
            drop_source=args.drop_source,
            accept_licence=args.accept_licence,
            on_status=say,
            on_download=moved,
        )
    cosines = done.made.canaries
    say(
        f"verified by the vectors of its source: cosine {cosines.mean:.4f} on average, "
        f"{cosines.min:.4f} at least"
        + ("; made with the importance matrix beside it" if done.with_imatrix else "")
        + (f"; {done.dropped.label} was removed" if done.dropped else "")
    )
    return done.source


def _source(args: argparse.Namespace) -> tuple[Source, Plan | None]:
    """The file asked for, else the one that this machine would run, with the plan for that."""
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
            return source, None
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
    return chosen.source, chosen.plan
