"""GGUF files on this machine: which there are, and where the one that is wanted lies.

Four places, in the order in which they are asked: the package (the built-in model), our own store
(what `unbundle` carried here), the Hugging Face cache and Ollama's blobs. Nothing here opens a
model file or the network; the two caches belong to others and are only read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard, ModelFile
from gguf_embed.errors import BadOption, FetchFailed
from gguf_embed.gguf import quants
from gguf_embed.store.safe_names import RECORD, fault, is_safe
from gguf_embed.system.files import MIB, WholeFile, check_free, write_whole

_log = logging.getLogger(__name__)

Where = Literal["file", "package", "store", "cache", "ollama"]

SHA256 = re.compile(r"[0-9a-f]{64}")
UNDER_WAY = ".gguf_embed.incomplete"  # the end of the name of what a download has brought so far
SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
IMATRIX = re.compile(r"imatrix", re.IGNORECASE)  # in the name of a GGUF that is no model
_QUANT_OF_FILE = re.compile(rf"(?:^|[-_.])({quants.PATTERN})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One GGUF file: what it is, where it comes from and, with `path`, where it lies here."""

    name: str  # for people: a card's id, a repository, an Ollama tag, a path
    quant: str | None = None
    card: ModelCard | None = None
    repo: str | None = None  # None: it is not from the Hub
    revision: str = "main"  # a commit, where it is pinned
    file: str  # path inside the repository; else the name of the file
    n_bytes: int | None = None
    sha256: str | None = None
    path: Path | None = None
    where: Where | None = None

    @property
    def label(self) -> str:
        """The name with the quantization: "qwen3-embedding-8b Q4_K_M"."""
        return f"{self.name} {self.quant}" if self.quant else self.name

    @property
    def label_with_size(self) -> str:
        """The same with the size: "qwen3-embedding-8b Q4_K_M (4,460 MiB)"."""
        return f"{self.label} ({mib(self.n_bytes)})" if self.n_bytes else self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where models lie on this machine and where new ones come from."""

    endpoint: str  # "https://huggingface.co", or a mirror
    cache: Path  # the Hugging Face cache
    store: Path  # ours: <sha256>/<file>.gguf with an origin.json beside it
    ollama: tuple[Path, ...]  # models directories: blobs/ and manifests/
    offline: bool


# -------------------------------------------------------------------------- what is here


def local_models(places: Places) -> tuple[Source, ...]:
    """Every GGUF that would be used without a download; whether it embeds, its header knows."""
    found = [
        from_card(card, file) for card in catalog.cards() for file in card.files if file.builtin
    ]
    found.extend(_in_store(places.store))
    found.extend(_in_cache(places.cache))
    for root in places.ollama:
        found.extend(_in_ollama(root))
    return tuple(found)


def repository_here(repo: str, revision: str | None, places: Places) -> tuple[Source, ...]:
    """Files of one repository that are here, best first.

    Without a revision any will do, that of `main` before others.
    """
    if not is_safe("repository", repo) or (revision and not is_safe("revision", revision)):
        return ()
    commit = _commit_of(cache_folder(places.cache, repo), revision) if revision else None
    by_file: dict[str, Source] = {}
    for model in (*_in_store(places.store), *_in_cache(places.cache)):
        if (model.repo or "").lower() == repo.lower() and commit in (None, model.revision):
            by_file.setdefault(model.file, model)
    return best_first(by_file.values())


def located(source: Source, places: Places) -> Source:
    """The source with its place on this machine; as it was, where it is not here."""
    if source.path is not None or not _is_safe(source):
        return source
    for where, path in _candidates(source, places):
        if not os.access(path, os.R_OK) or not path.is_file():
            continue
        size = path.stat().st_size
        # Only a known hash says that the size is that of these very bytes.
        if source.sha256 and source.n_bytes not in (None, size):
            _log.warning(
                "%s has %d bytes, not %d, and is not used", path, size, source.n_bytes or 0
            )
            continue
        return replace(source, n_bytes=size, path=path, where=where)
    return source


def _is_safe(source: Source) -> bool:
    in_hub = source.repo is None or is_safe("repository", source.repo)
    return in_hub and is_safe("revision", source.revision) and is_safe("file", source.file)


def _candidates(source: Source, places: Places) -> Iterator[tuple[Where, Path]]:
    same = (source.repo, source.revision, source.file)
    for stored in _in_store(places.store):
        by_name = source.sha256 is None and (stored.repo, stored.revision, stored.file) == same
        if stored.path and (by_name or source.sha256 == stored.sha256):
            yield "store", stored.path
    if source.repo is not None:
        folder = cache_folder(places.cache, source.repo)
        pointer = folder / "snapshots" / _commit_of(folder, source.revision) / source.file
        if source.sha256 is None or _blob_sha256(pointer) in (None, source.sha256):
            yield "cache", pointer
        for other in sorted(folder.glob("snapshots/*")):  # the same bytes under another commit
            if source.sha256 and _blob_sha256(other / source.file) == source.sha256:
                yield "cache", other / source.file
    if source.sha256 is not None:
        for root in places.ollama:
            yield "ollama", root / "blobs" / f"sha256-{source.sha256}"


# ------------------------------------------------------------------------------ our store

ORIGIN_KEYS = ("name", "quant", "repo", "revision", "file", "n_bytes", "sha256")


def install(file: Path, source: Source, places: Places) -> Source:
    """Copy a carried file into our store as `source`, whose sha256 it must have.

    Raises FetchFailed when it has another, and then nothing is stored; DoesNotFit or OutputFailed
    when the disk will not take it.
    """
    if source.sha256 is None:
        raise BadOption(f"{source.label}: a file is stored under its sha256, and none was given")
    if reason := fault("file", source.file):
        raise BadOption(f"{source.file!r} cannot name a stored model, it {reason}")
    home, n_bytes = places.store / source.sha256, file.stat().st_size
    path = home / Path(source.file).name
    stored = replace(source, n_bytes=n_bytes, path=path, where="store")
    if path.is_file() and path.stat().st_size == n_bytes:
        return stored
    check_free(n_bytes, home, source.label, "make room, or set GGUF_EMBED_HOME to another disk")
    origin = {key: getattr(stored, key) for key in ORIGIN_KEYS}
    write_whole(home / RECORD, json.dumps(origin, indent=1), make_folder=True)
    with file.open("rb") as carried, WholeFile(path) as whole:
        digest = hashlib.sha256()
        while chunk := carried.read(MIB):
            digest.update(chunk)
            with whole.writing():
                whole.file.write(chunk)
        if digest.hexdigest() != source.sha256:
            (home / RECORD).unlink()
            raise FetchFailed(
                f"{file} is not {source.label}: its sha256 is {digest.hexdigest()}, expected "
                f"{source.sha256}; it was not stored, carry it here again"
            )
        whole.commit()
    return stored


def _in_store(store: Path) -> Iterator[Source]:
    for origin in sorted(store.glob(f"*/{RECORD}")):
        try:
            said = cast("dict[str, Any]", json.loads(origin.read_text(encoding="utf-8")))
            source = Source(**{key: said[key] for key in ORIGIN_KEYS})
            if reason := fault("file", source.file):
                raise ValueError(f"the file {source.file!r} {reason}")
            path = origin.parent / Path(source.file).name
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s is damaged, the model beside it is not used: %r", origin, error)
            continue
        if path.is_file():
            yield replace(source, card=card_of(source), path=path, where="store")


# ------------------------------------------------------------------- the Hugging Face cache
# models--owner--repo/{blobs/<etag>, snapshots/<commit>/<file> -> blob, refs/<branch or tag>}
# https://huggingface.co/docs/huggingface_hub/guides/manage-cache


def cache_folder(cache: Path, repo: str) -> Path:
    """Where the Hugging Face cache keeps a repository."""
    return cache / "--".join(("models", *repo.split("/")))


def _commit_of(folder: Path, revision: str) -> str:
    ref = folder / "refs" / revision
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision


def _blob_sha256(pointer: Path) -> str | None:
    """The hash in the name of the blob behind a snapshot's link; None where there is no link."""
    # One step only: the blob can itself be a link, into a store that Xet hashes name.
    name = pointer.readlink().name if pointer.is_symlink() else ""
    return name if SHA256.fullmatch(name) else None


