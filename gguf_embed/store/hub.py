"""The Hub's protocol, spoken through huggingface_hub: what it says of files, and their bytes.

This is the only file that talks to it, and it imports huggingface_hub only inside functions: that
package reads its environment (HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE) when it is
imported.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from gguf_embed import __version__
from gguf_embed.catalog import catalog
from gguf_embed.errors import BadOption, FetchFailed, ModelNotFound
from gguf_embed.gguf import header as gguf
from gguf_embed.store.failures import Interrupted, NoHub, explained, no_such_file, patiently
from gguf_embed.store.local import (
    IMATRIX,
    SHA256,
    SHARD,
    Places,
    Source,
    best_first,
    located,
    quant_of,
)
from gguf_embed.store.safe_names import Named, fault
from gguf_embed.system import paths

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteInfo:
    """What the Hub says of one file and of the repository that holds it."""

    commit: str
    n_bytes: int | None
    sha256: str | None
    licence: str | None  # as the repository's card says: "apache-2.0"
    gated: bool  # terms must be accepted on the repository's page


def places(*, offline: bool = False) -> Places:
    """As the HF_*, GGUF_EMBED_HOME and OLLAMA_MODELS variables say."""
    from huggingface_hub import constants

    ollama = (
        os.environ.get("OLLAMA_MODELS"),
        "~/.ollama/models",
        "/usr/share/ollama/.ollama/models",  # of the service that its Linux installer sets up
    )
    return Places(
        endpoint=constants.ENDPOINT,
        cache=Path(constants.HF_HUB_CACHE),
        store=paths.home() / "models",
        ollama=tuple(Path(root).expanduser() for root in ollama if root),
        offline=offline or constants.HF_HUB_OFFLINE,
    )


# ---------------------------------------------------------------------- what the Hub says

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[\w-]{8,}")  # it becomes a file name


def remote_info(source: Source, *, at: Places | None = None) -> RemoteInfo:
    """Commit, size, hash, licence and gate of a file; one request, also where it is gated."""
    info = _model_info(source, at or places())
    card = info.card_data
    for sibling in info.siblings or []:
        if sibling.rfilename == source.file:
            return RemoteInfo(
                commit=info.sha or source.revision,
                n_bytes=sibling.size,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                licence=card.get("license_name") or card.get("license") if card else None,
                gated=bool(info.gated),
            )
    raise ModelNotFound(no_such_file(source, _names_of(info)))


def remote_header(source: Source, *, at: Places | None = None) -> gguf.Header:
    """The GGUF header of a file that need not be here, read by range requests."""
    at = at or places()
    source = located(source, at)
    if source.path is not None:
        return gguf.read_header(source.path)
    with gate(source, at):
        reader = _RangeReader(head(source, at))
        return gguf.parse_header(reader, source=f"hf:{source.repo}/{source.file}")


def repository_files(repo: str, revision: str | None, at: Places) -> tuple[Source, ...]:
    """The GGUF files of a repository, asked of the Hub, largest first."""
    asked = Source(
        name=repo, card=catalog.find(repo), repo=repo, revision=revision or "main", file=""
    )
    siblings = _model_info(asked, at).siblings or []
    named = [sibling for sibling in siblings if not IMATRIX.search(sibling.rfilename)]
    ggufs = [sibling for sibling in named if sibling.rfilename.lower().endswith(".gguf")]
    for sibling in ggufs:
        if reason := fault("file", sibling.rfilename):
            _log.warning("%s lists %r, whose name %s; passed over", repo, sibling.rfilename, reason)
    ggufs = [sibling for sibling in ggufs if not fault("file", sibling.rfilename)]
    found = [
        replace(
            asked,
            quant=quant_of(sibling.rfilename),
            file=sibling.rfilename,
            n_bytes=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
        )
        for sibling in ggufs
        if not SHARD.search(sibling.rfilename)
    ]
    if not found:
        why = "only split ones" if ggufs else "none"
        raise ModelNotFound(
            f"{repo} has no GGUF in one file ({why} among its {len(siblings)} files); look for "
            f"another at {at.endpoint}/models?library=gguf&search={repo.rpartition('/')[2]}"
        )
    return best_first(located(source, at) for source in found)


def imatrix_of(source: Source, at: Places) -> Source | None:
    """The importance matrix that lies beside a file in its repository; None where none does."""
    for sibling in _model_info(source, at).siblings or []:
        name = sibling.rfilename
        if name.lower().endswith(".gguf") and IMATRIX.search(name) and not fault("file", name):
            return replace(
                source,
                quant=None,
                file=name,
                n_bytes=sibling.size,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                path=None,
                where=None,
            )
    return None


def _model_info(source: Source, at: Places) -> ModelInfo:
    if source.repo is None:
        raise BadOption(f"{source.label} is a file on this machine; the Hub knows nothing of it")
    repo = source.repo
    check_names(source)
    with gate(source, at):
        from huggingface_hub import HfApi, constants

        api = HfApi(endpoint=at.endpoint, library_name="gguf_embed", library_version=__version__)

        def ask() -> ModelInfo:
            try:
                info = api.model_info(
                    repo,
                    revision=source.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                )
                if info.siblings is None:
                    raise ValueError("no list of files")
                return info
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                # A page that a network puts before everything has status 200 and is no JSON.
                raise NoHub(f"its answer about {repo} is none of a Hub") from error

        return patiently(ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Where the bytes of one commit's file are, and what they must be."""

    commit: str
    etag: str  # names the blob
    n_bytes: int
    sha256: str | None
    url: str
    headers: Mapping[str, str]


