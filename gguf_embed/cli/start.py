"""What every command finds as it should be, whatever the process was started with."""

from __future__ import annotations

import io
import os
import sys


def start() -> None:
    """Standard streams and a home folder for this process and its children."""
    _fill_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character gets its escape, not a traceback.
            stream.reconfigure(errors="backslashreplace")
    if sys.platform != "win32" and not os.environ.get("HOME"):
        from pathlib import Path  # rarely needed, and slow to import

        from gguf_embed.system import paths

        try:
            Path.home()
        except RuntimeError:  # nor does the system know this user
            # Libraries would make a folder called ~ in the current one.
            os.environ["HOME"] = str(paths.user_home())


def _fill_streams() -> None:
    """Give a closed standard stream a place where nothing is.

    Without it the next file that is opened takes its number, and what native code says on
    standard error goes into that file. `sys.stdin` and `sys.stdout` stay None: a command that
    needs one of them says that it is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
