"""A file of the Hub comes to this machine: resumed where it stopped, verified, then in place.

    path = fetch(source)   # what is here, else from the Hub

Downloads go into the Hugging Face cache in its own layout, where every other tool finds them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from gguf_embed.errors import BadInput, FetchFailed, OutputFailed
from gguf_embed.store import hub
from gguf_embed.store.failures import Interrupted, Patience, passes
from gguf_embed.store.hub import Remote
from gguf_embed.store.local import SHA256, UNDER_WAY, Places, Source, cache_folder, located, mib
from gguf_embed.store.safe_names import inside
from gguf_embed.system import files
from gguf_embed.system.files import check_free, printable, write_whole

_log = logging.getLogger(__name__)

OnDownload = Callable[[int, int], None]  # (bytes here, bytes in all)
ELSEWHERE = "set HF_HOME (Hugging Face cache) or GGUF_EMBED_HOME (our store) to another folder"


def fetch(
    source: Source,
    *,
    progress: OnDownload | None = None,
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
    at = at or hub.places()
    here = located(source, at)
    if here.path is not None:
        return here.path
    if not accept_licence and not at.offline:
        check_licence(source)
    with hub.gate(source, at):
        remote = hub.head(source, at)
        _check_promised(source, remote)
        # Now its hash is known, another tool's copy may turn out to be it.
        pinned = replace(
            source, revision=remote.commit, n_bytes=remote.n_bytes, sha256=remote.sha256
        )
        here = located(pinned, at)
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


def _check_promised(source: Source, remote: Remote) -> None:
    """The Hub must offer what is pinned, or gigabytes would come only to be thrown away."""
    if source.sha256 is None:
        return
    offered = remote.etag if SHA256.fullmatch(remote.etag) else source.sha256
    if offered != source.sha256 or source.n_bytes not in (None, remote.n_bytes):
        raise FetchFailed(
            f"{source.repo}/{source.file} at {remote.commit[:12]} is not the file that is known: "
            f"it has sha256 {offered} and {remote.n_bytes} bytes, known are {source.sha256} and "
            f"{source.n_bytes} bytes; nothing was fetched. If you trust the other one, name it: "
            f"hf:{source.repo}/{source.file}@{remote.commit}"
        )


def _to_cache(source: Source, remote: Remote, at: Places, progress: OnDownload | None) -> Path:
    from huggingface_hub.utils import WeakFileLock

    assert source.repo is not None
    folder = cache_folder(at.cache, source.repo)
    blob = folder / "blobs" / remote.etag
    pointer = folder / "snapshots" / remote.commit / source.file
    # The lock of the Hub's own client, so that it and we wait for each other too.
    lock = at.cache / ".locks" / folder.name / f"{remote.etag}.lock"
    _check_places(folder, pointer, blob, _ref(folder, source.revision))
    with _writing(at.cache, remote.n_bytes):
        for path in (blob, pointer, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        for path in (pointer, blob):
            if path.is_file() and path.stat().st_size != remote.n_bytes:
                path.unlink()  # a disk was damaged, or a tool: never used, never left
        if not pointer.is_file() and not blob.is_file():
            _download(source, remote, at, blob, progress)
        with _writing(at.cache, remote.n_bytes):
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
    if revision != commit:
        write_whole(_ref(folder, revision), commit, make_folder=True)


def _ref(folder: Path, revision: str) -> Path:
    return folder / "refs" / revision


def _check_places(folder: Path, *targets: Path) -> None:
    """Refuse to write or remove what lies outside the model's own folder, be it by a link."""
    for path in targets:
        if not inside(folder, path):
            raise OutputFailed(
                f"{printable(path)} leads out of {printable(folder)}, nothing was written; remove "
                "the link in that folder that leads elsewhere"
            )


def _download(
    source: Source, remote: Remote, at: Places, blob: Path, progress: OnDownload | None
) -> None:
    """Bring one blob, going on from what an earlier run left; the caller holds its lock."""
    # The hash is in the name, so a file that changed on the Hub never goes on from old bytes.
    # (If-Range cannot say it: storage behind the Hub has ETags of its own.) The name is ours and
    # stable, because huggingface_hub's own partial files do not outlive their process.
    path = blob.with_name(f"{blob.name}{UNDER_WAY}")
    with Partial(path, remote.n_bytes) as partial:
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
    with _writing(blob.parent, remote.n_bytes):
        path.replace(blob)


class Partial:
    """A file under way and the hash of what it holds."""

    def __init__(self, path: Path, n_bytes_in_all: int) -> None:
        self.path = path
        self.n_bytes = 0
        self._n_bytes_in_all = n_bytes_in_all

    def __enter__(self) -> Partial:
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
        return _writing(self.path.parent, self._n_bytes_in_all)

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
    partial: Partial, source: Source, remote: Remote, at: Places, progress: OnDownload | None
) -> None:
    """Fill the partial file up to its size; a cut connection is taken up again."""
    rest = remote.n_bytes - partial.n_bytes
    check_free(rest, partial.path.parent, source.label, f"make room, or {ELSEWHERE}")
    if partial.n_bytes:
        _log.info("%s: going on at byte %d", source.label, partial.n_bytes)
    if progress:
        progress(partial.n_bytes, remote.n_bytes)
    patience, furthest = Patience(met=True), partial.n_bytes
    while partial.n_bytes < remote.n_bytes:
        try:
            _append(partial, remote, progress)
            break
        except Exception as caught:
            error = caught  # what is raised below is not to count as caused by it
        # Only new ground is success: a server that ignores ranges begins at 0 every time.
        if partial.n_bytes > furthest:
            patience, furthest = Patience(met=True), partial.n_bytes
        patience.pause(error)
        remote = _address_again(source, remote, at)


def _append(partial: Partial, remote: Remote, progress: OnDownload | None) -> None:
    with hub.get(remote, partial.n_bytes, None) as response:
        if partial.n_bytes and response.status_code != 206:
            partial.restart()  # ranges are ignored: the whole file comes
        for chunk in response.iter_raw():
            partial.write(chunk)
            if progress:
                progress(partial.n_bytes, remote.n_bytes)
            if partial.n_bytes > remote.n_bytes:
                return  # a wrong file, whatever follows
    if partial.n_bytes < remote.n_bytes:
        raise Interrupted(f"the server ended at byte {partial.n_bytes} of {remote.n_bytes}")


def _address_again(source: Source, remote: Remote, at: Places) -> Remote:
    """The address anew, since a signed one expires, and at the commit that was begun."""
    try:
        return hub.head(replace(source, revision=remote.commit), at)
    except Exception as error:
        if passes(error):
            return remote  # the next attempt will meet it too, and counts
        raise


def _mismatch(partial: Partial, source: Source, remote: Remote) -> FetchFailed | None:
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


@contextmanager
def _writing(folder: Path, n_bytes: int) -> Generator[None]:
    """Turn the system's errors into OutputFailed; `n_bytes` is the size of the whole file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            why = error.strerror or error
            raise OutputFailed(
                f"{printable(folder)} cannot be written ({why}); {ELSEWHERE}"
            ) from error
        free = mib(files.free_bytes(folder) or 0)
        raise OutputFailed(
            f"the disk of {printable(folder)} is full: {free} free, the file has {mib(n_bytes)}; "
            f"what a download brought is kept: make room and run it again, or {ELSEWHERE}"
        ) from error
