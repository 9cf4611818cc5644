"""What a dialect is: routes, and the shape of its errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gguf_embed.server.answers import JSON, Answer
from gguf_embed.server.call import Call
from gguf_embed.server.failures import Failure

Handler: TypeAlias = Callable[[Call], Awaitable[Answer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One route; the shapes are for its description."""

    path: str  # as Starlette spells it: "/v1/models/{name:path}"
    handler: Handler
    summary: str
    method: str = "POST"
    request: Any = None  # a msgspec shape; None: no body
    public: bool = False  # without a key
    media: str = JSON  # of the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One way to speak of the same things."""

    name: str
    title: str
    endpoints: Sequence[Endpoint]
    failed: Callable[[Failure], Answer]
