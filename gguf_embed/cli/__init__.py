"""The command line: one file per command, named in the table of `commands`.

A command's file holds `add(subparsers)`, which makes its parser and sets `run=` to a function
from the parsed arguments to an exit code. Nothing heavy is imported before `run`, and of the
commands only the one that was called, so that `--help` is quick and needs no native library.

Exit codes are in the table of `exits`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from gguf_embed import __version__
from gguf_embed.cli import console
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.exits import exits_line
from gguf_embed.cli.layout import HelpFormatter
from gguf_embed.cli.start import start
from gguf_embed.cli.stop import Terminated, terminable
from gguf_embed.errors import GgufEmbedError

SHELL_ASKS = "_ARGCOMPLETE"  # set by a shell that asks how a word may go on

DESCRIPTION = """\
Text embeddings from GGUF models through llama.cpp.

With no --model the built-in all-MiniLM-L6-v2 is used: 384 dimensions, English, no network."""

EPILOG = """\
examples:
  gguf-embed embed notes.txt -o notes.npy           one vector per line
  gguf-embed embed docs/ -o docs.jsonl              one vector per passage, with its place
  gguf-embed search "how do refunds work?" docs/    the best passages and their scores
  gguf-embed rerank "how do refunds work?" found.txt  texts in the order of their answers
  gguf-embed doctor                                 what works here, what would be faster

`gguf-embed COMMAND --help` tells more. Errors are one line and an exit code; --debug, or
GGUF_EMBED_DEBUG=1, shows the traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse itself exits on --help and misuse)."""
    start()
    words = sys.argv[1:] if argv is None else [*argv]
    if any("\0" in word for word in words):
        console.say("an argument holds a NUL character, which no name or text here may hold")
        return 2
    if SHELL_ASKS in os.environ:
        from gguf_embed.cli import completion

        completion.answer(parser())
    first = next((word for word in words if not word.startswith("-")), None)
    # Where a command comes first, nothing tells of the others, which take most of the time.
    alone = first in COMMANDS and words[0] == first
    known = [] if first is None else [first]
    args = parser(known, known if alone else COMMANDS).parse_args(words)
    debug: bool = args.debug or os.environ.get("GGUF_EMBED_DEBUG", "") not in ("", "0")
    from gguf_embed.cli.log_lines import log_lines  # help comes without it, and sooner

    with terminable(), log_lines(debug=debug):
        try:
            code: int = args.run(args)
            console.flush()
        except BrokenPipeError:
            console.drop()
            return 141
        except KeyboardInterrupt:
            console.say("interrupted")
            return 130
        except Terminated:
            console.say("terminated")
            return 143
        except GgufEmbedError as error:
            if debug:
                raise
            console.say(_one_line(error))
            console.drop()
            return error.exit_code
        except OSError as error:
            if debug:
                raise
            console.say(_one_line(error))
            return 1
        except Exception as error:
            if debug:
                raise
            console.say(
                f"unexpected {type(error).__name__}: {_one_line(error)}; this is a bug: "
                "--debug shows the traceback"
            )
            return 1
    return code


def parser(
    known: Collection[str] = tuple(COMMANDS), names: Collection[str] = tuple(COMMANDS)
) -> argparse.ArgumentParser:
    """The parser of the commands of these names, with the options of those that are `known`."""
    top = _Parser(
        prog="gguf-embed",
        description=DESCRIPTION,
        epilog=f"{EPILOG}\n\n{exits_line()}",
    )
    top.add_argument("--version", action="version", version=f"gguf-embed {__version__}")
    _add_debug(top, default=False)
    commands = top.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for name in names:
        if name not in known:
            commands.add_parser(name, help=COMMANDS[name])
            continue
        importlib.import_module(f"{__name__}.{name}").add(commands)
        each: argparse.ArgumentParser = commands.choices[name]
        each.epilog = f"{each.epilog}\n\n{exits_line()}"
        each.allow_abbrev = False
        _shorten(each)
        # Without a default here, so that --debug counts before and after the command's name.
        _add_debug(each, default=argparse.SUPPRESS)
    return top


def _add_debug(to: argparse.ArgumentParser, *, default: bool | str) -> None:
    to.add_argument(
        "--debug", action="store_true", default=default, help="show tracebacks and details"
    )


# One letter for what most commands have.
SHORT = {
    "--json": "-j",
    "--model": "-m",
    "--quiet": "-q",
    "--threads": "-t",
    "--top": "-k",
    "--yes": "-y",
}


def _shorten(parser: argparse.ArgumentParser) -> None:
    """Give the common options their letters; argparse has no public way to do it in one place."""
    known = parser._option_string_actions  # pyright: ignore[reportPrivateUsage]
    for long, short in SHORT.items():
        action = known.get(long)
        if action is not None and short not in known:
            action.option_strings = [short, *action.option_strings]
            known[short] = action


class _Parser(argparse.ArgumentParser):
    """Misuse is one line too; argparse's own way prints the whole usage before it."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **choices)

    def error(self, message: str) -> NoReturn:
        console.say(f"{message}; see {self.prog} --help")
        self.exit(2)


class _CommandParser(_Parser):
    """Refuses what it does not know itself: `top` would point to the help of all commands."""

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None, **choices: Any
    ) -> Any:
        """The arguments, all of them known."""
        known, others = super().parse_known_args(args, namespace, **choices)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return known, others


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
