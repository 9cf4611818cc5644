"""What went wrong, as a kind that every dialect can tell: the one table from errors to statuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from gguf_embed.errors import (
    BadInput,
    BadModelFile,
    BadText,
    DoesNotFit,
    FetchFailed,
    GgufEmbedError,
    ModelNotFound,
    NativeFailed,
    OutputFailed,
    TextTooLong,
)


class Kind(Enum):
    """What the caller can do about it; the value is the code that answers carry."""

    INVALID = "invalid_request"  # the request itself
    EMPTY = "empty_input"
    BAD_TEXT = "invalid_text"  # one of its texts
    TOO_LONG = "text_too_long"  # for the model
    TOO_LARGE = "request_too_large"  # for this server
    UNAUTHORIZED = "invalid_api_key"
    FORBIDDEN = "forbidden"
    NO_MODEL = "model_not_found"
    NO_INDEX = "index_not_found"
    NO_ROUTE = "no_such_route"
    NO_METHOD = "method_not_allowed"
    NO_RERANKER = "no_reranker"
    TOO_SLOW = "request_too_slow"  # its bytes did not come
    BUSY = "queue_full"
    TIMEOUT = "timeout"
    NO_MEMORY = "model_does_not_fit"
    FETCH = "model_not_fetched"
    ENDING = "server_is_ending"
    NATIVE = "engine_failed"
    BUG = "internal_error"


STATUS: Final[Mapping[Kind, int]] = {
    Kind.INVALID: 400,
    Kind.EMPTY: 400,
    Kind.BAD_TEXT: 400,
    Kind.TOO_LONG: 400,
    Kind.TOO_LARGE: 413,
    Kind.UNAUTHORIZED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NO_MODEL: 404,
    Kind.NO_INDEX: 404,
    Kind.NO_ROUTE: 404,
    Kind.NO_METHOD: 405,
    Kind.NO_RERANKER: 501,
    Kind.TOO_SLOW: 408,
    Kind.BUSY: 429,
    Kind.TIMEOUT: 504,
    Kind.NO_MEMORY: 503,
    Kind.FETCH: 502,
    Kind.ENDING: 503,
    Kind.NATIVE: 500,
    Kind.BUG: 500,
}

# The first that an error is an instance of.
_KINDS: Final[tuple[tuple[type[GgufEmbedError], Kind], ...]] = (
    (TextTooLong, Kind.TOO_LONG),
    (BadText, Kind.BAD_TEXT),
    (BadInput, Kind.INVALID),
    (ModelNotFound, Kind.NO_MODEL),
    (DoesNotFit, Kind.NO_MEMORY),
    (FetchFailed, Kind.FETCH),
    (BadModelFile, Kind.NATIVE),
    (OutputFailed, Kind.NATIVE),
    (NativeFailed, Kind.NATIVE),
)


class Refused(GgufEmbedError):
    """The server does not do what a request asks."""

    def __init__(self, kind: Kind, message: str, *, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_s = retry_s


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a client is told."""

    kind: Kind
    message: str
    retry_s: int | None = None
    bad_text: BadText | None = None  # the error, where it is one text's

    @property
    def status(self) -> int:
        """Of most dialects."""
        return STATUS[self.kind]

    @property
    def is_ours(self) -> bool:
        """Whether the server is to blame, not the request."""
        return self.status >= 500


def failure_of(error: Exception) -> Failure:
    """What is told of an error; of a bug only that it is one."""
    if isinstance(error, Refused):
        return Failure(kind=error.kind, message=str(error), retry_s=error.retry_s)
    for kind_of_error, kind in _KINDS:
        if isinstance(error, kind_of_error):
            bad_text = error if isinstance(error, BadText) else None
            return Failure(kind=kind, message=str(error), bad_text=bad_text)
    return Failure(
        kind=Kind.BUG,
        message=f"unexpected {type(error).__name__}; this is a bug, the server's log has more",
    )
