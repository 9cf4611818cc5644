"""Which files the inputs of a command stand for; nothing is read here.

.txt .md .jsonl .csv   a file, by its ending; also .gz and .zst of each
.parquet .arrow        tables (.feather and .ipc are .arrow)
DIR                    all such files in it and below, sorted
s3://BUCKET/...        such a file, folder or pattern in another file system
'DIR/*.csv'            the files of a pattern, sorted, where no file has that name
-                      standard input
a named pipe           as standard input, where its ending is none of these
"""

from __future__ import annotations

import difflib
import glob
import os
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal, TypeAlias, cast

from gguf_embed.errors import BadInput, BadOption, counted
from gguf_embed.io import remote
from gguf_embed.io.remote import RemoteFile
from gguf_embed.system.files import printable

OnBad: TypeAlias = Callable[[BadInput], None]
FileKind = Literal[".txt", ".md", ".jsonl", ".csv", ".parquet", ".arrow"]
Packing = Literal[".gz", ".zst"]

TEXT_KINDS: Final[tuple[FileKind, ...]] = (".txt", ".md", ".jsonl", ".csv")
TABLES: Final[tuple[FileKind, ...]] = (".parquet", ".arrow")
KINDS: Final[tuple[FileKind, ...]] = (*TEXT_KINDS, *TABLES)
WITH_FIELDS: Final[tuple[FileKind, ...]] = (".jsonl", ".csv", *TABLES)
_ENDINGS: Final[dict[str, FileKind]] = {
    **{kind: kind for kind in KINDS},
    ".ndjson": ".jsonl",
    ".feather": ".arrow",
    ".ipc": ".arrow",
}
_PACKINGS: Final[tuple[Packing, ...]] = (".gz", ".zst")
STDIN = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """One input to read: a file, one of another file system, or standard input."""

    name: str  # printable, as results and messages show it
    path: Path | None  # None: it is not of this file system
    kind: FileKind
    n_bytes: int | None  # None: not known before the end (a pipe)
    in_folder: bool = False  # nobody named it: it lies in a directory that was named
    packing: Packing | None = None  # how its bytes are compressed
    remote: RemoteFile | None = None

    @property
    def is_stdin(self) -> bool:
        """Whether somebody else holds it open."""
        return self.path is None and self.remote is None

    def open(self) -> AbstractContextManager[IO[bytes]]:
        """Its bytes."""
        if self.remote is not None:
            return self.remote.open()
        assert self.path is not None, "standard input is open"
        return self.path.open("rb")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSources:
    """What there is to read, in order, and what lies beside it unread."""

    files: tuple[TextSource, ...]
    passed_over: tuple[str, ...] = ()  # ending of each file in a directory that is not read

    def __iter__(self) -> Iterator[TextSource]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def total_bytes(self) -> int | None:
        """Bytes to read in all, None where a source does not tell."""
        sizes = [source.n_bytes for source in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def remark(self) -> str | None:
        """What a person should know of the files that are passed over; None without any."""
        if not self.passed_over:
            return None
        endings = Counter(self.passed_over).most_common()
        shown = ", ".join(ending for ending, _ in endings[:5])
        more = ", ..." if len(endings) > 5 else ""
        example = next((ending for ending, _ in endings if ending.startswith(".")), None)
        pattern = f"*{example}" if example else "*"
        n = len(self.passed_over)
        return (
            f"{counted(n, 'other file')} passed over ({shown}{more}); "
            f"--include {shlex.quote(pattern)} takes such files as text"
        )


def find(
    inputs: Sequence[str],
    *,
    field: str | None = None,
    include: Sequence[str] = (),
    on_bad: OnBad | None = None,
) -> TextSources:
    """The sources that `inputs` (files, directories, "-") stand for, in reading order.

    Directories are searched to any depth, in sorted order, for the endings above; names that
    begin with a dot are passed over without a word, other files are counted. A file that matches
    a pattern of `include` and has another ending is read as .md is. Raises BadInput for what is
    missing, unreadable or no text, before anything is read; `on_bad` takes what is wrong with a
    file in a directory instead, which is left out.
    """
    if unusable := [pattern for pattern in include if not pattern.strip("/.")]:
        raise BadOption(f"--include {unusable[0]!r}: is no pattern; write one such as '*.rst'")
    finder = _Finder(field=field, include=tuple(include), on_bad=on_bad)
    for name in inputs:
        finder.add(name)
    if unused := [pattern for pattern in include if pattern not in finder.used]:
        raise BadOption(f"--include {unused[0]!r}: matches no file of the inputs; correct it")
    return TextSources(files=tuple(finder.files), passed_over=tuple(finder.passed_over))


@contextmanager
def readable(name: str) -> Generator[None]:
    """Turns the system's refusals into BadInput with the path and the reason."""
    try:
        yield
    except OSError as error:
        at = os.fsdecode(cast(str | bytes, error.filename)) if error.filename else name
        shown = printable(Path(at)) if error.filename else name
        if isinstance(error, FileNotFoundError):
            near = ", where its link leads" if Path(at).is_symlink() else _near(Path(at))
            raise BadInput(f"{shown}: no such file or directory{near}") from error
        raise BadInput(
            f"{shown}: cannot be read: {error.strerror or error}; check the file and its permission"
        ) from error


class _Finder:
    """Collects sources, and counts what is passed over."""

    def __init__(
        self, *, field: str | None, include: tuple[str, ...], on_bad: OnBad | None
    ) -> None:
        self.files: list[TextSource] = []
        self.passed_over: list[str] = []
        self.used: set[str] = set()  # patterns that matched a file
        self._include = include
        self._on_bad = on_bad
        self._bad: BadInput | None = None  # the last of the directory
        # What has no ending of ours is read line by line: as texts, or as objects with fields.
        self._stream_kind: FileKind = ".txt" if field is None else ".jsonl"

    def add(self, name: str) -> None:
        """The sources of one input."""
        if name == STDIN:
            if any(source.is_stdin for source in self.files):
                raise BadOption("- (standard input) is named twice; it can be read once")
            self.files.append(
                TextSource(name=STDIN, path=None, kind=self._stream_kind, n_bytes=None)
            )
            return
        if not name:  # as a path it would be this directory
            raise BadOption("an input is empty; name a file or a directory, such as .")
        path = Path(name)
        if remote.is_uri(name) and not os.path.lexists(path):
            self._add_remote(name)
            return
        if not os.path.lexists(path) and (matching := _matching(name)):
            for each in matching:
                self.add(each)
            return
        with readable(printable(path)):
            mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            self._add_directory(path)
            return
        kind = self._kind(path)
        if stat.S_ISFIFO(mode):
            # Not opened before it is read: what is in a pipe comes once.
            kind = kind or self._stream_kind
            if kind in TABLES:
                raise BadInput(
                    f"{printable(path)}: is a pipe, and a table is not read from one; save it as a "
                    "file first"
                )
            self.files.append(
                TextSource(
                    name=printable(path),
                    path=path,
                    kind=kind,
                    n_bytes=None,
                    packing=packing_of(path) if kind_of(path) else None,
                )
            )
        elif not stat.S_ISREG(mode):
            raise BadInput(
                f"{printable(path)}: is a device or a socket; name a file, a directory or a pipe, "
                "or send it through standard input as -"
            )
        elif kind is None:
            raise BadInput(_unknown_ending(path))
        else:
            self.files.append(_file(path, kind))

    def _add_remote(self, uri: str) -> None:
        there = remote.find(uri)
        n_before = len(self.files)
        for each in there.files:
            path = Path(each.path)
            kind = self._kind(path)
            if kind is not None:
                self.files.append(_remote_file(each, path, kind, in_folder=there.is_folder))
            elif there.is_folder:
                self.passed_over.append(path.suffix.lower() or "no ending")
            else:
                raise BadInput(_unknown_ending(path))
        if len(self.files) == n_before:
            raise BadInput(
                f"{there.name}: no {', '.join(KINDS)} file there or below; name another folder, or "
                "take other files as text with --include PATTERN"
            )

    def _add_directory(self, root: Path) -> None:
        before = len(self.files), len(self.passed_over)
        self._bad = None

        def refuse(error: OSError) -> None:
            raise error

        with readable(printable(root)):
            for folder, folders, names in os.walk(root, onerror=refuse):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(names):
                    path = Path(folder, name)
                    if name.startswith("."):
                        continue
                    kind = self._kind(path)
                    if kind is None or _is_special(path):
                        self.passed_over.append(path.suffix.lower() or "no ending")
                    else:
                        self._add_found(path, kind)
        if len(self.files) == before[0] and self._bad is not None:
            raise self._bad
        if len(self.files) == before[0]:
            others = len(self.passed_over) - before[1]
            raise BadInput(
                f"{printable(root)}: no {', '.join(KINDS)} file in this directory or below "
                f"({counted(others, 'other file')}); name the files, or another directory, or "
                "take other files as text with --include PATTERN"
            )

    def _add_found(self, path: Path, kind: FileKind) -> None:
        """A file that nobody named."""
        try:
            self.files.append(_file(path, kind, in_folder=True))
        except BadInput as error:
            if self._on_bad is None:
                raise
            self._on_bad(error)
            self._bad = error

    def _kind(self, path: Path) -> FileKind | None:
        matched = {pattern for pattern in self._include if path.match(pattern)}
        self.used |= matched
        return kind_of(path) or (".md" if matched else None)


def _matching(pattern: str) -> list[str]:
    """What a pattern that the shell left as it is stands for; of ** without the directories."""
    if not any(char in pattern for char in "*?["):
        return []
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  (Path takes no absolute one)
    return [name for name in names if "**" not in pattern or not Path(name).is_dir()]


def kind_of(path: Path) -> FileKind | None:
    """What a file is by its ending, under that of a packing; None where none is known."""
    packing = packing_of(path)
    kind = _ENDINGS.get((path.with_suffix("") if packing else path).suffix.lower())
    return None if packing and kind in TABLES else kind


def packing_of(path: Path) -> Packing | None:
    """How a file is compressed, by its ending."""
    return next((packing for packing in _PACKINGS if path.suffix.lower() == packing), None)


def _file(path: Path, kind: FileKind, *, in_folder: bool = False) -> TextSource:
    with readable(printable(path)), path.open("rb") as stream:
        n_bytes = os.fstat(stream.fileno()).st_size
    return TextSource(
        name=printable(path),
        path=path,
        kind=kind,
        n_bytes=n_bytes,
        in_folder=in_folder,
        packing=packing_of(path) if kind_of(path) else None,
    )


def _remote_file(file: RemoteFile, path: Path, kind: FileKind, *, in_folder: bool) -> TextSource:
    return TextSource(
        name=file.name,
        path=None,
        kind=kind,
        n_bytes=file.n_bytes,
        in_folder=in_folder,
        packing=packing_of(path) if kind_of(path) else None,
        remote=file,
    )


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, socket or device: opening one that nobody named could wait for ever."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # opening it will say why
        return False


def _unknown_ending(path: Path) -> str:
    shown = printable(path)
    pattern = shlex.quote(f"*{path.suffix}" if path.suffix else path.name)
    return (
        f"{shown}: the ending {path.suffix or '(none)'} is not one of {', '.join(KINDS)}; take it "
        f"as text with --include {pattern}, or send it through standard input: "
        f"gguf-embed ... - < {shown}"
    )


def _near(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f"; there is no directory {printable(path.parent)}"
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; near it: {', '.join(printable(Path(name)) for name in near)}" if near else ""
