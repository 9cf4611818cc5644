"""Who may still use a native object, and when it is freed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from gguf_embed.errors import BadInput


class Handle:
    """Owns a native object: counts the calls in flight, and frees it once, after the last of them.

    What was made of another object keeps that one in memory: a model is freed after its contexts,
    whichever of them is closed or dropped first.
    """

    def __init__(
        self,
        pointer: Any,
        free: Callable[[Any], object],
        *,
        shown: str,
        parent: Handle | None = None,
    ) -> None:
        """Take over `pointer`; `shown` is how messages call the object."""
        self._pointer = pointer
        self._free = free
        self._shown = shown
        self._parent = parent
        # Reentrant: the garbage collector may close another object in the middle of a change.
        self._changed = threading.Condition(threading.RLock())
        self._n_calls = 0
        self._n_children = 0
        self._closed = False
        if parent is not None:
            with parent._changed:
                parent._n_children += 1

    @contextmanager
    def in_use(self) -> Generator[Any]:
        """The pointer, for a call: it stays valid meanwhile. Raises BadInput after `close`."""
        with self._changed:
            if self._closed:
                raise BadInput(f"{self._shown} is closed; open it again")
            self._n_calls += 1
        try:
            yield self._pointer
        finally:
            with self._changed:
                self._n_calls -= 1
                self._changed.notify_all()
                self._free_if_unused()

    def close(self, *, wait: bool = True) -> None:
        """Refuse further calls and free the object; `wait` returns when no call is in flight.

        A second call does nothing more.
        """
        with self._changed:
            self._closed = True
            while wait and self._n_calls:
                self._changed.wait()
            self._free_if_unused()

    def _free_if_unused(self) -> None:
        if not self._closed or self._n_calls or self._n_children or self._pointer is None:
            return
        pointer, self._pointer = self._pointer, None
        self._free(pointer)
        if self._parent is not None:
            with self._parent._changed:
                self._parent._n_children -= 1
                self._parent._free_if_unused()
