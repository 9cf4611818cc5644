"""uvicorn's HTTP protocol with patience that ends: a client that sends its head byte by byte, or
does not take its answer, loses its connection and holds nothing.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 64 * 1024

_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 42\r\nconnection: close\r\n\r\n"
    b"the head of the request has over 65,536 B\n"
)
_TOO_SLOW: Final = (
    b"HTTP/1.1 408 Request Timeout\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 37\r\nconnection: close\r\n\r\n"
    b"the head of the request did not come\n"
)


class PatientProtocol(HttpToolsProtocol):
    """One connection. The times come from `guarded`."""

    head_s = 30.0
    write_s = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for a head, but not for ever."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the times."""
        self._stop(self._head_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes before a head is complete."""
        if self._in_head:
            if self._head_timer is None:  # the first bytes of a later request
                self._await_head()
            self._n_head_bytes += len(data)
            # A body may have come with its head; what has no end of a head in it is all head.
            if self._n_head_bytes > MAX_HEAD_BYTES and b"\r\n\r\n" not in data:
                self._refuse(_TOO_LARGE)
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """The head came."""
        self._in_head = False
        self._n_head_bytes = 0
        self._stop(self._head_timer)
        self._head_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes next is a head again."""
        self._in_head = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not take what it asked for."""
        super().pause_writing()
        self._stop(self._write_timer)
        self._write_timer = self.loop.call_later(self.write_s, self._abort)

    def resume_writing(self) -> None:
        """It does."""
        self._stop(self._write_timer)
        self._write_timer = None
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._refuse, _TOO_SLOW)

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()

    def _abort(self) -> None:
        _log.info("a client did not take its answer in %g s and lost its connection", self.write_s)
        self.transport.abort()  # pyright: ignore[reportAttributeAccessIssue]

    def _stop(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def patient(*, head_s: float, write_s: float) -> type[PatientProtocol]:
    """The protocol with these times, in seconds."""
    return type("Patient", (PatientProtocol,), {"head_s": head_s, "write_s": write_s})
