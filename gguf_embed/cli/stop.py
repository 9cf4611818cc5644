"""Signals that end a command."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(BaseException):
    """SIGTERM or SIGHUP: unfinished files are removed on the way out, as for Ctrl-C."""


@contextmanager
def terminable(on_signal: Callable[[], None] | None = None) -> Generator[None]:
    """Inside it these signals raise Terminated, once `on_signal` was called."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        if on_signal is not None:
            on_signal()
        raise Terminated

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        before = [(name, signal.signal(getattr(signal, name), stop)) for name in names]
    except ValueError:  # not the main thread: signals are somebody else's
        before = []
    try:
        yield
    finally:
        for name, handler in before:
            signal.signal(getattr(signal, name), handler)


@contextmanager
def ends_within(seconds: float, exit_code: int) -> Generator[None]:
    """The same; what has not ended `seconds` after the signal is ended with `exit_code`.

    For work that whoever takes the machine away must not wait for.
    """

    def hurry() -> None:
        timer = threading.Timer(seconds, os._exit, (exit_code,))
        timer.daemon = True
        timer.start()

    with terminable(hurry):
        yield
