"""The passages of files: read, cut by the model's tokens, each with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gguf_embed.errors import BadInput
from gguf_embed.index.facts import IndexFacts, Passage
from gguf_embed.io.documents import Document
from gguf_embed.io.folder import FileStamp, stamp_of
from gguf_embed.io.split import split

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder

MAX_FILE_BYTES: Final = 1 << 28  # a larger one is no document
_UNSETTLED_NS: Final = 2 * 10**9  # a file that young may change again within the same stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """A file, read at one moment."""

    data: bytes
    digest: bytes
    stamp: FileStamp  # without a time while the file may change within it
    mtime_ns: int


def read_file(path: Path, *, now_ns: int) -> ReadFile:
    """The bytes of a file. Raises BadInput with the reason."""
    try:
        with path.open("rb") as stream:
            status = path.stat()
            if status.st_size > MAX_FILE_BYTES:
                raise BadInput(f"has {status.st_size} bytes, more than {MAX_FILE_BYTES}")
            data = stream.read()
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}") from error
    stamp = stamp_of(status)
    if now_ns - stamp.mtime_ns < _UNSETTLED_NS:
        stamp = replace(stamp, mtime_ns=-1)  # looked at again next time
    return ReadFile(data=data, digest=digest_of(data), stamp=stamp, mtime_ns=status.st_mtime_ns)


def digest_of(data: bytes) -> bytes:
    """Of 16 bytes."""
    return blake2b(data, digest_size=16).digest()


def passages_of(document: Document, embedder: Embedder, facts: IndexFacts) -> Iterator[Passage]:
    """The passages of a document without blank ones."""
    prompt = facts.space.prompt
    for chunk in split(
        document.text,
        count_tokens=lambda texts: embedder.count_tokens([prompt + text for text in texts]),
        max_tokens=facts.chunk_tokens,
        overlap=facts.overlap,
        kind=document.kind,
    ):
        if chunk.text.strip():
            yield Passage(
                digest=digest_of(chunk.text.encode()),
                text=chunk.text,
                headings=chunk.headings,
                start=chunk.start,
                end=chunk.end,
                first_line=chunk.first_line,
                last_line=chunk.last_line,
            )


def text_of(passages: list[Passage]) -> tuple[int, str]:
    """(first line, text) of passages that follow one another; overlaps are there once."""
    parts: list[str] = []
    first_line, end, last_line = 1, -1, 1
    for each in passages:
        if end < 0:
            first_line = each.first_line
        elif each.start > end:  # blank between them
            parts.append("\n" * (each.first_line - last_line) or " ")
        parts.append(each.text[max(0, end - each.start) if end >= 0 else 0 :])
        end, last_line = each.end, each.last_line + each.text.endswith("\n")
    return first_line, "".join(parts)


def lines_of(passages: list[Passage]) -> Mapping[int, str]:
    """The lines that passages cover, by number."""
    if not passages:
        return {}
    first_line, text = text_of(passages)
    lines = text.removesuffix("\n").split("\n")
    return {first_line + offset: line for offset, line in enumerate(lines)}
