"""Warnings of the package (a fallback, an assumption) reach the user as one line each."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from gguf_embed.cli import console


@contextmanager
def log_lines(*, debug: bool) -> Generator[None]:
    """Inside it they do; with `debug` everything that is logged."""
    logger = logging.getLogger("gguf_embed")
    level = logger.level
    handler = _Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.say(self.format(record))
