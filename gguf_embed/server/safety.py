"""Who may ask: keys, and the host that a browser believes it speaks to. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from gguf_embed.errors import BadOption

LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_LEAST_KEY: Final = 16  # characters; what is shorter can be guessed


def keys_in(text: str, source: str) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and those that begin with # are passed over.

    Raises BadOption, which shows no key.
    """
    lines = (line.strip() for line in text.splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise BadOption(f"{source} holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST_KEY or not key.isascii() or any(each.isspace() for each in key):
            raise BadOption(
                f"key {number} of {source} can be guessed or not be sent: a key is {_LEAST_KEY} or "
                "more ASCII characters without blanks, such as those of `openssl rand -hex 24`"
            )
    return keys


class Keys:
    """Those that open the server; kept as hashes, so that nothing can print them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)})"

    def admit(self, authorization: str | None, api_key: str | None) -> bool:
        """Whether a request with these headers comes in; takes as long for a wrong key as for any.

        The first is "Bearer KEY", the second the key itself.
        """
        if not self._digests:
            return True
        scheme, _, said = (authorization or "").partition(" ")
        given = said.strip() if scheme.lower() == "bearer" else api_key or ""
        digest = sha256(given.encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return any(matches)


def host_of(header: str) -> str:
    """A Host header without its port: "[::1]:80" is "::1"."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


def hosts_for(bound: str | None, allowed: Iterable[str]) -> frozenset[str] | None:
    """The hosts that a request may name; None: any.

    On localhost it is localhost: a page of the internet whose name was pointed here (DNS
    rebinding) still sends its own. `bound` None: a Unix socket.
    """
    named = frozenset(host.lower() for host in allowed)
    if bound in LOCAL:
        return LOCAL | named
    return named | LOCAL if named else None


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in LOCAL or (host.startswith("127.") and host.replace(".", "").isdigit())
