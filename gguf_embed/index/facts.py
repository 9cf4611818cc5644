"""What an index is made of: values that its other files share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from gguf_embed.io.folder import FileStamp

FORMAT = 1  # of the tables; another one is refused
Ranking: TypeAlias = Literal["both", "meaning", "words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The vector space of an index, and the way to its model."""

    model: str  # as `Embedder.open` takes it
    model_id: str
    quant: str
    fingerprint: str
    sha256: str
    pooling: str
    prompt: str  # in front of every passage
    dim: int

    @property
    def shown(self) -> str:
        """For messages."""
        return f"{self.model_id} {self.quant} (vector space {self.fingerprint})"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFacts:
    """What stays the same as long as no passage is embedded anew by another model."""

    format: int
    space: Space
    chunk_tokens: int
    overlap: int
    made_by: str  # the version of this package


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which files of its folders an index takes, as patterns."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gitignore: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder, or a file, that an index covers."""

    id: int
    path: Path
    about: str  # "" or a line that says what is in it


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """A file as it is in the index."""

    id: int
    folder: int
    name: str  # relative to the folder, with slashes
    digest: bytes  # of its bytes
    stamp: FileStamp
    first_row: int  # of its vectors, which lie together
    n_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A part of a file, with its place."""

    digest: bytes  # of its text
    text: str
    headings: tuple[str, ...]
    start: int  # characters
    end: int
    first_line: int
    last_line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A file that could not be read."""

    folder: int
    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPassage:
    """A passage of the index, with its file."""

    row: int  # its id in the tables
    file: int
    ordinal: int  # within its file, from 0
    passage: Passage

    @property
    def id(self) -> str:
        """Short, and the same for the same text in any index."""
        return short_id(self.passage.digest)


ID_DIGITS = 8


def short_id(digest: bytes) -> str:
    """The id that people and programs see."""
    return digest.hex()[:ID_DIGITS]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStatus:
    """How an index stands."""

    place: Path
    facts: IndexFacts
    selection: Selection
    folders: tuple[Folder, ...]
    files_of: Mapping[int, int]  # number of files, by folder
    n_files: int
    n_passages: int
    n_dead_rows: int  # vectors of passages that are gone
    n_bytes: int  # on disk
    updated_at: str  # ISO 8601, UTC; "" before the first update
    unfinished: int  # files that an update which was cut off has left; 0: it is complete
    unread: tuple[Unread, ...]
    metadata_keys: tuple[str, ...]  # that questions may be limited by
