"""What goes back to a client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"
HTML: Final = "text/html; charset=utf-8"
LINES: Final = "application/x-ndjson"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, whole or (with `parts`) as it comes."""

    status: int = 200
    body: bytes = b""
    media: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: AsyncIterator[bytes] | None = None


def dumps(value: object) -> bytes:
    """JSON. Rows of numpy arrays are written from their buffers, float32 in the shortest decimals
    that give the same float32.
    """
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def answered(value: object, *, status: int = 200) -> Answer:
    """A value as JSON."""
    return Answer(status=status, body=dumps(value))


def text(said: str, *, status: int = 200, media: str = TEXT) -> Answer:
    """Plain text."""
    return Answer(status=status, body=said.encode(), media=media)


def loads(body: bytes) -> Any:
    """What JSON says. Raises ValueError; also for NaN, invalid UTF-8 and what is too deep."""
    return orjson.loads(body)
