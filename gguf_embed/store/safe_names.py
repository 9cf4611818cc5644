"""Whether a name that came from outside may become a path on this machine.

The one place that decides it, whoever gave the name: a user, a Hub or what stands in its place, a
folder that was carried here. Nothing is written or removed under a name that was not asked here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

Named = Literal["file", "revision", "repository"]

_MOST_BYTES: Final = 1024  # of all of it; file systems allow up to 4,096 for a whole path
_MOST_PART_BYTES: Final = 200  # of one part; 255 on most systems, and we append to it
# What Windows gives a meaning of its own, in the middle of a name or as one.
_SPECIAL: Final = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]')
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
# As huggingface_hub has it; two hyphens stand for the slash in the name of a cache folder.
_REPOSITORY: Final = re.compile(r"\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_NO_REPOSITORY: Final = re.compile(r"--|\.\.|\.git$")
RECORD: Final = "origin.json"  # our own record beside a stored model


def fault(kind: Named, name: object) -> str | None:
    """What is wrong with the name, to follow "the name"; None where it may be used."""
    if not isinstance(name, str) or not name:
        return "is empty"
    if special := _SPECIAL.search(name):
        return f"holds {special[0]!r}"
    if len(name.encode()) > _MOST_BYTES:
        return f"is longer than {_MOST_BYTES} bytes"
    for part in name.split("/"):
        if reason := _fault_of_part(part):
            return reason
    if kind == "repository" and (not _REPOSITORY.fullmatch(name) or _NO_REPOSITORY.search(name)):
        return "is not of the form owner/name"
    if kind == "file" and name.rpartition("/")[2].lower() == RECORD:
        return f"is that of our own record, {RECORD}"
    return None


def is_safe(kind: Named, name: object) -> bool:
    """Whether the name may become a path."""
    return fault(kind, name) is None


def inside(folder: Path, path: Path) -> bool:
    """Whether `path` lies in `folder`, whatever links lead there; the path itself may be a link."""
    return path.parent.resolve().is_relative_to(folder.resolve())


def _fault_of_part(part: str) -> str | None:
    if part in ("", ".", ".."):
        return "leads out of its folder" if part else "is absolute, or has an empty part"
    if len(part.encode()) > _MOST_PART_BYTES:
        return f"has a part longer than {_MOST_PART_BYTES} bytes"
    if part.endswith((".", " ")) or part.startswith(" "):
        return f"has a part that begins or ends badly, {part!r}"
    if _DEVICE.fullmatch(part):
        return f"is that of a device, {part!r}"
    return None
