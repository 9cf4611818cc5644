"""The documents of a folder: which files there are, without those that nobody wants read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from gguf_embed.errors import BadInput
from gguf_embed.io.documents import ENDINGS
from gguf_embed.io.globs import IgnoreRule, is_ignored, matches, parse_ignore
from gguf_embed.io.sources import readable
from gguf_embed.system.files import printable

Levels: TypeAlias = Sequence[tuple[str, Sequence[IgnoreRule]]]  # as of `is_ignored`


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which files of a folder are documents."""

    include: tuple[re.Pattern[str], ...] = ()  # files with other endings, too
    exclude: tuple[re.Pattern[str], ...] = ()
    gitignore: bool = True
    skip: frozenset[Path] = frozenset()  # folders, such as that of the index itself


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What changes when a file does, nearly always: asked for without reading it."""

    n_bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A document of a folder."""

    name: str  # relative to the folder, with slashes; "" where the folder is itself a file
    path: Path
    stamp: FileStamp


@dataclass(slots=True, kw_only=True)
class Listing:
    """What a folder holds."""

    files: list[Listed] = field(default_factory=list[Listed])
    passed_over: list[str] = field(default_factory=list[str])  # ending of each other file
    unreadable: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # name, reason
    n_ignored: int = 0  # files and folders that .gitignore files leave out


def list_folder(root: Path, choice: Choice) -> Listing:
    """The documents of a folder and below, sorted; a file is a folder of one.

    Names that begin with a dot, what .gitignore files leave out and links to folders are passed
    over without a word; a folder that cannot be read is named. As for git, the .gitignore files of
    the folders above count, up to the top of the repository; but a root that they leave out is
    wanted, since somebody has named it. Raises BadInput where the root itself is not there.
    """
    listing = Listing()
    with readable(printable(root)):
        status = root.stat()
    if stat.S_ISDIR(status.st_mode):
        above, levels = _rules_above(root) if choice.gitignore else ("", ())
        for name, path in _walk(root, "", above, levels, choice, listing):
            _add(name, path, choice, listing)
    elif stat.S_ISREG(status.st_mode):
        listing.files.append(Listed(name="", path=root, stamp=stamp_of(status)))
    else:
        raise BadInput(f"{printable(root)}: is no file and no folder; name one")
    return listing


def stamp_of(status: os.stat_result) -> FileStamp:
    """The stamp of a file."""
    return FileStamp(
        n_bytes=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns
    )


def _rules_above(root: Path) -> tuple[str, Levels]:
    """("path/from/the/repository/to/root/", rules on the way); nothing outside of a repository."""
    root = root.resolve()
    top = next((each for each in (root, *root.parents) if (each / ".git").exists()), root)
    levels: list[tuple[str, Sequence[IgnoreRule]]] = []
    for folder in reversed(root.parents):
        if folder.is_relative_to(top):
            with suppress(OSError):  # most have none
                text = (folder / ".gitignore").read_text("utf-8", "replace")
                levels.append((_relative(folder, top), parse_ignore(text)))
    return (f"{_relative(root, top)}/" if root != top else ""), levels


def _relative(folder: Path, top: Path) -> str:
    return "" if folder == top else folder.relative_to(top).as_posix()


def _walk(
    folder: Path, name: str, above: str, levels: Levels, choice: Choice, listing: Listing
) -> Iterator[tuple[str, Path]]:
    """(name, path) of each file that is not left out; `above` is the root's place for the rules."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        if choice.gitignore and any(entry.name == ".gitignore" for entry in entries):
            text = (folder / ".gitignore").read_text("utf-8", "replace")
            levels = [*levels, (f"{above}{name}".rstrip("/"), parse_ignore(text))]
    except OSError as error:
        if not name:
            raise BadInput(f"{printable(folder)}: cannot be read: {error.strerror}") from error
        listing.unreadable.append((name, f"cannot be read: {error.strerror or error}"))
        return
    for entry in entries:
        own = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith(".") or matches(own, choice.exclude):
            continue
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_ignored(above + own, is_folder=is_folder, levels=levels):
            listing.n_ignored += 1
            continue
        path = folder / entry.name
        if is_folder and path in choice.skip:
            continue
        if is_folder:
            yield from _walk(path, own, above, levels, choice, listing)
        else:
            yield own, path


def _add(name: str, path: Path, choice: Choice, listing: Listing) -> None:
    ending = path.suffix.lower()
    try:
        status = path.stat()
    except OSError as error:
        listing.unreadable.append((name, f"cannot be read: {error.strerror or error}"))
        return
    if stat.S_ISDIR(status.st_mode):
        return  # a link: what is there is another folder's, or this one again
    wanted = ending in ENDINGS or matches(name, choice.include)
    if not wanted or not stat.S_ISREG(status.st_mode):
        listing.passed_over.append(ending or "no ending")
    else:
        listing.files.append(Listed(name=name, path=path, stamp=stamp_of(status)))
