"""`gguf-embed unbundle`: a model that was carried here, verified, proved and installed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS

if TYPE_CHECKING:
    from gguf_embed.bundle.unbundle import Arrived

DESCRIPTION = """\
Install a model from a folder that `gguf-embed bundle` wrote on another machine. Every file is
verified: one that was changed, is missing or was added is named, and nothing is installed. Then the
texts that came with the model are embedded here, and their vectors must be the ones that they had
there: a cosine of 0.999 for weights of 16 or 32 bits, 0.99 for quantized ones. No network is used.

The hashes tell damage. Against forgery compare the sha256 of SHA256SUMS, which is printed, with
what `bundle` printed."""

EPILOG = """\
examples:
  gguf-embed unbundle /media/disk/carry
  gguf-embed unbundle carry --json"""


def add(commands: Any) -> None:
    """The parser of `unbundle`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "unbundle",
        help=COMMANDS["unbundle"],
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `bundle` wrote")
    parser.add_argument("--json", action="store_true", help="what was installed as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress and no report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, prove and install; returns 0."""
    from gguf_embed.bundle.unbundle import unbundle

    arrived = unbundle(args.folder, on_status=None if args.quiet else console.say)
    if args.json:
        console.print_json("unbundle", _report(arrived))
    elif not args.quiet:
        name = console.plain(arrived.name)
        console.out(
            f"{name} works here offline: {arrived.source.path}\n"
            f"  verified    {arrived.n_files} files; SHA256SUMS has sha256 {arrived.sums_sha256}\n"
            f"  canaries    {arrived.n_canaries}, cosine to the carried vectors: mean "
            f"{arrived.canaries.mean:.6f}, min {arrived.canaries.min:.6f} "
            f"(at least {arrived.min_cosine})\n"
            f"  licence     {options.licence_line(arrived.licence)}\n"
            f"  next        gguf-embed embed notes.txt --model {name} -o notes.npy"
        )
    return 0


def _report(arrived: Arrived) -> dict[str, object]:
    return {
        "model": arrived.name,
        "quant": arrived.source.quant,
        "file": str(arrived.source.path),
        "n_bytes": arrived.source.n_bytes,
        "sha256": arrived.source.sha256,
        "licence": options.licence_json(arrived.licence),
        "n_files": arrived.n_files,
        "canaries": {
            "n": arrived.n_canaries,
            "mean_cosine": round(arrived.canaries.mean, 7),
            "min_cosine": round(arrived.canaries.min, 7),
            "required": arrived.min_cosine,
        },
        "sums_sha256": arrived.sums_sha256,
    }
