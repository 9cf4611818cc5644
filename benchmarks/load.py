"""An HTTP client that costs little: connections that stay open, requests made beforehand."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


@dataclass(slots=True, kw_only=True)
class Answers:
    """What came back in a span of time."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list[float])
    statuses: dict[int, int] = field(default_factory=dict[int, int])
    min_cosine: float = 1.0  # to the vectors that were expected
    n_tokens: int = 0

    def at(self, share: float) -> float:
        """A quantile of the latencies, in milliseconds."""
        return float(np.quantile(self.latencies_s, share)) * 1000 if self.latencies_s else 0.0

    def as_dict(self) -> dict[str, object]:
        """Figures for a table and for JSON."""
        n = len(self.latencies_s)
        return {
            "n_requests": n,
            "requests_per_s": round(n / self.seconds, 2),
            "tokens_per_s": round(self.n_tokens / self.seconds, 1),
            "p50_ms": round(self.at(0.5), 2),
            "p99_ms": round(self.at(0.99), 2),
            "min_cosine": round(self.min_cosine, 6),
            "statuses": {str(key): value for key, value in self.statuses.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, with what should come back."""

    raw: bytes
    expected: Vectors
    n_tokens: int


def ask(model: str, texts: Sequence[str], expected: Vectors, n_tokens: int) -> Ask:
    """Texts to /v1/embeddings, as the openai client asks: base64."""
    body = json.dumps({"model": model, "input": list(texts), "encoding_format": "base64"})
    raw = body.encode()
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    return Ask(raw=head.encode() + raw, expected=expected, n_tokens=n_tokens)


async def drive(
    port: int, asks: Sequence[Ask], n_connections: int, seconds: float, first: Ask
) -> Answers:
    """Each connection asks again and again, and the last answer is waited for.

    What it asks first, to be opened, is `first`, which is not counted.
    """
    answers = Answers()
    started = asyncio.Barrier(n_connections + 1)
    end = [0.0]

    async def connection(number: int) -> None:
        client, turn = Client(port), number
        try:
            await client.asked(first)
            await started.wait()
            while time.perf_counter() < end[0]:
                turn += n_connections
                each = asks[turn % len(asks)]
                begin = time.perf_counter()
                status, body = await client.asked(each)
                done = time.perf_counter()
                answers.statuses[status] = answers.statuses.get(status, 0) + 1
                if status == 429:
                    await asyncio.sleep(1)
                if status == 200:
                    answers.latencies_s.append(done - begin)
                    answers.n_tokens += each.n_tokens
                    if turn % 50 < n_connections:  # to look at all of them would cost too much
                        answers.min_cosine = min(answers.min_cosine, cosine(body, each.expected))
        finally:
            client.close()

    begin = [0.0]

    async def timed() -> None:
        end[0] = float("inf")
        await started.wait()
        begin[0] = time.perf_counter()
        end[0] = begin[0] + seconds

    await asyncio.gather(timed(), *(connection(number) for number in range(n_connections)))
    answers.seconds = time.perf_counter() - begin[0]
    return answers


def cosine(body: bytes, expected: Vectors) -> float:
    """Least cosine of the vectors of an answer to the expected ones."""
    rows = sorted(json.loads(body)["data"], key=lambda row: row["index"])
    vectors = np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])
    return float((vectors * expected).sum(axis=1).min()) if vectors.shape == expected.shape else -1


class Client:
    """A connection that stays open; where the server has closed it, another one."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def asked(self, each: Ask) -> tuple[int, bytes]:
        """Status and body of the answer."""
        while True:
            fresh = self._streams is None
            if self._streams is None:
                opened = asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
                self._streams = await opened
            try:
                return await _asked(*self._streams, each)
            except (asyncio.IncompleteReadError, ConnectionError):
                self.close()
                if fresh:
                    raise  # it was not closed for its age: the request is at fault

    def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _asked(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, each: Ask
) -> tuple[int, bytes]:
    writer.write(each.raw)
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    lowered = head.lower()
    at = lowered.find(b"content-length:")
    if at < 0:
        raise RuntimeError(f"an answer without a length: {head!r}")
    length = int(lowered[at + 15 : lowered.index(b"\r\n", at)])
    return status, await reader.readexactly(length)
