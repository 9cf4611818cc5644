"""How much one request, and all requests together, may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gguf_embed.server.failures import Kind, Refused

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of a server. What is over a limit is refused before anything is computed."""

    max_body_bytes: int = 32 * MIB
    max_bodies_bytes: int = 256 * MIB  # of all requests at a time
    max_texts: int = 8192  # of a request
    max_text_chars: int = 1_000_000  # of each text
    max_requests: int = 1024  # at a time
    max_queue_tokens: int = 1 << 20  # that wait, of each model
    request_s: float = 600.0  # for a request, from its last byte to the answer
    read_s: float = 30.0  # for the head of a request, and again for each part of its body
    write_s: float = 60.0  # for an answer to be taken
    idle_s: float = 75.0  # for a connection without a request

    def check_texts(self, texts: Sequence[object]) -> None:
        """Raise Refused for more texts, or longer ones, than a request may hold."""
        if len(texts) > self.max_texts:
            raise Refused(
                Kind.TOO_LARGE,
                f"{len(texts):,} texts in one request, this server takes {self.max_texts:,}; send "
                "them in several requests, or start it with a higher --max-texts",
            )
        for row, text in enumerate(texts):
            if isinstance(text, (str, list)) and len(text) > self.max_text_chars:  # pyright: ignore[reportUnknownArgumentType]
                what = "characters" if isinstance(text, str) else "tokens"
                raise Refused(
                    Kind.TOO_LARGE,
                    f"row {row}: {len(text):,} {what}, this server takes "  # pyright: ignore[reportUnknownArgumentType]
                    f"{self.max_text_chars:,}; split it, or start the server with a higher "
                    "--max-text-chars",
                )

    def check_queue(self, waiting_tokens: int, more_tokens: int, tokens_per_s: float) -> None:
        """Raise Refused where the queue of a model is full; a request alone is always taken.

        No more may wait than is done in half of a request's time: what comes last would be late,
        and its caller learns it now. `tokens_per_s` is 0 where it is not known.
        """
        most = self.max_queue_tokens
        if tokens_per_s:
            most = min(most, int(tokens_per_s * self.request_s / 2))
        if not waiting_tokens or waiting_tokens + more_tokens <= most:
            return
        retry_s = min(60, max(1, round(waiting_tokens / max(tokens_per_s, 1.0))))
        more = f" and this request has {more_tokens:,}" if more_tokens else ""
        raise Refused(
            Kind.BUSY,
            f"{waiting_tokens:,} tokens wait{more}, the queue takes {most:,} (what is done in "
            f"{self.request_s / 2:g} s, at most {self.max_queue_tokens:,}); try again in "
            f"{retry_s} s",
            retry_s=retry_s,
        )
