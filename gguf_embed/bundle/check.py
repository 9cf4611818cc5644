"""Is every file of a bundle as it was written, and is there no other? Standard library only.

A copy of this file travels in the bundle, for a machine that has no gguf_embed yet:

    python3 -I check.py    # silent and 0, or every fault and 1
"""

from __future__ import annotations

import hashlib
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SUMS: Final = "SHA256SUMS"
# What a bundle writes; no part begins with a dot, so none leads out of the folder.
INSIDE: Final = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_LINE: Final = re.compile(r"([0-9a-f]{64})  (.+)")
MOST_BYTES: Final = 64 * 2**20  # of the manifest, which comes from elsewhere


class BadSums(Exception):
    """The manifest cannot be read, or says what no bundle's does."""


def read_sums(folder: Path) -> Mapping[str, str]:
    """Path -> sha256, of paths that stay inside the folder. Raises BadSums."""
    manifest = folder / SUMS
    try:
        if (n_bytes := manifest.stat().st_size) > MOST_BYTES:
            raise BadSums(f"{manifest} cannot be read: {n_bytes} bytes, at most {MOST_BYTES}")
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadSums(f"{manifest} cannot be read: {error}") from error
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        path = match[2] if match else ""
        if match is None or path in sums or path == SUMS:
            raise BadSums(
                f"{manifest}, line {number}: {line[:200]!r} is not a hash, two spaces and a file "
                "that no other line names"
            )
        if not INSIDE.fullmatch(path):
            raise BadSums(
                f"{manifest}, line {number}: {path!r} leads out of the folder or is no name that "
                "bundle writes"
            )
        sums[path] = match[1]
    return sums


def files_in(folder: Path) -> tuple[set[str], list[str]]:
    """The files of a folder at any depth, and what is neither file nor folder; follows no link."""
    files: set[str] = set()
    odd: list[str] = []
    pending = [folder]
    while pending:
        for entry in sorted(pending.pop().iterdir()):
            path, mode = entry.relative_to(folder).as_posix(), entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                pending.append(entry)
            elif stat.S_ISREG(mode):
                files.add(path)
            else:
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "a device or a pipe"
                odd.append(f"{path} is {kind}, not a file")
    return files, odd


def faults(folder: Path, sums: Mapping[str, str], sizes: Mapping[str, object] = {}) -> list[str]:
    """Every file that is missing, was added or is not as it was; `sizes` are for the message."""
    files, found = files_in(folder)
    found += [f"{path} is missing" for path in sorted(sums.keys() - files)]
    extra = sorted(files - sums.keys() - {SUMS})
    found += [f"{path} is not part of it: remove it" for path in extra]
    for path in sorted(sums.keys() & files):
        try:
            with (folder / path).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            found.append(f"{path} cannot be read ({error.strerror or error})")
            continue
        if sha256 != sums[path]:
            found.append(
                f"{path} was changed or damaged: sha256 {sha256}, "
                f"{(folder / path).stat().st_size} bytes, expected {sums[path]}, "
                f"{sizes.get(path, 'unknown')} bytes"
            )
    return found


def _main() -> int:
    folder = Path(__file__).parent
    try:
        found = faults(folder, read_sums(folder))
    except BadSums as error:
        found = [str(error)]
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(_main())
