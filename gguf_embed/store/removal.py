"""Model files leave this machine: those in our store and in the Hugging Face cache, no others.

    for each in owned(named_here("bge-m3", None, places), places):
        remove(each, places)

The cache belongs to other tools too: a file leaves every snapshot of its repository, with its blob,
and an empty folder leaves with it. Nothing outside the two folders is touched, whatever links say.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gguf_embed.errors import BadOption, OutputFailed
from gguf_embed.store.local import UNDER_WAY, Places, Source, cache_folder
from gguf_embed.store.safe_names import RECORD, inside
from gguf_embed.system.files import printable

_SNAPSHOT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """What a download that was stopped left behind; a fetch goes on from there."""

    repo: str
    path: Path
    n_bytes: int


def unfinished(places: Places) -> tuple[Unfinished, ...]:
    """In the Hugging Face cache, of our own downloads."""
    found: list[Unfinished] = []
    for path in sorted(places.cache.glob(f"models--*--*/blobs/*{UNDER_WAY}")):
        repo = path.parents[1].name.removeprefix("models--").replace("--", "/")
        with suppress(OSError):
            found.append(Unfinished(repo=repo, path=path, n_bytes=path.stat().st_size))
    return tuple(found)


def owned(sources: Iterable[Source], places: Places) -> tuple[Source, ...]:
    """Those that may be removed. Raises BadOption where there is none, with the next step."""
    sources = tuple(sources)
    ours = tuple(source for source in sources if source.where in ("store", "cache"))
    if ours:
        return ours
    source = sources[0]
    why = {
        "package": "is part of gguf-embed; it goes with pip uninstall gguf-embed",
        "ollama": f"is Ollama's: ollama rm {source.name}",
    }.get(str(source.where), "is a file of yours; remove it where it lies")
    raise BadOption(f"{source.label} {why}")


def remove(source: Source, places: Places) -> None:
    """Take a file of `owned` from the disk. Raises OutputFailed."""
    assert source.path is not None, "it is here"
    try:
        if source.where == "store":
            _remove_stored(source.path, places)
        else:
            _remove_cached(source, places)
    except OSError as error:
        raise OutputFailed(
            f"{printable(source.path)}: not removed: {error.strerror or error}; check the "
            "permission of its directory"
        ) from error


def _remove_stored(path: Path, places: Places) -> None:
    folder = path.parent
    _check_inside(places.store, path)
    (folder / RECORD).unlink(missing_ok=True)  # first: without it the rest is no model
    path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _remove_cached(source: Source, places: Places) -> None:
    assert source.repo is not None, "the cache is one of repositories"
    assert source.path is not None, "it is here"
    folder = cache_folder(places.cache, source.repo)
    blob = _blob_of(source.path)
    for path in [*_pointers(folder, source, blob), *([blob] if blob else [])]:
        _check_inside(folder, path)
        path.unlink(missing_ok=True)
    _tidy(folder)


def _blob_of(pointer: Path) -> Path | None:
    """What a snapshot's link leads to, one step; None where the file itself is there."""
    return (pointer.parent / pointer.readlink()).absolute() if pointer.is_symlink() else None


def _pointers(folder: Path, source: Source, blob: Path | None) -> Iterator[Path]:
    """The file's entries in all snapshots that share its bytes."""
    assert source.path is not None, "it is here"
    if blob is None:
        yield source.path
        return
    for path in folder.glob(f"snapshots/*/**/{Path(source.file).name}"):
        if path.is_symlink() and (target := _blob_of(path)) and target.name == blob.name:
            yield path


def _tidy(folder: Path) -> None:
    """Remove snapshots without a file, what names them, and a repository without any."""
    for snapshot in folder.glob("snapshots/*"):
        if _SNAPSHOT.fullmatch(snapshot.name) and not any(
            path.is_symlink() or path.is_file() for path in snapshot.rglob("*")
        ):
            shutil.rmtree(snapshot)
    for ref in [path for path in folder.glob("refs/**/*") if path.is_file()]:
        if not (folder / "snapshots" / ref.read_text("utf-8").strip()).is_dir():
            ref.unlink()
    left = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    if not left:
        shutil.rmtree(folder)


def _check_inside(folder: Path, path: Path) -> None:
    if not inside(folder, path):
        raise OutputFailed(
            f"{printable(path)} leads out of {printable(folder)}, nothing was removed; remove the "
            "link in that folder that leads elsewhere"
        )
