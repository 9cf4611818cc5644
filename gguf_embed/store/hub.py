"""From the name of a model to its verified GGUF: what the name means, and the download.

    source = resolve("qwen3-embedding:8b", "Q4_K_M")   # asks nothing of the network yet
    header = remote_header(source)                     # a few MB by ranges, before gigabytes move
    path = fetch(source)                               # what is here, else from the Hub

Names: a card's id or alias, `owner/repo`, `hf:owner/repo/file.gguf`, the first two with an
optional `:QUANT`, repositories and files with an optional `@revision`; a path; an Ollama tag.
Downloads go into the Hugging Face cache in its own layout, where every other tool finds them.

This is the only module that imports huggingface_hub, and only inside functions: it reads its
environment (HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE) when it is imported.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from gguf_embed import __version__
from gguf_embed.catalog import catalog
from gguf_embed.catalog.catalog import ModelCard
from gguf_embed.errors import BadInput, BadOption, FetchFailed, GgufEmbedError, ModelNotFound
from gguf_embed.gguf import header as gguf
from gguf_embed.gguf import quants
from gguf_embed.store import local as store
from gguf_embed.store.local import Places, Source
from gguf_embed.system import paths

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Progress = Callable[[int, int], None]  # (bytes here, bytes in all)


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


# ---------------------------------------------------------------------- what a name means

_HUB_NAME = re.compile(
    r"(?P<prefix>hf:)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?P<file>[^@:\\]+))?(?:@(?P<revision>[\w./-]+))?"
)


def sources(name: str | Path, *, at: Places | None = None) -> tuple[Source, ...]:
    """Every file that `name` can mean, best quality first, with `path` where it is here.

    Asks the Hub only for the files of a repository that the catalog does not know, and only when
    online. Raises ModelNotFound, which names what is near.
    """
    if isinstance(name, Path) or _is_path(name):
        return (_local_file(Path(name)),)
    at = at or places()
    name, quant = _split_quant(name)
    if card := catalog.find(name):
        found = _card_sources(card, name, at)
    elif match := _HUB_NAME.fullmatch(name):
        found = _hub_sources(name, match, at)
    else:
        found = tuple(model for model in store.local_models(at) if model.name == name)
    if not found:
        near = catalog.nearest(name)
        hint = f"did you mean {' or '.join(near)}?" if near else _what_is_here(at)
        raise ModelNotFound(
            f"no model is called {name!r}; {hint} Other names: owner/repo or "
            "hf:owner/repo/file.gguf for the Hub, a path for a file"
        )
    return found if quant is None else (_first(_of_quant(found, quant)),)


def offered(
    name: str | Path, quant: str | None = None, *, here: bool = True, at: Places | None = None
) -> tuple[Source, ...]:
    """The files to choose from where `name` is to be run; all of that `quant`, where it is given.

    They are those of `sources`, but of a model that is built in the built-in file alone, so that
    the same name gives the same vectors whatever else was fetched. A repository of which a fitting
    file is here is not asked again: what was fetched stays what is used, and another state of it
    is had by naming the revision; unless `here` is False. Raises ModelNotFound, BadOption.
    """
    if isinstance(name, Path) or _is_path(name):
        if quant:
            raise BadOption(f"{name} is one file; it cannot be had as {quant}, leave that out")
        return (_local_file(Path(name)),)
    bare, in_name = _split_quant(name)
    if quant and in_name and quants.parse(quant) != quants.parse(in_name):
        raise BadOption(f"{name} says {in_name}, but {quant} was asked for; give one of them")
    quant = quant or in_name
    card = catalog.find(bare)
    if card is not None:
        builtin = tuple(store.from_card(card, file) for file in card.files if file.builtin)
        if fitting := _fitting(builtin, quant):
            return fitting
    at = at or places()
    match = _HUB_NAME.fullmatch(bare)
    if here and match and not match["file"] and not card:
        found = store.repository_here(match["repo"], match["revision"], at)
        if fitting := _fitting(found, quant):
            return fitting
    return _of_quant(sources(bare, at=at), quant)


def resolve(name: str | Path, quant: str | None = None, *, at: Places | None = None) -> Source:
    """The one file that `name` means, with its `path` where it is already here.

    Of those `offered` the best that is here, else Q8_0, else the best there is.
    """
    return _first(offered(name, quant, at=at))


def _first(found: tuple[Source, ...]) -> Source:
    here = (source for source in found if source.path)
    usual = (source for source in found if source.quant == "Q8_0")
    return next(here, None) or next(usual, None) or found[0]


def _of_quant(found: tuple[Source, ...], quant: str | None) -> tuple[Source, ...]:
    """Those in that quantization; raises ModelNotFound, which names what there is."""
    if fitting := _fitting(found, quant):
        return fitting
    have = ", ".join(replace(s, name=s.quant or s.file, quant=None).label_with_size for s in found)
    raise ModelNotFound(f"{found[0].name} has no {quant}; it has: {have}")


def _fitting(found: tuple[Source, ...], quant: str | None) -> tuple[Source, ...]:
    if quant is None:
        return found
    return tuple(source for source in found if source.quant == quants.parse(quant))


def _is_path(name: str) -> bool:
    """Whether it can only be meant as a path."""
    if name.startswith("hf:") or catalog.find(name):
        return False
    looks = name.startswith(("/", ".", "~", "\\")) or name.lower().endswith(".gguf")
    return looks or _is_file(Path(name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _split_quant(name: str) -> tuple[str, str | None]:
    """`owner/repo:Q8_0@main` -> `owner/repo@main`, `Q8_0`; an alias may hold a colon itself."""
    bare, at_sign, revision = name.partition("@")
    head, _, tail = bare.rpartition(":")
    if head and re.fullmatch(quants.PATTERN, tail, re.IGNORECASE) and catalog.find(name) is None:
        return head + at_sign + revision, tail
    return name, None


def _local_file(path: Path) -> Source:
    with suppress(RuntimeError):  # "~nobody" is a name like any other
        path = path.expanduser()
    if _is_file(path):
        return Source(
            name=str(path),
            quant=store.quant_of(path.name),
            file=path.name,
            n_bytes=path.stat().st_size,
            path=path,
            where="file",
        )
    why, folder, beside = "does not exist", path.parent, list[str]()
    with suppress(OSError, ValueError):  # what no system call takes does not exist either
        if path.is_dir():
            why, folder = "is a directory, not a GGUF file", path
        beside = sorted(file.name for file in folder.glob("*.gguf"))[:5]
    here = f"; {folder} holds {', '.join(beside)}" if beside else ""
    raise ModelNotFound(f"{path} {why}{here}; a file on the Hub is written hf:owner/repo/file.gguf")


def _card_sources(card: ModelCard, name: str, at: Places) -> tuple[Source, ...]:
    """A card's files, and others of that model that are here; or those of the repository named."""
    found = [store.located(store.from_card(card, file), at) for file in card.files]
    known = {source.path for source in found}
    for model in store.local_models(at):
        if model.card and model.card.id == card.id and model.path not in known:
            found.append(model)
    in_repo = [source for source in found if (source.repo or "").lower() == name.lower()]
    if not found:
        raise ModelNotFound(
            f"{card.id} is known, but no GGUF of it is; make one from {card.source_repo} with "
            "llama.cpp's convert_hf_to_gguf.py and pass its path, or name one that you trust as "
            "hf:owner/repo/file.gguf"
        )
    return tuple(in_repo or found)


