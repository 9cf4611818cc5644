"""Files that lie in another file system, by their URI: s3://, gs://, abfs://, hdfs://, file://, ...

pyarrow reads them, with the keys of the environment; what it does not know goes to fsspec, where
that is installed. Only reading is here.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import IO, Any, Final, cast

from gguf_embed.errors import BadInput
from gguf_embed.io.extras import import_pyarrow
from gguf_embed.io.globs import path_regex

_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.+", re.DOTALL)
_KEYS: Final = re.compile(r"(?<=://)[^/@]*:[^/@]*@")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file, and how to get at it."""

    name: str  # its URI, without keys and choices
    path: str  # as the file system has it
    n_bytes: int | None
    filesystem: Any

    def open(self) -> AbstractContextManager[IO[bytes]]:
        """Its bytes, at any place."""
        stream = io.BufferedReader(self.filesystem.open_input_file(self.path))
        return closing(cast("IO[bytes]", stream))


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFiles:
    """What a URI stands for."""

    name: str  # the URI itself, without keys and choices
    files: Sequence[RemoteFile]
    is_folder: bool  # nobody has named the files, nor a pattern of theirs


def is_uri(name: str) -> bool:
    """Whether it names a file system."""
    return _URI.fullmatch(name) is not None


def find(uri: str) -> RemoteFiles:
    """The file, the files of a folder and those below, or of a pattern, sorted. Raises BadInput.

    * in a pattern stands for a part of a name, ** for any folders.
    """
    whole, mark, choices = uri.partition("?")
    shown = _KEYS.sub("", whole)
    if "*" in whole:
        folder = whole[: whole.index("*")].rpartition("/")[0]
        pattern = whole[len(folder) + 1 :]
    else:
        folder, pattern = whole.rstrip("/"), ""
    filesystem, base, kind = _asked(folder + mark + choices, shown)
    if kind == "NotFound":
        raise BadInput(f"{shown}: no such file or folder; correct it, or the choices after ?")
    if kind == "File":
        info = filesystem.get_file_info(base)
        only = RemoteFile(name=shown, path=base, n_bytes=info.size, filesystem=filesystem)
        return RemoteFiles(name=shown, files=(only,), is_folder=False)
    # Of a folder all but what is hidden.
    wanted = re.compile(path_regex(pattern) if pattern else r"(?!(.*/)?\.).*", re.DOTALL)
    files: list[RemoteFile] = []
    for info in _listed(filesystem, base, shown, below=not pattern or "/" in pattern):
        relative = info.path.removeprefix(base).lstrip("/")
        if info.is_file and wanted.fullmatch(relative):
            name = f"{_KEYS.sub('', folder)}/{relative}"
            files.append(
                RemoteFile(name=name, path=info.path, n_bytes=info.size, filesystem=filesystem)
            )
    if pattern and not files:
        raise BadInput(f"{shown}: no file is of this pattern; correct it")
    files.sort(key=lambda each: each.name)
    return RemoteFiles(name=shown, files=files, is_folder=not pattern)


def _asked(uri: str, shown: str) -> tuple[Any, str, str]:
    """The file system of a URI, the path there, and what lies at it."""
    pyarrow = import_pyarrow(shown)
    from_uri = importlib.import_module("pyarrow.fs").FileSystem.from_uri
    try:
        try:
            filesystem, path = from_uri(uri)
        except pyarrow.ArrowInvalid:
            filesystem, path = from_uri(f"fsspec+{uri}")
        return filesystem, path, filesystem.get_file_info(path).type.name
    except (OSError, ValueError, ImportError, pyarrow.ArrowException) as error:
        raise _refused(shown, error) from error


def _listed(filesystem: Any, base: str, shown: str, *, below: bool) -> Any:
    selector: Any = importlib.import_module("pyarrow.fs").FileSelector(base, recursive=below)
    try:
        return filesystem.get_file_info(selector)
    except OSError as error:
        raise _refused(shown, error) from error


def _refused(shown: str, error: BaseException) -> BadInput:
    why = _KEYS.sub("", " ".join(str(error).split()))
    return BadInput(
        f"{shown}: cannot be read: {why}; check the name, the keys in the "
        "environment (such as AWS_ACCESS_KEY_ID) and the endpoint (such as AWS_ENDPOINT_URL)"
    )
