"""How far a call is, where a person looks: `embedder.encode(texts, progress=True)`.

    True   a bar on a terminal, a widget in a notebook
    None   a bar on a terminal, once the work has taken some seconds; none beside `on_progress`
    False  nothing

Into a pipe or a file nothing is written, whatever was said. tqdm draws; without it there is no bar.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Sized
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

from gguf_embed.engine.options import OnProgress
from gguf_embed.plan.values import check_switch

DELAY_S: Final = 3.0  # of a bar that nobody asked for


@contextmanager
def watched(
    texts: object, progress: bool | None, on_progress: OnProgress | None
) -> Generator[OnProgress | None]:
    """What a call is to tell of its progress; the bar goes at the end. Raises BadOption."""
    asked = None if progress is None else check_switch("progress", progress, may_be_open=True)
    if not wants_bar(asked, beside=on_progress is not None):
        yield on_progress
        return
    n_texts = 1 if isinstance(texts, str) else len(texts) if isinstance(texts, Sized) else None
    bar = Bar(n_texts, delay_s=0.0 if asked else DELAY_S)

    def watch(n_done: int, n_tokens: int) -> None:
        bar.advance(n_done, n_tokens)
        if on_progress is not None:
            on_progress(n_done, n_tokens)

    try:
        yield watch
    finally:
        bar.close()


def wants_bar(asked: bool | None, *, beside: bool) -> bool:
    """Whether a person looks, and wants to see it.

    Unasked only in the main thread: what a server computes beside its log is nobody's to watch.
    """
    if asked is None:
        in_main = threading.current_thread() is threading.main_thread()
        return not beside and in_main and _is_terminal()
    return asked and (_is_terminal() or _is_notebook())


def _is_terminal() -> bool:
    stream = sys.stderr
    return stream is not None and stream.isatty()  # pyright: ignore[reportUnnecessaryComparison]


def _is_notebook() -> bool:
    """Whether this is Jupyter's kernel, as tqdm itself finds out."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class Bar:
    """Texts and tokens done, drawn once `delay_s` have passed."""

    def __init__(
        self,
        n_texts: int | None,
        *,
        delay_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._n_texts = n_texts
        self._delay_s = delay_s
        self._clock = clock
        self._began = clock()
        self._n_done = self._n_tokens = 0
        self._drawn: Any = None

    def advance(self, n_texts: int, n_tokens: int) -> None:
        """So many more are done."""
        self._n_done += n_texts
        self._n_tokens += n_tokens
        seconds = self._clock() - self._began
        if seconds < self._delay_s:
            return
        if self._drawn is None:
            self._drawn = _drawn(self._n_texts)
        if self._drawn is not None:
            speed = f"{self._n_tokens / max(seconds, 1e-9):,.0f} tokens/s"
            self._drawn.set_postfix_str(speed, refresh=False)
            self._drawn.update(self._n_done - self._drawn.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._drawn is not None:
            self._drawn.refresh()  # what came since it was last drawn
            self._drawn.close()


def _drawn(n_texts: int | None) -> Any:
    """An empty bar; None without tqdm, which huggingface_hub brings along."""
    try:
        tqdm = import_module("tqdm.auto").tqdm
    except ImportError:
        return None
    return tqdm(total=n_texts, unit=" texts", leave=False, dynamic_ncols=True)
