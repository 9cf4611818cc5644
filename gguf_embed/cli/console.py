"""What a person sees: messages, tables, progress.

The only importer of rich, which may be absent.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final

from gguf_embed.cli import layout
from gguf_embed.errors import BadOption, OutputFailed, duration
from gguf_embed.errors import counted as counted

if TYPE_CHECKING:
    from pathlib import Path

ASK_ABOVE_BYTES: Final = 1 << 30  # that are to come
ASK_AFTER_S: Final = 2.5  # when the speed is known and told


def say(message: str) -> None:
    """One line for the person, on standard error."""
    print(f"gguf-embed: {plain(message)}", file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """The text with every character that a terminal would obey as its escape."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def linked(text: str, path: Path | None, line: int | None = None) -> str:
    """The text, made plain, as a link to a file where standard output is a terminal."""
    shown = plain(text)
    if path is None or sys.stdout is None or not sys.stdout.isatty():  # pyright: ignore[reportUnnecessaryComparison]
        return shown
    if os.environ.get("TERM") == "dumb":
        return shown
    place = path.absolute().as_uri() + (f"#L{line}" if line else "")
    return f"\x1b]8;;{place}\x1b\\{shown}\x1b]8;;\x1b\\"


def stdin() -> BinaryIO | None:
    """Standard input as bytes, None where it is closed."""
    return None if sys.stdin is None else sys.stdin.buffer  # pyright: ignore[reportUnnecessaryComparison]


def stdout() -> BinaryIO | None:
    """Standard output as bytes, None where it is closed."""
    return None if sys.stdout is None else sys.stdout.buffer  # pyright: ignore[reportUnnecessaryComparison]


def confirm(question: str) -> None:
    """Ask a person; raises BadOption where the answer is no, or where nobody can answer."""
    if sys.stdin is None or not sys.stdin.isatty():  # pyright: ignore[reportUnnecessaryComparison]
        raise BadOption(f"{question} Nobody is there to answer; say --yes")
    print(f"gguf-embed: {plain(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadOption("stopped: the answer was no")


def out(text: str) -> None:
    """Lines for the person or program at standard output; raises OutputFailed."""
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise OutputFailed("standard output: is closed; leave it open to see the answer")
    with _refusals():
        print(text)


def flush() -> None:
    """Send what is buffered; raises OutputFailed."""
    if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]
        with _refusals():
            sys.stdout.flush()


def drop() -> None:
    """Forget what standard output refuses: Python would try again at its end, and complain."""
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _refusals() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(
            f"standard output: not written: {error.strerror or error}; make room where it goes"
        ) from error


def print_json(
    command: str, value: Mapping[str, object], *, version: int = 1, to_stderr: bool = False
) -> None:
    """One JSON document for a program, on standard output unless that is taken.

    `version` counts the changes after which a program that reads it must be changed too.
    """
    import json

    text = json.dumps({"format": f"gguf-embed-{command}/{version}", **value}, indent=2)
    if to_stderr:
        print(text, file=sys.stderr)
    else:
        out(text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, in the width of the terminal."""
    for line in layout.table(columns, rows, layout.width()):
        out(line)


def print_pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, in the width of the terminal."""
    for line in layout.pairs(rows, layout.width()):
        out(line)


def print_text(text: str, indent: str = "") -> None:
    """A paragraph, in the width of the terminal."""
    for line in layout.indented(text, layout.width(), indent):
        out(line)


class ProgressBar:
    """Counts what is done, from any thread; this one shows nothing."""

    def advance(self, n_texts: int, n_tokens: int, n_bytes: int) -> None:
        """So many texts, tokens and bytes of input more are done."""


class ProgressLines(ProgressBar):
    """Says it in a line now and then: for the log of a long job."""

    def __init__(self, label: str, total_bytes: int | None, every_s: float) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._every_s = every_s
        self._lock = threading.Lock()
        self._began = self._said = time.monotonic()
        self._n_texts = self._n_tokens = self._n_bytes = 0
        self._kept_bytes = 0  # that were done before anything was computed

    def advance(self, n_texts: int, n_tokens: int, n_bytes: int) -> None:
        """So many texts, tokens and bytes of input more are done."""
        with self._lock:
            self._n_texts += n_texts
            self._n_tokens += n_tokens
            self._n_bytes += n_bytes
            now = time.monotonic()
            if not self._n_tokens:
                self._kept_bytes, self._began = self._n_bytes, now
            if now - self._said >= self._every_s:
                self._said = now
                say(self._line(max(now - self._began, 1e-9)))

    def _line(self, seconds: float) -> str:
        line = f"{self._label}: {counted(self._n_texts, 'text')}, "
        line += f"{self._n_tokens / seconds:,.0f} tokens/s"
        new_bytes = self._n_bytes - self._kept_bytes
        if self._total_bytes:
            line += f", {self._n_bytes / self._total_bytes:.0%}"
            if new_bytes:
                left = (self._total_bytes - self._n_bytes) / new_bytes * seconds
                line += f", about {duration(left)} left"
        return line


@contextmanager
def progress(
    label: str, total_bytes: int | None, *, quiet: bool, lines_s: float | None = None
) -> Generator[ProgressBar]:
    """A bar with texts/s, tokens/s and time left on a terminal.

    In a pipe nothing, or a line every `lines_s` seconds.
    """
    if quiet or not sys.stderr.isatty():
        lines = not quiet and lines_s is not None
        yield ProgressLines(label, total_bytes, lines_s or 0) if lines else ProgressBar()
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar
    except ImportError:
        yield ProgressBar()
        return

    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=total_bytes, speed="")
        begin = time.monotonic()
        lock = threading.Lock()

        class Shown(ProgressBar):
            n_texts = n_tokens = 0

            def advance(self, n_texts: int, n_tokens: int, n_bytes: int) -> None:
                with lock:
                    self.n_texts += n_texts
                    self.n_tokens += n_tokens
                    seconds = max(time.monotonic() - begin, 1e-9)
                    bar.update(
                        task,
                        advance=n_bytes,
                        speed=f"{self.n_texts:,} texts, {self.n_texts / seconds:,.0f} texts/s, "
                        f"{self.n_tokens / seconds:,.0f} tokens/s",
                    )

        yield Shown()


@contextmanager
def transfer(
    label: str, *, quiet: bool, ask: bool = False
) -> Generator[Callable[[int, int | None], None] | None]:
    """A bar of bytes moved on a terminal, to be called with (here, in all); None in a pipe.

    With `ask` a person is asked once whether a large file is to come. What came meanwhile is kept.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar
    except ImportError:
        yield None
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(label, total=None)
    began: list[float] = []
    asking = ask and sys.stdin is not None and sys.stdin.isatty()  # pyright: ignore[reportUnnecessaryComparison]

    def moved(done: int, total: int | None) -> None:
        nonlocal asking
        if not began:
            began.append(time.monotonic())
        if asking and time.monotonic() - began[0] >= ASK_AFTER_S:
            asking = False  # once
            if (total or 0) - done > ASK_ABOVE_BYTES:
                bar.stop()
                confirm("go on?")
        bar.update(task, completed=done, total=total)
        # There from the first byte to the last: what is said before and after stays readable.
        if done == total:
            bar.stop()
        else:
            bar.start()

    try:
        yield moved
    finally:
        bar.stop()
