"""What went wrong on the way to the Hub: whether to try again, and how a person is told.

The one table of failures is here. Nothing of the Hub's own protocol is: callers pass what they
call and what lists a repository.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from gguf_embed.catalog import catalog
from gguf_embed.errors import FetchFailed, GgufEmbedError, ModelNotFound
from gguf_embed.store.local import Places, Source, local_models

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waits between failures in a row; the next is an error
_LONGEST_WAIT_S = 300.0  # that a Retry-After may ask for
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class Interrupted(Exception):
    """A transfer that ended early, or answered another range than was asked for."""


class NoHub(Exception):
    """An answer that no Hugging Face Hub gives: a web page, or JSON of another kind."""


class Patience:
    """Waits between attempts, longer each time, and gives up by raising the error itself."""

    def __init__(self, *, met: bool = False) -> None:
        self._waits = iter(BACKOFF_S)
        self._met = met

    def pause(self, error: Exception) -> None:
        """Sleep; or raise `error`, where waiting is no use or was done enough."""
        wait_s = next(self._waits, None)
        if wait_s is None or not passes(error, met=self._met):
            raise error
        wait_s = max(wait_s, _retry_after_s(error))
        if wait_s > _LONGEST_WAIT_S:
            raise error
        _log.warning("%s; again in %.0f s", _one_line(error), wait_s)
        time.sleep(wait_s)


def passes(error: Exception, *, met: bool = True) -> bool:
    """Whether trying again can help; `met`: the server has answered before."""
    kinds = _kinds(error)
    if kinds & {"ConnectError", "ConnectTimeout"}:
        return met  # a host that never answered is a wrong name, or there is no network
    if kinds & {"Interrupted", "TimeoutException", "NetworkError", "RemoteProtocolError"}:
        return True
    return _status(error) in _PASSING_STATUS


def patiently(call: Callable[[], _T]) -> _T:
    """What the call returns; called again while waiting can help."""
    patience = Patience()
    while True:
        try:
            return call()
        except Exception as error:
            patience.pause(error)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after_s(error: BaseException) -> float:
    """Seconds that the server asks to wait, as a number or a date; 0 when it does not."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    said = str(headers.get("Retry-After", "")).strip()
    if said.isdigit():
        return float(said)
    try:
        from email.utils import parsedate_to_datetime

        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0


# ----------------------------------------------------------------------------------- errors

_KEPT = "; what came so far is kept, the next run goes on from there"
_CARRY = ". Or {carry}"

# The first row that is among the classes of an error, of its bases and causes, or its status.
# Classes by name: huggingface_hub went from httpx to httpx2 between its releases.
_EXPLAINED: tuple[tuple[str, type[GgufEmbedError], str], ...] = (
    (
        "GatedRepoError",
        FetchFailed,
        "{repo} is gated: accept its terms at {endpoint}/{repo}, then set HF_TOKEN to a token "
        "that may read it ({endpoint}/settings/tokens)",
    ),
    (
        "RepositoryNotFoundError",
        ModelNotFound,
        "{endpoint} has no repository {repo}, or it is private: check the name{near}, or set "
        "HF_TOKEN to a token that may read it",
    ),
    (
        "RevisionNotFoundError",
        ModelNotFound,
        "{repo} has no revision {revision}; see {endpoint}/{repo}/commits/main, or leave the "
        "@revision out",
    ),
    ("EntryNotFoundError", ModelNotFound, "{no_such_file}"),
    ("DisabledRepoError", FetchFailed, "{repo} was disabled on {endpoint}; use another{near}"),
    ("OfflineModeIsEnabled", ModelNotFound, "{absent}"),
    (
        "ProxyError",
        FetchFailed,
        "the proxy{via_proxy} did not let through to {host} ({detail}); check HTTPS_PROXY and "
        "NO_PROXY" + _CARRY,
    ),
    (
        "gaierror",
        FetchFailed,
        "the name {host} cannot be resolved ({detail}){via_proxy}; check the network and its DNS"
        + _CARRY,
    ),
    (
        "SSLError",
        FetchFailed,
        "no trusted TLS connection to {host} ({detail}){via_proxy}; behind a proxy that reads "
        "TLS, set SSL_CERT_FILE to a file with its certificate" + _CARRY,
    ),
    (
        "TimeoutException",
        FetchFailed,
        "{host} did not answer within {timeout_s} s{via_proxy}; try again, or set "
        "HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT to more seconds" + _KEPT + _CARRY,
    ),
    (
        "ConnectError",
        FetchFailed,
        "no connection to {host} ({detail}){via_proxy}; check the network, a firewall, "
        "HF_ENDPOINT" + _KEPT + _CARRY,
    ),
    (
        "TransportError",
        FetchFailed,
        "the connection to {host} breaks again and again ({detail}); run it again" + _KEPT + _CARRY,
    ),
    (
        "Interrupted",
        FetchFailed,
        "the transfer from {host} ends early again and again ({detail}); run it again"
        + _KEPT
        + _CARRY,
    ),
    (
        "401",
        FetchFailed,
        "{host} refuses the token (401): HF_TOKEN is wrong or expired; make one at "
        "{endpoint}/settings/tokens, or unset it",
    ),
    (
        "403",
        FetchFailed,
        "{host} forbids {repo} (403: {detail}); use an HF_TOKEN that may read it",
    ),
    (
        "407",
        FetchFailed,
        "the proxy{via_proxy} wants a name and a password (407); set HTTPS_PROXY to "
        "http://NAME:PASSWORD@HOST:PORT",
    ),
    (
        "429",
        FetchFailed,
        "{host} says too many requests (429), wait {wait_s:.0f} s; or set HF_TOKEN, with which "
        "more are allowed" + _KEPT,
    ),
    (
        "5xx",
        FetchFailed,
        "{host} has an error of its own ({status}); try again later, or set HF_ENDPOINT to a mirror"
        + _KEPT
        + _CARRY,
    ),
    (
        "NoHub",
        FetchFailed,
        "no Hugging Face Hub answers at {host} ({detail}); check HF_ENDPOINT, or open the address "
        "in a browser: a hotel's or company's network may ask you to log in first" + _CARRY,
    ),
    ("HTTPError", FetchFailed, "{host} could not be asked for {repo}: {detail}"),
)


