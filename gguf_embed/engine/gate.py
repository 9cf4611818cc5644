"""A gate through which many go together, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager


class Gate:
    """Many pass at a time, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_inside = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Generator[None]:
        """With others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._n_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Generator[None]:
        """Without others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: not self._n_inside)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
