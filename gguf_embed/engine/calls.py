"""Counts the calls in flight, so that what they use is not freed under them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager


class Calls:
    """The calls of one object. Safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in_flight = Counter[int]()  # by thread
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether calls are refused."""
        return self._closed

    @contextmanager
    def counted(self, refusal: Callable[[], Exception]) -> Generator[None]:
        """Around a call; raises the refusal once `close` was called, but not inside a call."""
        thread = threading.get_ident()
        with self._changed:
            if self._closed and not self._in_flight[thread]:
                raise refusal()
            self._in_flight[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight[thread] -= 1
                if not self._in_flight[thread]:
                    del self._in_flight[thread]
                self._changed.notify_all()

    def close(self, refusal: Callable[[], Exception]) -> None:
        """Refuse later calls and wait for those in flight; raises the refusal inside of one."""
        with self._changed:
            if self._in_flight[threading.get_ident()]:
                raise refusal()
            self._closed = True
            self._changed.wait_for(lambda: not any(self._in_flight.values()))
