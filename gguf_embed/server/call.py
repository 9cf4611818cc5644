"""One HTTP request: its body, read within limits, and what a handler may ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope

from gguf_embed.server.asked import Embedded, EmbedRequest, Reranked, RerankRequest, Result
from gguf_embed.server.failures import ClientGone, Kind, Refused
from gguf_embed.server.service import Service

_Shape = TypeVar("_Shape")


class Bodies:
    """Counts the bytes of all bodies that are in memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.n_bytes = 0

    def take(self, n_bytes: int) -> None:
        """Raises Refused where there are too many already; a body alone is always taken."""
        if self.n_bytes and self.n_bytes + n_bytes > self._max_bytes:
            raise Refused(
                Kind.BUSY,
                f"requests with {self.n_bytes:,} bytes are in flight, this server holds "
                f"{self._max_bytes:,}; try again in 1 s",
                retry_s=1,
            )
        self.n_bytes += n_bytes

    def give_back(self, n_bytes: int) -> None:
        """Of a request that ended."""
        self.n_bytes -= n_bytes


class Call:
    """What a handler gets. `receive` is used by it alone."""

    def __init__(self, scope: Scope, receive: Receive, service: Service, bodies: Bodies) -> None:
        self.service = service
        self.scope = scope
        self.params: Mapping[str, str] = scope.get("path_params", {})
        self.results: list[Result] = []  # for headers, meters and the log
        self.model: str | None = None  # as the request names it
        self._receive = receive
        self._bodies = bodies
        self._n_taken = 0
        self.gone = False
        self._watch: asyncio.Task[None] | None = None

    def header(self, name: bytes) -> str | None:
        """A header of the request, by its name in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return value.decode("latin-1")
        return None

    def headers(self) -> dict[str, str]:
        """All of the request, by their names in lower case."""
        return {
            key.decode("latin-1"): value.decode("latin-1") for key, value in self.scope["headers"]
        }

    async def body(self) -> bytes:
        """All of it. Raises Refused where it is too large or does not come, and ClientGone."""
        limits = self.service.limits
        said = self.header(b"content-length")
        if said is not None and said.isdigit() and int(said) > limits.max_body_bytes:
            raise self._too_large(int(said))
        parts: list[bytes] = []
        n_bytes = 0
        while True:
            try:
                async with asyncio.timeout(limits.read_s):
                    message = await self._receive()
            except TimeoutError:
                raise Refused(
                    Kind.TOO_SLOW,
                    f"the body did not come: {n_bytes:,} bytes, then nothing for "
                    f"{limits.read_s:g} s",
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            n_bytes += len(part)
            if n_bytes > limits.max_body_bytes:
                raise self._too_large(n_bytes)
            self._bodies.take(len(part))
            self._n_taken += len(part)
            parts.append(part)
            if not message.get("more_body", False):
                self._begin_watch()
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def json(self, shape: type[_Shape]) -> _Shape:
        """The body as that shape. Raises Refused, which says what is wrong and where."""
        body = await self.body()
        try:
            return msgspec.json.decode(body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(Kind.INVALID, f"the body is not what this route takes: {error}") from None

    def _begin_watch(self) -> None:
        """From now on the handler is cancelled when the client goes away."""
        task = asyncio.current_task()
        assert task is not None, "in a handler"

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.gone = True
            task.cancel()

        self._watch = asyncio.create_task(watch())

    async def embed(self, request: EmbedRequest) -> Embedded:
        """Vectors."""
        self.model = request.model
        embedded = await self.service.embed(request)
        self.results.append(embedded)
        return embedded

    async def rerank(self, request: RerankRequest) -> Reranked:
        """Scores."""
        self.model = request.model
        reranked = await self.service.rerank(request)
        self.results.append(reranked)
        return reranked

    def end(self) -> None:
        """Of whatever outcome."""
        if self._watch is not None:
            self._watch.cancel()
        self._bodies.give_back(self._n_taken)
        self._n_taken = 0

    def _too_large(self, n_bytes: int) -> Refused:
        return Refused(
            Kind.TOO_LARGE,
            f"a body of {n_bytes:,} bytes or more, this server takes "
            f"{self.service.limits.max_body_bytes:,}; send it in several requests, or start the "
            "server with a higher --max-body",
        )
