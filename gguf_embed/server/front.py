"""Every request passes here: its id, host and key, its time, the shape of its errors, the meters,
the log. No text of a request is logged, and no key.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.types import Receive, Scope, Send

from gguf_embed.server.answers import Answer
from gguf_embed.server.call import Bodies, Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.failures import ClientGone, Failure, Kind, Refused, failure_of
from gguf_embed.server.meters import Meters
from gguf_embed.server.safety import Keys, host_of
from gguf_embed.server.service import Service
from gguf_embed.server.traces import Traces

_log = logging.getLogger(__name__)
access = logging.getLogger("gguf_embed.server.access")

# A request without an id of its own gets one that no other process gives, without a system call.
_PREFIX: Final = secrets.token_hex(8)
_numbers: Final = itertools.count(1)

GONE: Final = 499  # no answer was sent; for the log and the meters


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What all routes share."""

    service: Service
    meters: Meters
    bodies: Bodies
    keys: Keys
    hosts: frozenset[str] | None  # None: any
    traces: Traces = field(default_factory=Traces)

    def admit(self, call: Call, *, public: bool) -> None:
        """Raise Refused for who may not come in."""
        host = host_of(call.header(b"host") or "")
        if self.hosts is not None and host not in self.hosts:
            raise Refused(
                Kind.FORBIDDEN,
                "the Host header names another host than this server; allow it with "
                "--allowed-host if that is right",
            )
        if not public and not self.keys.admit(
            call.header(b"authorization"), call.header(b"x-api-key")
        ):
            raise Refused(
                Kind.UNAUTHORIZED, "a key is needed: send the header Authorization: Bearer KEY"
            )
        limits = self.service.limits
        if not public and self.meters.in_flight > limits.max_requests:
            raise Refused(
                Kind.BUSY,
                f"{limits.max_requests:,} requests are in flight; try again in 1 s",
                retry_s=1,
            )


class Front:
    """The ASGI application of one path."""

    def __init__(self, door: Door, methods: Mapping[str, tuple[Dialect, Endpoint]]) -> None:
        self._door = door
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        method: str = scope["method"]
        found = self._methods.get(method)
        dialect, endpoint = found or next(iter(self._methods.values()))
        begin = time.monotonic()
        door = self._door
        call = Call(scope, receive, door.service, door.bodies)
        request_id = _request_id(call.header(b"x-request-id"))
        door.meters.in_flight += 1
        err: str | None = None
        status = GONE
        try:
            try:
                door.admit(call, public=endpoint.public)
                if found is None:
                    raise Refused(Kind.NO_METHOD, f"{method} is not what this route takes")
                answer = await self._handled(call, endpoint)
            except ClientGone:
                err = "client_gone"
                return
            except Exception as error:
                failure = failure_of(error)
                err = failure.kind.value
                if failure.kind is Kind.BUG:
                    _log.exception("request %s: unexpected error", request_id)
                answer = self._told(dialect, failure)
            status = answer.status
            await _send(answer, send, request_id, call, with_body=method != "HEAD")
        except ClientGone:
            err = "client_gone"
        finally:
            call.end()
            door.meters.in_flight -= 1
            door.meters.request(dialect.name, method, endpoint.path, status, err)
            for done in call.results:
                door.meters.result(done.served, dialect.name, done)
            if door.traces:
                door.traces.request(
                    call.headers(),
                    method=method,
                    route=endpoint.path,
                    dialect=dialect.name,
                    status=status,
                    seconds=time.monotonic() - begin,
                    results=call.results,
                    err=err,
                )
            if access.isEnabledFor(logging.INFO):
                _log_access(call, request_id, dialect, status, time.monotonic() - begin, err)

    async def _handled(self, call: Call, endpoint: Endpoint) -> Answer:
        """The handler's answer. Raises ClientGone and Refused where it takes too long."""
        limit = self._door.service.limits.request_s
        try:
            async with asyncio.timeout(limit):
                return await endpoint.handler(call)
        except TimeoutError:
            raise Refused(
                Kind.TIMEOUT,
                f"not done within {limit:g} s, and given up; send fewer texts at a time, or start "
                "the server with a longer --timeout",
            ) from None
        except asyncio.CancelledError:
            if not call.gone:
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            raise ClientGone from None

    def _told(self, dialect: Dialect, failure: Failure) -> Answer:
        answer = dialect.failed(failure)
        headers = dict(answer.headers)
        if failure.retry_s is not None:
            headers["retry-after"] = str(failure.retry_s)
        if failure.kind is Kind.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        if failure.kind is Kind.NO_METHOD:
            headers["allow"] = ", ".join(self._methods)
        if failure.kind in (Kind.TOO_LARGE, Kind.TOO_SLOW):
            headers["connection"] = "close"  # the rest of its body is not read
        return Answer(status=answer.status, body=answer.body, media=answer.media, headers=headers)


async def _send(
    answer: Answer, send: Send, request_id: str, call: Call, *, with_body: bool
) -> None:
    headers = [
        (b"content-type", answer.media.encode()),
        (b"x-request-id", request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
    ]
    if answer.parts is None:
        headers.append((b"content-length", str(len(answer.body)).encode()))
    if n_truncated := sum(done.n_truncated for done in call.results):
        headers.append((b"x-truncated", str(n_truncated).encode()))
    headers += [(name.encode(), value.encode("latin-1")) for name, value in answer.headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if answer.parts is None or not with_body:
        await send({"type": "http.response.body", "body": answer.body if with_body else b""})
        return
    try:
        async for part in answer.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except asyncio.CancelledError:
        if not call.gone:
            raise
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        raise ClientGone from None
    await send({"type": "http.response.body", "body": b""})


def _request_id(given: str | None) -> str:
    """The client's own, where it is one; else a new one."""
    if given and len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return f"{_PREFIX}-{next(_numbers):x}"


def _log_access(
    call: Call, request_id: str, dialect: Dialect, status: int, seconds: float, err: str | None
) -> None:
    done = call.results
    said = (call.scope["method"], call.scope["path"], status, seconds * 1000)
    # Made here rather than by `info`, which looks for the line that called it.
    record = logging.LogRecord(
        access.name, logging.INFO, __file__, 0, "%s %s %d %.1f ms", said, None
    )
    record.facts = {
        "request_id": request_id,
        "dialect": dialect.name,
        "method": call.scope["method"],
        "path": call.scope["path"],
        "status": status,
        "ms": round(seconds * 1000, 3),
        "model": call.model,
        "n_texts": sum(len(each.token_counts) for each in done),
        "n_tokens": sum(each.n_tokens for each in done),
        "n_truncated": sum(each.n_truncated for each in done),
        "error": err,
    }
    access.handle(record)