def head(source: Source, at: Places) -> Remote:
    """Ask for a file's commit, hash, size and the address to download it from."""
    from huggingface_hub import constants, file_download, hf_hub_url, utils

    assert source.repo is not None, "a file that is only here is never asked for"
    check_names(source)
    url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=at.endpoint)
    # Their types name a bare `dict`, which strict checking cannot see through.
    build_headers = cast(Callable[..., dict[str, str]], utils.build_hf_headers)  # pyright: ignore[reportUnknownMemberType]
    metadata = cast(Callable[..., Any], file_download.get_hf_file_metadata)  # pyright: ignore[reportUnknownMemberType]
    headers = build_headers(library_name="gguf_embed", library_version=__version__)
    meta = patiently(
        lambda: metadata(url, headers=dict(headers), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    )
    commit, etag, n_bytes = str(meta.commit_hash), str(meta.etag), meta.size
    if not _COMMIT.fullmatch(commit) or not _ETAG.fullmatch(etag) or n_bytes is None:
        raise FetchFailed(
            f"{url} answered without commit, ETag or size, as no Hugging Face Hub does; check "
            "HF_ENDPOINT, or a proxy that answers in its place"
        )
    # A redirect leads to storage that signs its addresses; the token is no business of its. Xet
    # files come through the Hub's own address, as its client takes them without hf_xet.
    location = url if meta.xet_file_data else str(meta.location)
    if urlsplit(location)[:2] != urlsplit(url)[:2]:
        headers.pop("authorization", None)
    return Remote(
        commit=commit,
        etag=etag,
        n_bytes=n_bytes,
        sha256=source.sha256 or (etag if SHA256.fullmatch(etag) else None),
        url=location,
        headers={**headers, "Accept-Encoding": "identity"},
    )


@contextmanager
def get(remote: Remote, first: int, last: int | None) -> Generator[Any, None, None]:
    """A streamed response: 206 with the bytes from `first`, or 200 with the whole file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = dict(remote.headers)
    if first or last is not None:
        headers["Range"] = f"bytes={first}-{'' if last is None else last}"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", remote.url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        given = response.headers.get("Content-Range", "")
        wanted = rf"bytes {first}-\d+/({remote.n_bytes}|\*)"
        if response.status_code == 206 and not re.fullmatch(wanted, given):
            raise Interrupted(f"asked for {headers.get('Range')}, the server gave {given!r}")
        yield response


class _RangeReader:
    """Bytes of a remote file by position, one request each."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self.size: int | None = remote.n_bytes

    def read(self, offset: int, size: int, /) -> bytes:
        """The bytes [offset, offset + size); fewer only where the file ends."""
        size = min(size, self._remote.n_bytes - offset)
        return patiently(lambda: self._read(offset, size)) if size > 0 else b""

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray()
        with get(self._remote, offset, offset + size - 1) as response:
            # A server that ignores ranges begins at 0; what is before is passed over.
            skip = 0 if response.status_code == 206 else offset
            for chunk in response.iter_raw():
                data += chunk
                if len(data) >= skip + size:
                    return bytes(data[skip : skip + size])
        raise Interrupted(f"{len(data)} bytes came, {skip + size} were asked for")


def gate(source: Source, at: Places) -> AbstractContextManager[None]:
    """Around every use of the network: shut when offline; errors leave it as ours."""
    return explained(source, at, lambda: _names_of(_model_info(source, at)))


def check_names(source: Source) -> None:
    """Raise BadOption where repository, revision or file of the source may not become a path."""
    named: tuple[tuple[Named, str | None], ...] = (
        ("repository", source.repo),
        ("revision", source.revision),
        ("file", source.file or "-"),  # none: the repository is asked for
    )
    for kind, name in named:
        if reason := fault(kind, name):
            raise BadOption(f"{name!r} cannot name a {kind}, it {reason}; nothing was fetched")


def _names_of(info: ModelInfo) -> Sequence[str]:
    return [sibling.rfilename for sibling in info.siblings or []]
