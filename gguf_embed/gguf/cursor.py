"""The primitive values of a GGUF header, read one after another from a file or over HTTP.

The format is ggml-org's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); what is
refused here is what llama.cpp refuses (ggml/src/gguf.cpp), plus limits that keep a hostile
file from costing memory or time.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from gguf_embed.errors import BadModelFile

# Limits. The largest real headers (262,144 tokens with merges) are near 20 MiB.
MAX_HEADER_BYTES: Final = 64 << 20
MAX_ARRAY_LENGTH: Final = 4 << 20
MAX_KEYS: Final = 4096
MAX_TENSORS: Final = 1 << 16
MAX_KEY_BYTES: Final = (1 << 16) - 1  # the format's own limit
MAX_NAME_BYTES: Final = 63  # GGML_MAX_NAME, less the closing zero
MAX_DIMS: Final = 4  # GGML_MAX_DIMS
MAX_ELEMENTS: Final = (1 << 63) - 1
MAX_LAYERS: Final = 512  # LLAMA_MAX_LAYERS: llama.cpp aborts the process beyond it
MAX_EXPERTS: Final = 1024  # LLAMA_MAX_EXPERTS, likewise

KEPT_ARRAY_LENGTH: Final = 512  # per-layer numbers and labels, not vocabularies
FIRST_CHUNK_BYTES: Final = 256 << 10
LARGEST_CHUNK_BYTES: Final = 4 << 20

_ARRAY: Final = 9
_STRING: Final = 8
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
# gguf.h `enum gguf_type`: name, and the struct code of the fixed-size ones.
_VALUE_TYPES: Final[Mapping[int, tuple[str, str]]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    _STRING: ("str", ""),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_NOT_GGUF: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<", "a web page or XML, not a model; download the file itself"),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint; get the model's GGUF file"),
)

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySummary:
    """A metadata array that was skipped over: its element type, as gguf.h names it, and length."""

    type: str
    length: int


MetaValue = Scalar | tuple[Scalar, ...] | ArraySummary


class RangeReader(Protocol):
    """Bytes by position: a local file, or HTTP ranges."""

    @property
    def size(self) -> int | None:
        """Bytes in the whole file; None when it is not known."""
        ...

    def read(self, offset: int, size: int, /) -> bytes:
        """The bytes [offset, offset + size); fewer only where the file ends."""
        ...


def read_preamble(cursor: Cursor) -> int:
    """The version, once the file is known to be a GGUF that llama.cpp reads here."""
    start = cursor.peek(24)
    if not start.startswith(b"GGUF"):
        if not start:
            raise BadModelFile(f"{cursor.source}: empty file; download it again")
        looks = next((what for magic, what in _NOT_GGUF if start.startswith(magic)), None)
        raise BadModelFile(
            f"{cursor.source}: {looks}"
            if looks
            else f"{cursor.source}: not a GGUF file, it starts with {start[:4]!r}; "
            "pass a .gguf file"
        )
    cursor.take(4)
    version = cursor.u32()
    if version & 0xFFFF == 0 and version:
        raise BadModelFile(
            f"{cursor.source}: a big-endian GGUF (version reads as {version:#x}); "
            "get the little-endian file"
        )
    if version not in (2, 3):
        advice = (
            "convert the model again" if version < 2 else "update gguf-embed and llama-cpp-python"
        )
        raise BadModelFile(
            f"{cursor.source}: GGUF version {version}, versions 2 and 3 can be read; {advice}"
        )
    return version


class Cursor:
    """Walks forward through a reader, holding one chunk of it."""

    def __init__(self, reader: RangeReader, source: str) -> None:
        self.source = source
        self._reader = reader
        self._chunk = b""
        self._start = 0  # position of the chunk in the file
        self._at = 0  # next byte, in the chunk; past its end after a long skip
        self._next_bytes = FIRST_CHUNK_BYTES

    @property
    def position(self) -> int:
        """Where the next byte lies in the file."""
        return self._start + self._at

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer where the file ends; stays where it is."""
        self._fill(size)
        return self._chunk[self._at : self._at + size]

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if self._at + size > len(self._chunk):
            self._fill(size)
            if self._at + size > len(self._chunk):
                raise self.truncated(self.position + size)
        start = self._at
        self._at += size
        return self._chunk[start : self._at]

    def u32(self) -> int:
        """The next unsigned 32-bit number."""
        return _U32.unpack(self.take(4))[0]

    def u64(self) -> int:
        """The next unsigned 64-bit number."""
        return _U64.unpack(self.take(8))[0]

    def count(self, what: str, most: int) -> int:
        """A number of things, refused where it is beyond `most`."""
        n = self.u64()
        if n > most:
            raise self.damaged(f"{n} {what}, expected at most {most}")
        return n

    def name(self, what: str, most_bytes: int) -> str:
        """A string that identifies something: short, not empty, UTF-8."""
        raw = self.take(self.count(f"bytes in a {what}", most_bytes))
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} {raw[:40]!r} is not UTF-8") from None
        if not text:
            raise self.damaged(f"an empty {what}")
        return text

    def value(self, key: str, *, keep_arrays: bool) -> MetaValue:
        """The next metadata value with its type; long arrays are kept if asked for."""
        number = self.u32()
        if number != _ARRAY:
            return self._values(key, number, 1)[0]
        number = self.u32()
        length = self.count(f"elements in {key}", MAX_ARRAY_LENGTH)
        if length <= KEPT_ARRAY_LENGTH or keep_arrays:
            return self._values(key, number, length)
        name, code = self._type(key, number)
        if number == _STRING:
            self._skip_strings(length)
        else:
            self._skip_to(self._at + length * struct.calcsize(f"<{code}"))
        return ArraySummary(type=name, length=length)

    def damaged(self, what: str) -> BadModelFile:
        """The error of bytes that cannot be right."""
        return BadModelFile(
            f"{self.source}: damaged GGUF header before byte {self.position}: {what}; "
            "download the file again"
        )

    def truncated(self, needed: int) -> BadModelFile:
        """The error of a file that ends too early."""
        actual = self._reader.size
        if actual is None:
            actual = self._start + len(self._chunk)
        return BadModelFile(
            f"{self.source}: truncated: {needed} bytes are needed, the file has {actual}; "
            "download it again"
        )

    def _type(self, key: str, number: int) -> tuple[str, str]:
        """Name and struct code; arrays of arrays are refused, as llama.cpp does."""
        if number not in _VALUE_TYPES:
            kind = "an array of arrays" if number == _ARRAY else f"of type {number}"
            raise self.damaged(f"metadata {key} is {kind}, which llama.cpp does not read")
        return _VALUE_TYPES[number]

    def _values(self, key: str, number: int, n: int) -> tuple[Scalar, ...]:
        _, code = self._type(key, number)
        if number == _STRING:
            return self._texts(n)
        layout = struct.Struct(f"<{n}{code}")
        return layout.unpack(self.take(layout.size))

    def _text(self) -> str:
        # llama.cpp takes any bytes here, and a broken description harms nothing.
        return self.take(self.count("bytes in a string", MAX_HEADER_BYTES)).decode(errors="replace")

    def _texts(self, n: int) -> tuple[str, ...]:
        """The next n strings: a vocabulary has 30,000 to 300,000."""
        unpack_from = _U64.unpack_from
        texts: list[str] = []
        while len(texts) < n:
            texts.append(self._text())  # which reads on where the chunk ends
            chunk, at, end = self._chunk, self._at, len(self._chunk)
            for _ in range(n - len(texts)):
                if at + 8 > end:
                    break
                after = at + 8 + unpack_from(chunk, at)[0]
                if after > end:
                    break
                texts.append(chunk[at + 8 : after].decode(errors="replace"))
                at = after
            self._at = at
        return tuple(texts)

    def _skip_strings(self, n: int) -> None:
        """Pass over n strings; the one hot loop: Qwen3 has 303,000 of them."""
        unpack_from = _U64.unpack_from
        while n:
            if self._at + 8 > len(self._chunk) and len(self.peek(8)) < 8:
                raise self.truncated(self.position + 8)
            chunk, at, last = self._chunk, self._at, len(self._chunk) - 8
            while n and at <= last:
                at += 8 + unpack_from(chunk, at)[0]
                n -= 1
            self._skip_to(at)

    def _skip_to(self, at: int) -> None:
        position = self._start + at
        self._limit(position)
        size = self._reader.size
        if size is not None and position > size:
            raise self.truncated(position)
        self._at = at

    def _fill(self, size: int) -> None:
        """Hold at least the next `size` bytes, or all up to the end of the file."""
        self._limit(self.position + size)
        held = self._chunk[self._at :]
        start = self.position
        end = start + max(size, len(held) + self._next_bytes)
        if self._reader.size is not None:
            end = min(end, self._reader.size)  # a range past the end is an HTTP error
        wanted = end - start - len(held)
        self._chunk = held + self._reader.read(start + len(held), wanted) if wanted > 0 else held
        self._start, self._at = start, 0
        self._next_bytes = min(2 * self._next_bytes, LARGEST_CHUNK_BYTES)

    def _limit(self, position: int) -> None:
        if position > MAX_HEADER_BYTES:
            raise self.damaged(
                f"it reaches to byte {position}, headers end before {MAX_HEADER_BYTES}"
            )