def _hub_sources(name: str, match: re.Match[str], at: Places) -> tuple[Source, ...]:
    repo, file, revision = match["repo"], match["file"], match["revision"]
    if ".." in f"{file}/{revision}".split("/"):
        raise BadOption(f"{name} leads out of the repository; write it without ..")
    if file is None:
        here = store.repository_here(repo, revision, at) if at.offline else ()
        return here or _repository_files(repo, revision, at)
    if not match["prefix"] or not file.lower().endswith(".gguf"):
        raise BadOption(
            f"{name}: write hf:owner/repo/file.gguf for one file, owner/repo for all of them"
        )
    if store.SHARD.search(file):
        raise BadOption(
            f"{name} is a part of a split GGUF; name a whole one, or join the parts with "
            "llama.cpp's llama-gguf-split --merge and pass the path"
        )
    return (store.located(_hub_file(repo, file, revision), at),)


def _hub_file(repo: str, file: str, revision: str | None) -> Source:
    """One file of a repository; pinned and with its hash where the catalog knows it."""
    for card, known in store.catalog_files():
        if (known.repo, known.name) == (repo, file) and revision in (None, known.revision):
            return store.from_card(card, known)
    return Source(
        name=f"hf:{repo}/{file}",
        quant=store.quant_of(file),
        card=catalog.find(repo),
        repo=repo,
        revision=revision or "main",
        file=file,
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
    raise ModelNotFound(_no_such_file(source, info))


def remote_header(source: Source, *, at: Places | None = None) -> gguf.Header:
    """The GGUF header of a file that need not be here, read by range requests."""
    at = at or places()
    source = store.located(source, at)
    if source.path is not None:
        return gguf.read_header(source.path)
    with _explained(source, at):
        reader = _RangeReader(_head(source, at))
        return gguf.parse_header(reader, source=f"hf:{source.repo}/{source.file}")


def _repository_files(repo: str, revision: str | None, at: Places) -> tuple[Source, ...]:
    """The GGUF files of a repository, asked of the Hub, largest first."""
    asked = Source(
        name=repo, card=catalog.find(repo), repo=repo, revision=revision or "main", file=""
    )
    siblings = _model_info(asked, at).siblings or []
    ggufs = [sibling for sibling in siblings if sibling.rfilename.lower().endswith(".gguf")]
    found = [
        replace(
            asked,
            quant=store.quant_of(sibling.rfilename),
            file=sibling.rfilename,
            n_bytes=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
        )
        for sibling in ggufs
        if not store.SHARD.search(sibling.rfilename)
    ]
    if not found:
        why = "only split ones" if ggufs else "none"
        raise ModelNotFound(
            f"{repo} has no GGUF in one file ({why} among its {len(siblings)} files); look for "
            f"another at {at.endpoint}/models?library=gguf&search={repo.rpartition('/')[2]}"
        )
    return store.best_first(store.located(source, at) for source in found)


def _model_info(source: Source, at: Places) -> ModelInfo:
    if source.repo is None:
        raise BadOption(f"{source.label} is a file on this machine; the Hub knows nothing of it")
    repo = source.repo
    with _explained(source, at):
        from huggingface_hub import HfApi, constants

        api = HfApi(endpoint=at.endpoint, library_name="gguf_embed", library_version=__version__)
        return _patiently(
            lambda: api.model_info(
                repo,
                revision=source.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remote:
    """Where the bytes of one commit's file are, and what they must be."""

    commit: str
    etag: str  # names the blob
    n_bytes: int
    sha256: str | None
    url: str
    headers: Mapping[str, str]


def _head(source: Source, at: Places) -> _Remote:
    """Ask for a file's commit, hash, size and the address to download it from."""
    from huggingface_hub import constants, file_download, hf_hub_url, utils

    assert source.repo is not None, "a file that is only here is never asked for"
    url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=at.endpoint)
    # Their types name a bare `dict`, which strict checking cannot see through.
    build_headers = cast(Callable[..., dict[str, str]], utils.build_hf_headers)  # pyright: ignore[reportUnknownMemberType]
    metadata = cast(Callable[..., Any], file_download.get_hf_file_metadata)  # pyright: ignore[reportUnknownMemberType]
    headers = build_headers(library_name="gguf_embed", library_version=__version__)
    meta = _patiently(
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
    return _Remote(
        commit=commit,
        etag=etag,
        n_bytes=n_bytes,
        sha256=source.sha256 or (etag if store.SHA256.fullmatch(etag) else None),
        url=location,
        headers={**headers, "Accept-Encoding": "identity"},
    )


@contextmanager
def _get(remote: _Remote, first: int, last: int | None) -> Generator[Any, None, None]:
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
            raise _Interrupted(f"asked for {headers.get('Range')}, the server gave {given!r}")
        yield response


class _RangeReader:
    """Bytes of a remote file by position, one request each."""

    def __init__(self, remote: _Remote) -> None:
        self._remote = remote
        self.size: int | None = remote.n_bytes

    def read(self, offset: int, size: int, /) -> bytes:
        """The bytes [offset, offset + size); fewer only where the file ends."""
        size = min(size, self._remote.n_bytes - offset)
        return _patiently(lambda: self._read(offset, size)) if size > 0 else b""

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray()
        with _get(self._remote, offset, offset + size - 1) as response:
            # A server that ignores ranges begins at 0; what is before is passed over.
            skip = 0 if response.status_code == 206 else offset
            for chunk in response.iter_raw():
                data += chunk
                if len(data) >= skip + size:
                    return bytes(data[skip : skip + size])
        raise _Interrupted(f"{len(data)} bytes came, {skip + size} were asked for")


# --------------------------------------------------------------------------------- fetching


def fetch(
    source: Source,
    *,
    progress: Progress | None = None,
    accept_licence: bool = False,
    at: Places | None = None,
) -> Path:
    """The verified file on this machine; downloaded into the Hugging Face cache if need be.

    A download that was killed goes on where it stopped. Size and sha256 are checked before the
    file gets its name, so a wrong one is never in place. Several fetches of one file wait for the
    first. A file under a licence that forbids commercial use is fetched only with
    `accept_licence`. Raises BadInput for such a one, ModelNotFound, FetchFailed, DoesNotFit (the
    disk) or OutputFailed.
    """
    at = at or places()
    here = store.located(source, at)
    if here.path is not None:
        return here.path
    if not accept_licence and not at.offline:
        check_licence(source)
    with _explained(source, at):
        remote = _head(source, at)
        _check_promised(source, remote)
        # Now its hash is known, another tool's copy may turn out to be it.
        pinned = replace(
            source, revision=remote.commit, n_bytes=remote.n_bytes, sha256=remote.sha256
        )
        here = store.located(pinned, at)
        if here.path is not None and here.where != "cache":
            return here.path
        return _to_cache(source, remote, at, progress)


def check_licence(source: Source) -> None:
    """Raise BadInput for a model that may not be used commercially, with how to agree to that."""
    card = source.card
    if card is None or card.commercial:
        return
    quant = f" --quant {source.quant}" if source.quant else ""
    raise BadInput(
        f"{card.id}: licence {card.licence}, no commercial use ({card.licence_url or 'no address'})"
        f"; if you agree to it: gguf-embed pull {card.id}{quant} --accept-licence"
    )


def _check_promised(source: Source, remote: _Remote) -> None:
    """The Hub must offer what is pinned, or gigabytes would come only to be thrown away."""
    if source.sha256 is None:
        return
    offered = remote.etag if store.SHA256.fullmatch(remote.etag) else source.sha256
    if offered != source.sha256 or source.n_bytes not in (None, remote.n_bytes):
        raise FetchFailed(
            f"{source.repo}/{source.file} at {remote.commit[:12]} is not the file that is known: "
            f"it has sha256 {offered} and {remote.n_bytes} bytes, known are {source.sha256} and "
            f"{source.n_bytes} bytes; nothing was fetched. If you trust the other one, name it: "
            f"hf:{source.repo}/{source.file}@{remote.commit}"
        )


def _to_cache(source: Source, remote: _Remote, at: Places, progress: Progress | None) -> Path:
    from huggingface_hub.utils import WeakFileLock

    assert source.repo is not None
    folder = store.cache_folder(at.cache, source.repo)
    blob = folder / "blobs" / remote.etag
    pointer = folder / "snapshots" / remote.commit / source.file
    # The lock of the Hub's own client, so that it and we wait for each other too.
    lock = at.cache / ".locks" / folder.name / f"{remote.etag}.lock"
    with store.writing(at.cache, remote.n_bytes):
        for path in (blob, pointer, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        for path in (pointer, blob):
            if path.is_file() and path.stat().st_size != remote.n_bytes:
                path.unlink()  # a disk was damaged, or a tool: never used, never left
        if not pointer.is_file() and not blob.is_file():
            _download(source, remote, at, blob, progress)
        with store.writing(at.cache, remote.n_bytes):
            if not pointer.is_file():
                _point(pointer, blob)
            _write_ref(folder, source.revision, remote.commit)
    return pointer


def _point(pointer: Path, blob: Path) -> None:
    """Make the snapshot's entry: a relative link, or the file itself where links cannot be."""
    from huggingface_hub import constants

    pointer.unlink(missing_ok=True)  # a link whose blob is gone
    if not getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):  # newer than 1.0
        with suppress(OSError):
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            return
    blob.replace(pointer)


def _write_ref(folder: Path, revision: str, commit: str) -> None:
    """Note which commit a branch or tag is, for look-ups without network."""
    if revision == commit:
        return
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    fresh.write_text(commit, encoding="utf-8")
    fresh.replace(ref)


def _download(
    source: Source, remote: _Remote, at: Places, blob: Path, progress: Progress | None
) -> None:
    """Bring one blob, going on from what an earlier run left; the caller holds its lock."""
    # The hash is in the name, so a file that changed on the Hub never goes on from old bytes.
    # (If-Range cannot say it: storage behind the Hub has ETags of its own.) The name is ours and
    # stable, because huggingface_hub's own partial files do not outlive their process.
    path = blob.with_name(f"{blob.name}.gguf_embed.incomplete")
    with _Partial(path, remote.n_bytes) as partial:
        resumed = partial.n_bytes > 0
        _transfer(partial, source, remote, at, progress)
        wrong = _mismatch(partial, source, remote)
        if wrong and resumed:  # the old bytes may be to blame: a disk that lost power
            _log.warning("%s: what was resumed is damaged; fetched anew", source.label)
            partial.restart()
            _transfer(partial, source, remote, at, progress)
            wrong = _mismatch(partial, source, remote)
        if not wrong:
            partial.sync()
    if wrong:
        path.unlink()
        raise wrong
    with store.writing(blob.parent, remote.n_bytes):
        path.replace(blob)


class _Partial:
    """A file under way and the hash of what it holds."""

    def __init__(self, path: Path, n_bytes_in_all: int) -> None:
        self.path = path
        self.n_bytes = 0
        self._n_bytes_in_all = n_bytes_in_all

    def __enter__(self) -> _Partial:
        with self._writing():
            # Unbuffered: a kill loses nothing that came.
            self._file: IO[bytes] = self.path.open("a+b", buffering=0)
        self._digest = hashlib.sha256()
        self._file.seek(0)
        while chunk := self._file.read(2**20):
            self._digest.update(chunk)
            self.n_bytes += len(chunk)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _writing(self) -> AbstractContextManager[None]:
        return store.writing(self.path.parent, self._n_bytes_in_all)

    def write(self, chunk: bytes) -> None:
        """Append; what a disk took before it was full stays, and is counted."""
        rest = memoryview(chunk)
        while rest:
            with self._writing():
                written = self._file.write(rest)
            self._digest.update(rest[:written])
            self.n_bytes += written
            rest = rest[written:]

    def restart(self) -> None:
        """Throw away what there is."""
        with self._writing():
            self._file.truncate(0)
        self._digest = hashlib.sha256()
        self.n_bytes = 0

    def sha256(self) -> str:
        """The hash of what there is."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Wait until the disk has it: the name that it gets next says that it is whole."""
        with self._writing():
            os.fsync(self._file.fileno())


def _transfer(
    partial: _Partial, source: Source, remote: _Remote, at: Places, progress: Progress | None
) -> None:
    """Fill the partial file up to its size; a cut connection is taken up again."""
    store.check_free(remote.n_bytes - partial.n_bytes, partial.path.parent)
    if partial.n_bytes:
        _log.info("%s: going on at byte %d", source.label, partial.n_bytes)
    if progress:
        progress(partial.n_bytes, remote.n_bytes)
    patience, furthest = _Patience(met=True), partial.n_bytes
    while partial.n_bytes < remote.n_bytes:
        try:
            _append(partial, remote, progress)
            break
        except Exception as caught:
            error = caught  # what is raised below is not to count as caused by it
        # Only new ground is success: a server that ignores ranges begins at 0 every time.
        if partial.n_bytes > furthest:
            patience, furthest = _Patience(met=True), partial.n_bytes
        patience.pause(error)
        remote = _address_again(source, remote, at)


def _append(partial: _Partial, remote: _Remote, progress: Progress | None) -> None:
    with _get(remote, partial.n_bytes, None) as response:
        if partial.n_bytes and response.status_code != 206:
            partial.restart()  # ranges are ignored: the whole file comes
        for chunk in response.iter_raw():
            partial.write(chunk)
            if progress:
                progress(partial.n_bytes, remote.n_bytes)
            if partial.n_bytes > remote.n_bytes:
                return  # a wrong file, whatever follows
    if partial.n_bytes < remote.n_bytes:
        raise _Interrupted(f"the server ended at byte {partial.n_bytes} of {remote.n_bytes}")


def _address_again(source: Source, remote: _Remote, at: Places) -> _Remote:
    """The address anew, since a signed one expires, and at the commit that was begun."""
    try:
        return _head(replace(source, revision=remote.commit), at)
    except Exception as error:
        if _passes(error):
            return remote  # the next attempt will meet it too, and counts
        raise


def _mismatch(partial: _Partial, source: Source, remote: _Remote) -> FetchFailed | None:
    """What is wrong with a complete file; None when it is the one that was asked for."""
    sha256 = partial.sha256()
    if partial.n_bytes == remote.n_bytes and remote.sha256 in (None, sha256):
        if remote.sha256 is None:
            _log.warning("%s: the Hub gives no sha256; only the size was checked", source.label)
        return None
    return FetchFailed(
        f"{source.repo}/{source.file}: what came has {partial.n_bytes} bytes and sha256 {sha256}, "
        f"expected {remote.n_bytes} and {remote.sha256}; it was deleted. Try again; if it stays "
        "so, a proxy or mirror changes the file: check HF_ENDPOINT"
    )


# --------------------------------------------------------------------------------- patience

_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waits between failures in a row; the next is an error
_LONGEST_WAIT_S = 300.0  # that a Retry-After may ask for
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class _Interrupted(Exception):
    """A transfer that ended early, or answered another range than was asked for."""


class _Patience:
    """Waits between attempts, longer each time, and gives up by raising the error itself."""

    def __init__(self, *, met: bool = False) -> None:
        self._waits = iter(_BACKOFF_S)
        self._met = met

    def pause(self, error: Exception) -> None:
        """Sleep; or raise `error`, where waiting is no use or was done enough."""
        wait_s = next(self._waits, None)
        if wait_s is None or not _passes(error, met=self._met):
            raise error
        wait_s = max(wait_s, _retry_after_s(error))
        if wait_s > _LONGEST_WAIT_S:
            raise error
        _log.warning("%s; again in %.0f s", _one_line(error), wait_s)
        time.sleep(wait_s)


def _passes(error: Exception, *, met: bool = True) -> bool:
    """Whether trying again can help; `met`: the server has answered before."""
    kinds = _kinds(error)
    if kinds & {"ConnectError", "ConnectTimeout"}:
        return met  # a host that never answered is a wrong name, or there is no network
    if kinds & {"_Interrupted", "TimeoutException", "NetworkError", "RemoteProtocolError"}:
        return True
    return _status(error) in _PASSING_STATUS


def _patiently(call: Callable[[], _T]) -> _T:
    patience = _Patience()
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
        "the name {host} cannot be resolved ({detail}){via_proxy}; is there a network, and is its "
        "DNS right?" + _CARRY,
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
        "_Interrupted",
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
    ("HTTPError", FetchFailed, "{host} could not be asked for {repo}: {detail}"),
)


@contextmanager
def _explained(source: Source, at: Places) -> Generator[None, None, None]:
    """The one gate to the network: shut when offline; errors leave it as ours."""
    if at.offline:
        raise ModelNotFound(_absent(source, at))
    try:
        yield
    except GgufEmbedError:
        raise
    except Exception as error:
        kinds, status = _kinds(error), _status(error) or 0
        kinds |= {str(status), f"{status // 100}xx"}
        for kind, ours, template in _EXPLAINED:
            if kind in kinds:
                raise ours(template.format_map(_Facts(error, source, at))) from error
        raise


class _Facts(dict[str, object]):
    """What the messages mention; `str.format_map` asks only for what one does."""

    def __init__(self, error: Exception, source: Source, at: Places) -> None:
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
        self._source, self._at = source, at

    def __missing__(self, key: str) -> object:
        if key == "near":
            near = catalog.nearest(self._source.repo or "")
            return f" (known: {', '.join(near)})" if near else ""
        if key == "timeout_s":
            from huggingface_hub import constants

            return constants.HF_HUB_DOWNLOAD_TIMEOUT
        if key == "absent":
            return _absent(self._source, self._at)
        assert key == "no_such_file", key
        info = None
        with suppress(Exception):  # that the others are named is a courtesy
            info = _model_info(self._source, self._at)
        return _no_such_file(self._source, info)


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
    proxies = getproxies()
    proxy = urlsplit(proxies.get(urlsplit(at.endpoint).scheme) or proxies.get("all") or "")
    shown = proxy._replace(netloc=proxy.netloc.rpartition("@")[2]).geturl()  # no password
    return f" (by way of the proxy {shown})" if shown else ""


def _no_such_file(source: Source, info: ModelInfo | None) -> str:
    said = f"{source.repo} has no file {source.file} at {source.revision}"
    files = [sibling.rfilename for sibling in (info.siblings if info else None) or []]
    ggufs = [file for file in files if file.lower().endswith(".gguf")]
    return f"{said}; its GGUF files: {', '.join(ggufs[:12]) or 'none'}" if info else said


def _absent(source: Source, at: Places) -> str:
    return (
        f"offline mode is on, and {source.label_with_size} is not on this machine. "
        f"{_what_is_here(at)} To bring it, {_carry(source)}"
    )


def _carry(source: Source) -> str:
    """How a file comes to a machine without network."""
    name = source.name if source.card or not source.file else f"hf:{source.repo}/{source.file}"
    quant = f" --quant {source.quant}" if source.quant and source.card else ""
    return (
        f"on a connected machine: gguf-embed bundle {name}{quant} -o DIR; carry DIR here and run: "
        "gguf-embed unbundle DIR"
    )


def _what_is_here(at: Places) -> str:
    labels = list(dict.fromkeys(model.label for model in store.local_models(at)))
    more = f" and {len(labels) - 8} more (gguf-embed models)" if len(labels) > 8 else ""
    return f"Here are: {', '.join(labels[:8])}{more}."
