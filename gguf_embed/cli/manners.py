"""--background: long work that leaves the machine to whoever uses it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder


def add_option(group: Any) -> None:
    """--background."""
    group.add_argument(
        "--background",
        action="store_true",
        help="use half of the cores, and those only while no other program wants them; pause on a "
        "battery under 30 %%, while memory is short and while the machine is hot",
    )


@contextmanager
def opened(args: argparse.Namespace, open_model: Callable[[], Embedder]) -> Generator[Embedder]:
    """The model; with --background it steps back before it is opened, and pauses at work."""
    if not args.background:
        with open_model() as embedder:
            yield embedder
        return
    from gguf_embed.machine.background import Pace, step_back

    granted = step_back(threads=args.threads)
    if not args.quiet:
        console.say(f"in the background: {granted}")
    with open_model() as embedder:
        pace = Pace(say=console.say)
        embedder.meter.pace(pace.wait)
        try:
            yield embedder
        finally:
            pace.end()