@contextmanager
def explained(
    source: Source, at: Places, files_there: Callable[[], Sequence[str] | None]
) -> Generator[None, None, None]:
    """The one gate to the network: shut when offline; errors leave it as ours.

    `files_there` lists the files of the source's repository, None where it cannot; it is asked
    only where the file is not among them.
    """
    if at.offline:
        raise ModelNotFound(absent(source, at))
    try:
        yield
    except GgufEmbedError:
        raise
    except Exception as error:
        kinds, status = _kinds(error), _status(error) or 0
        kinds |= {str(status), f"{status // 100}xx"}
        for kind, ours, template in _EXPLAINED:
            if kind in kinds:
                raise ours(template.format_map(_Facts(error, source, at, files_there))) from error
        raise


class _Facts(dict[str, object]):
    """What the messages mention; `str.format_map` asks only for what one does."""

    def __init__(
        self,
        error: Exception,
        source: Source,
        at: Places,
        files_there: Callable[[], Sequence[str] | None],
    ) -> None:
        super().__init__(
            repo=source.repo,
            revision=source.revision,
            endpoint=at.endpoint,
            host=_host(error, at),
            detail=_one_line(error),
            status=_status(error),
            wait_s=_retry_after_s(error),
            via_proxy=_via_proxy(at),
            carry=_carry(source),
        )
        self._source, self._at, self._files_there = source, at, files_there

    def __missing__(self, key: str) -> object:
        if key == "near":
            near = catalog.nearest(self._source.repo or "")
            return f" (known: {', '.join(near)})" if near else ""
        if key == "timeout_s":
            from huggingface_hub import constants

            return constants.HF_HUB_DOWNLOAD_TIMEOUT
        if key == "absent":
            return absent(self._source, self._at)
        assert key == "no_such_file", key
        files = None
        with suppress(Exception):  # that the others are named is a courtesy
            files = self._files_there()
        return no_such_file(self._source, files)


def _kinds(error: BaseException) -> set[str]:
    """Names of the classes of an error and of what caused it."""
    kinds: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        kinds.update(kind.__name__ for kind in type(cause).__mro__)
        cause = cause.__cause__ or cause.__context__  # httpcore hides the first with `from None`
    return kinds


def _one_line(error: BaseException) -> str:
    # Without the queries of addresses: those of the storage are signed.
    text = re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", str(error))
    return " ".join(text.split()) or type(error).__name__


def _host(error: BaseException, at: Places) -> str:
    url = at.endpoint
    with suppress(AttributeError, RuntimeError):  # httpx raises where it holds no request
        url = str(cast(Any, getattr(error, "response", error)).request.url)
    return urlsplit(url).netloc


def _via_proxy(at: Places) -> str:
    from urllib.request import getproxies

    proxies = getproxies()
    proxy = urlsplit(proxies.get(urlsplit(at.endpoint).scheme) or proxies.get("all") or "")
    shown = proxy._replace(netloc=proxy.netloc.rpartition("@")[2]).geturl()  # no password
    return f" (by way of the proxy {shown})" if shown else ""


def no_such_file(source: Source, files: Sequence[str] | None) -> str:
    """That the repository lacks it, and which GGUF files it has where that is known."""
    said = f"{source.repo} has no file {source.file} at {source.revision}"
    if files is None:
        return said
    ggufs = [file for file in files if file.lower().endswith(".gguf")]
    return f"{said}; its GGUF files: {', '.join(ggufs[:12]) or 'none'}"


def absent(source: Source, at: Places) -> str:
    """That it is not here and cannot be fetched, and how to bring it."""
    return (
        f"offline mode is on, and {source.label_with_size} is not on this machine. "
        f"{what_is_here(at)} To bring it, {_carry(source)}"
    )


def _carry(source: Source) -> str:
    """How a file comes to a machine without network."""
    name = source.name if source.card or not source.file else f"hf:{source.repo}/{source.file}"
    quant = f" --quant {source.quant}" if source.quant and source.card else ""
    return (
        f"on a connected machine: gguf-embed bundle {name}{quant} -o DIR; carry DIR here and run: "
        "gguf-embed unbundle DIR"
    )


def what_is_here(at: Places) -> str:
    """The models on this machine, as a sentence."""
    labels = list(dict.fromkeys(model.label for model in local_models(at)))
    more = f" and {len(labels) - 8} more (gguf-embed models)" if len(labels) > 8 else ""
    return f"Here are: {', '.join(labels[:8])}{more}."
