"""Where a model is served, and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gguf_embed.errors import BadOption, kind_of

if TYPE_CHECKING:
    from http.client import HTTPConnection

KEY_VARIABLE: Final = "GGUF_EMBED_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is, and how it is asked."""

    url: str  # "http://host:port", "https://...", or "unix:/path/of/socket"
    model: str | None = None  # None: the server's default
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0

    @classmethod
    def of(cls, url: object, model: object, api_key: object) -> Address:
        """As a caller gives it; the key from $GGUF_EMBED_API_KEY where none is given."""
        for name, value in (("url", url), ("model", model), ("api_key", api_key)):
            if not isinstance(value, str) and (value is not None or name == "url"):
                raise BadOption(f"{name} is {kind_of(value)}: pass a str")
        return cls(url=str(url), model=_text(model), api_key=_text(api_key))

    def connection(self) -> HTTPConnection:
        """A new one. Raises BadOption for what is no address."""
        if self.url.startswith("unix:"):
            return _over_unix_socket(self.url.removeprefix("unix:"), self.timeout_s)
        parts = urlsplit(self.url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if parts.scheme not in ("http", "https") or not host:
            raise BadOption(
                f"{self.url!r} is no address of a server; write http://HOST:PORT, https://HOST, or "
                "unix:/path/of/socket"
            )
        import http.client

        if parts.scheme == "https":
            import ssl

            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self.timeout_s, context=context)
        return http.client.HTTPConnection(host, port, timeout=self.timeout_s)


def _over_unix_socket(path: str, timeout_s: float) -> HTTPConnection:
    import http.client
    import socket

    class UnixConnection(http.client.HTTPConnection):
        def connect(self) -> None:
            """To the socket file."""
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout_s)
            self.sock.connect(path)

    return UnixConnection("localhost", timeout=timeout_s)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
