"""Lines of the log, for people or (--json-logs) for programs. No text of a request is in them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any


class PlainFormatter(logging.Formatter):
    """ "08:15:02 INFO POST /v1/embeddings 200 3.1 ms model=... n_texts=1"."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback comes after it."""
        line = f"{_clock(int(record.created))} {record.levelname} {_plain(record.getMessage())}"
        shown = ("dialect", "model", "n_texts", "n_tokens", "n_truncated", "error")
        facts = _facts(record)
        line += "".join(f" {key}={_plain(str(facts[key]))}" for key in shown if facts.get(key))
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """As it is said; a traceback is a field."""
        said: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=True, default=str)


def set_up(*, json_lines: bool, requests: bool) -> None:
    """Send the log of this process to standard error; `requests`: a line for each of them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else PlainFormatter())
    for name in ("gguf_embed", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.getLogger("uvicorn.access").disabled = True
    # It says what `serve` says, and "Invalid HTTP request" of each probe of a port.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    access = logging.getLogger("gguf_embed.server.access")
    access.setLevel(logging.INFO if requests else logging.WARNING)


@lru_cache(1)
def _clock(second: int) -> str:
    """The time of day here; many lines are of the same second."""
    return datetime.fromtimestamp(second).strftime("%H:%M:%S")


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "facts", {})


def _plain(text: str) -> str:
    """What a client named, such as a model, cannot forge a line or move a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
