"""docs/cli.md, made from the parsers: `python -m gguf_embed.cli.reference > docs/cli.md`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from typing import Any, cast

from gguf_embed import cli, errors
from gguf_embed.cli.exits import EXITS, exits_line
from gguf_embed.cli.layout import reflow

WIDTH = 100

TOP = """\
# Command line

This page is made from the parsers: `python -m gguf_embed.cli.reference > docs/cli.md`.

Errors are one line on standard error and an exit code. `--debug`, or `GGUF_EMBED_DEBUG=1`, shows
the traceback.

With `--json` a command prints one object. Its `format` is `gguf-embed-COMMAND/VERSION`; the version
grows when a program that reads it must change. The object of `probe` is a file that `plan
--machine` reads: `gguf-embed-machine/VERSION`. The actions of `models` have objects of their own:
`gguf-embed-models-path/1`. One thing has one key in all of them:

| key | what it is |
|---|---|
| `format` | which command and which version of its object |
| `file`, `n_bytes` | what was read or made, and its size |
| `model`, `quant`, `licence` | which model a file is, or made the vectors |
| `n_texts`, `n_tokens`, `n_truncated`, `n_failed` | counts |
| `texts_per_s`, `tokens_per_s` | speeds |
| `query`, `results` | of `search` and `rerank`: what was asked, and the hits, the best first |
| `score`, `text`, `id` | of a hit |

Options that most commands have are short too: `-m` for `--model`, `-q` for `--quiet`, `-j` for
`--json`, `-k` for `--top`, `-t` for `--threads`, `-y` for `--yes`. `gguf-embed completion SHELL`
makes the shell complete them."""


def reference() -> str:
    """The page."""
    return "\n".join(_lines()) + "\n"


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by name."""
    top = cli.parser()
    # argparse has no public way to the commands of a parser.
    found: dict[str, argparse.ArgumentParser] = {}
    for action in top._actions:  # pyright: ignore[reportPrivateUsage]
        choices: object = action.choices
        if isinstance(choices, dict):
            found |= cast(dict[str, argparse.ArgumentParser], choices)
    return dict(sorted(found.items()))


def _lines() -> Iterator[str]:
    yield TOP
    yield "\n## Exit codes\n\n| code | meaning |\n|---|---|"
    yield from (f"| {code} | {meaning} |" for code, meaning in EXITS.items())
    yield "\n## Errors\n\nThe errors of the Python interface, with the exit code of each.\n"
    yield "| class | exit code | meaning |\n|---|---|---|"
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, errors.GgufEmbedError):
            meaning = (inspect.getdoc(error) or "").partition("\n")[0]
            yield f"| `{name}` | {error.exit_code} | {meaning} |"
    for name, parser in commands().items():
        yield from _command(name, parser)


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"\n## {name}\n"
    yield from _block(parser.description or "")
    for group in parser._action_groups:  # pyright: ignore[reportPrivateUsage]
        actions = [a for a in group._group_actions if a.dest != "help"]  # pyright: ignore[reportPrivateUsage]
        if actions:
            yield f"\n| {_title(group.title)} | |\n|---|---|"
            yield from (f"| `{_spelled(action)}` | {_help(action, parser)} |" for action in actions)
    yield ""
    yield from _block((parser.epilog or "").removesuffix(exits_line()).rstrip())


def _block(text: str) -> Iterator[str]:
    yield "```text"
    yield from reflow(text, WIDTH)
    yield "```"


def _title(title: str | None) -> str:
    return {"positional arguments": "argument", None: ""}.get(title, title or "")


def _spelled(action: argparse.Action) -> str:
    value = str(
        action.metavar
        or (
            "{" + ",".join(map(str, action.choices)) + "}"
            if action.choices
            else action.dest.upper()
        )
    )
    if not action.option_strings:
        return value.replace("|", "\\|")
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value}".replace("|", "\\|")


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    values: dict[str, Any] = {**vars(action), "prog": parser.prog}
    return ((action.help or "") % values).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