def _in_cache(cache: Path) -> Iterator[Source]:
    """The GGUF files of every snapshot; what several snapshots share comes once."""
    for folder in sorted(cache.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        main = _commit_of(folder, "main")
        seen: set[tuple[str, str]] = set()
        for snapshot in sorted(folder.glob("snapshots/*"), key=lambda path: path.name != main):
            for path in sorted(snapshot.rglob("*.gguf")):
                file, sha256 = path.relative_to(snapshot).as_posix(), _blob_sha256(path)
                bytes_of = (file, sha256 or snapshot.name)
                other = SHARD.search(file) or IMATRIX.search(path.name)
                if bytes_of in seen or other or not path.is_file():
                    continue
                seen.add(bytes_of)
                source = Source(
                    name=repo,
                    quant=quant_of(file),
                    repo=repo,
                    revision=snapshot.name,
                    file=file,
                    n_bytes=path.stat().st_size,
                    sha256=sha256,
                    path=path,
                    where="cache",
                )
                card = card_of(source)
                yield replace(source, card=card, name=card.id if card else repo)


# --------------------------------------------------------------------------------- Ollama


def _in_ollama(root: Path) -> Iterator[Source]:
    """The models of Ollama's manifests: manifests/<host>/<owner>/<model>/<tag>, JSON."""
    manifests = root / "manifests"
    for manifest in sorted(manifests.glob("*/*/*/*")):
        if not os.access(manifest, os.R_OK) or not manifest.is_file():
            continue
        try:
            digest = next(
                str(layer["digest"])
                for layer in json.loads(manifest.read_text(encoding="utf-8"))["layers"]
                if layer["mediaType"] == "application/vnd.ollama.image.model"
            )
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            _log.warning("%s names no model, it is not used: %r", manifest, error)
            continue
        sha256 = digest.removeprefix("sha256:")
        blob = root / "blobs" / f"sha256-{sha256}"
        if not os.access(blob, os.R_OK):
            continue
        host, owner, model, tag = manifest.relative_to(manifests).parts
        owner = "" if (host, owner) == ("registry.ollama.ai", "library") else f"{owner}/"
        host = "" if host == "registry.ollama.ai" else f"{host}/"
        source = Source(
            name=f"{host}{owner}{model}:{tag}",
            file=blob.name,
            n_bytes=blob.stat().st_size,
            sha256=sha256,
            path=blob,
            where="ollama",
        )
        known = (file.quant for _, file in catalog_files() if file.sha256 == sha256)
        yield replace(source, card=card_of(source), quant=next(known, None))


# ------------------------------------------------------------------- files and the catalog


def from_card(card: ModelCard, file: ModelFile) -> Source:
    """A file of the catalog; the built-in one has its path already."""
    return Source(
        name=card.id,
        quant=file.quant,
        card=card,
        repo=file.repo or None,
        revision=file.revision,
        file=file.name,
        n_bytes=file.n_bytes,
        sha256=file.sha256,
        path=catalog.builtin_path() if file.builtin else None,
        where="package" if file.builtin else None,
    )


def catalog_files() -> Iterator[tuple[ModelCard, ModelFile]]:
    """Every file that the catalog knows, with its model."""
    return ((card, file) for card in catalog.cards() for file in card.files)


def card_of(source: Source) -> ModelCard | None:
    """The model by the hash of the file, else by its repository or name."""
    for card, file in catalog_files():
        if file.sha256 is not None and file.sha256 == source.sha256:
            return card
    return catalog.find(source.repo or source.name)


def best_first(found: Any) -> tuple[Source, ...]:
    """Larger files of one model keep more of it."""
    return tuple(sorted(found, key=lambda source: (-(source.n_bytes or 0), source.file)))


def quant_of(file: str) -> str | None:
    """The quantization that the end of a file name tells, as llama.cpp spells it."""
    match = _QUANT_OF_FILE.search(file)
    return quants.parse(match[1]) if match else None


# ---------------------------------------------------------------------------------- disks


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mib(n_bytes: int) -> str:
    """Bytes for people."""
    return f"{n_bytes / 2**20:,.0f} MiB"
