"""`gguf-embed probe`: what this machine is, as this process may use it."""

from __future__ import annotations

import argparse
from typing import Any

from gguf_embed.cli import console
from gguf_embed.cli.commands import COMMANDS

DESCRIPTION = """\
Show devices and their memory, cores and RAM within the limits of containers, CPU features, and
what the installed llama.cpp can use of them."""

EPILOG = """\
examples:
  gguf-embed probe
  gguf-embed probe --json > machine.json      a description that can be taken elsewhere"""


def add(commands: Any) -> None:
    """The parser of `probe`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "probe", help=COMMANDS["probe"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("--json", action="store_true", help="the machine as a JSON file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the machine; returns 0."""
    from gguf_embed.machine.advice import advised
    from gguf_embed.machine.machine import machine_to_json, summary
    from gguf_embed.machine.probe import probe
    from gguf_embed.system import paths

    machine = advised(probe(store=paths.home()))
    if args.json:
        console.out(machine_to_json(machine).rstrip())
        return 0
    console.print_pairs(summary(machine))
    return 0
