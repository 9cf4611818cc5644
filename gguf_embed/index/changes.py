"""What an update has to do: files as they are beside files as the index knows them. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from gguf_embed.index.facts import KnownFile
from gguf_embed.io.folder import FileStamp


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFile:
    """A file as it is now."""

    folder: int
    name: str
    path: Path
    stamp: FileStamp
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Each file in one of these; the order is that of the files seen."""

    new: tuple[SeenFile, ...]
    changed: tuple[tuple[KnownFile, SeenFile], ...]
    moved: tuple[tuple[KnownFile, SeenFile], ...]
    touched: tuple[tuple[KnownFile, SeenFile], ...]  # the same bytes with another stamp
    unchanged: tuple[KnownFile, ...]
    deleted: tuple[KnownFile, ...]


def changes_between(known: Sequence[KnownFile], seen: Sequence[SeenFile]) -> Changes:
    """A file that went and one that came with the same bytes and ending have moved."""
    by_place = {(each.folder, each.name): each for each in known}
    places = {(each.folder, each.name) for each in seen}
    gone: defaultdict[tuple[bytes, str], list[KnownFile]] = defaultdict(list)
    for each in reversed(known):
        if (each.folder, each.name) not in places:
            gone[each.digest, PurePath(each.name).suffix].append(each)
    new: list[SeenFile] = []
    changed: list[tuple[KnownFile, SeenFile]] = []
    moved: list[tuple[KnownFile, SeenFile]] = []
    touched: list[tuple[KnownFile, SeenFile]] = []
    unchanged: list[KnownFile] = []
    for each in seen:
        old = by_place.get((each.folder, each.name))
        if old is None:
            same = gone[each.digest, PurePath(each.name).suffix]
            if same:
                moved.append((same.pop(), each))
            else:
                new.append(each)
        elif old.digest != each.digest:
            changed.append((old, each))
        elif old.stamp != each.stamp:
            touched.append((old, each))
        else:
            unchanged.append(old)
    return Changes(
        new=tuple(new),
        changed=tuple(changed),
        moved=tuple(moved),
        touched=tuple(touched),
        unchanged=tuple(unchanged),
        deleted=tuple(each for rest in gone.values() for each in rest),
    )
