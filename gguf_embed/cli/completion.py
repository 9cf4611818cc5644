"""`gguf-embed completion`: what a shell needs to complete commands, options and models."""

from __future__ import annotations

import argparse
from typing import Any, cast

from gguf_embed.cli import console
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import BadOption

DESCRIPTION = """\
Print what makes your shell complete gguf-embed's commands, options, and names of models."""

EPILOG = """\
examples:
  gguf-embed completion bash >> ~/.bashrc
  gguf-embed completion zsh >> ~/.zshrc           after compinit
  gguf-embed completion fish > ~/.config/fish/completions/gguf-embed.fish"""

SHELLS = ("bash", "zsh", "fish", "powershell")


def add(commands: Any) -> None:
    """The parser of `completion`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "completion",
        help=COMMANDS["completion"],
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it; returns 0."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise BadOption("completion needs argcomplete: pip install 'gguf-embed[cli]'") from error
    console.out(shellcode(["gguf-embed"], shell=args.shell))
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell that asks what may come next, and end; return without argcomplete."""
    try:
        import argcomplete
    except ImportError:
        return
    for each in _parsers(parser):
        for action in each._actions:  # pyright: ignore[reportPrivateUsage]
            if action.dest == "model" or (each.prog.endswith(" models") and action.dest == "name"):
                action.completer = _models  # pyright: ignore[reportAttributeAccessIssue]
    argcomplete.autocomplete(parser)


def _parsers(top: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """That of all commands, and those of each; argparse has no public way to them."""
    found = [top]
    for action in top._actions:  # pyright: ignore[reportPrivateUsage]
        choices: object = action.choices
        if isinstance(choices, dict):
            found += cast("dict[str, argparse.ArgumentParser]", choices).values()
    return found


def _models(prefix: str, **_: object) -> list[str]:
    """Names of the catalog."""
    from gguf_embed.catalog import catalog

    return [card.id for card in catalog.cards() if card.id.startswith(prefix.lower())]
