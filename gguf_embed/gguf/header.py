"""GGUF header reader: metadata and tensor table, without loading any weights.

The format is ggml-org's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); what is
refused here is what llama.cpp refuses (ggml/src/gguf.cpp), plus limits that keep a hostile
file from costing memory or time.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Final, Protocol

from gguf_embed.errors import BadModelFile, ModelNotFound
from gguf_embed.gguf.quants import BLOCK, FILE_TYPES, TYPE_NAMES
from gguf_embed.vectors import Pooling

_FILE_TYPE_GUESSED: Final = 1024  # a flag that llama.cpp adds when the file does not say

# Architectures that llama.cpp runs without a KV cache and always bidirectionally
# (llama_model::create_memory, llama_context::encode).
ENCODERS: Final = frozenset(
    {
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
    }
)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor; `shape[0]` is the row length, `offset` counts from the start of tensor data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


class RangeReader(Protocol):
    """Bytes by position: a local file, or HTTP ranges."""

    @property
    def size(self) -> int | None:
        """Bytes in the whole file; None when it is not known."""
        ...

    def read(self, offset: int, size: int, /) -> bytes:
        """The bytes [offset, offset + size); fewer only where the file ends."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF file says about itself; properties raise BadModelFile where it says nonsense."""

    source: str
    version: int
    metadata: Mapping[str, MetaValue]
    tensors: tuple[TensorInfo, ...]
    header_bytes: int  # where tensor data starts
    file_bytes: int | None

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as "qwen3"."""
        value = self._str("general.architecture")
        if not value:
            raise self._missing("general.architecture")
        return value

    @property
    def name(self) -> str | None:
        """`general.name`, as the converter wrote it."""
        return self._str("general.name")

    @property
    def n_layer(self) -> int:
        """Transformer blocks."""
        return self._positive("block_count")

    @property
    def n_embd(self) -> int:
        """Width of a token vector."""
        return self._positive("embedding_length")

    @property
    def n_head(self) -> int:
        """Attention heads; the largest, where layers differ."""
        return self._positive("attention.head_count")

    @property
    def n_head_kv(self) -> int:
        """Key and value heads; the largest, where layers differ; n_head if not stated."""
        return self._positive("attention.head_count_kv", default=self.n_head)

    @property
    def key_length(self) -> int:
        """Elements of one head's key."""
        return self._positive("attention.key_length", default=self.n_embd // self.n_head)

    @property
    def value_length(self) -> int:
        """Elements of one head's value."""
        return self._positive("attention.value_length", default=self.n_embd // self.n_head)

    @property
    def n_ff(self) -> int:
        """Width of the feed-forward layer; the largest, where layers differ."""
        return self._positive("feed_forward_length")

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding table; tokens of the vocabulary where there is no table."""
        table = self.tensor("token_embd.weight")
        if table is not None and len(table.shape) == 2:
            return table.shape[1]
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, ArraySummary):
            return tokens.length
        if isinstance(tokens, tuple):
            return len(tokens)
        return self._positive("vocab_size")

    @property
    def n_ctx_train(self) -> int:
        """Longest sequence, in tokens, that the model was trained for."""
        return self._positive("context_length")

    @property
    def pooling(self) -> Pooling | None:
        """How the file says to pool; None when it does not say."""
        key = self._key("pooling_type")
        number = self._int(key)
        try:
            return None if number is None else Pooling(number)
        except ValueError:
            raise BadModelFile(
                f"{self.source}: {key} is {number}, known are 0 to {max(Pooling):d}; "
                "get a newer gguf-embed, or another GGUF of this model"
            ) from None

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it; true of decoders that do not say."""
        if self.architecture in ENCODERS:
            return False  # whatever the file says: llama.cpp encodes without a causal mask
        said = self._bool(self._key("attention.causal"))
        return True if said is None else said

    @property
    def add_bos(self) -> bool | None:
        """Whether tokenizing puts the begin token in front; None when the file does not say."""
        return self._bool("tokenizer.ggml.add_bos_token")

    @property
    def add_eos(self) -> bool | None:
        """Whether tokenizing appends the end token; None when the file does not say."""
        return self._bool("tokenizer.ggml.add_eos_token")

    @property
    def bos_id(self) -> int | None:
        """Id of the begin token (CLS in BERT vocabularies)."""
        return self._int("tokenizer.ggml.bos_token_id")

    @property
    def eos_id(self) -> int | None:
        """Id of the end token."""
        return self._int("tokenizer.ggml.eos_token_id")

    @property
    def tokenizer_model(self) -> str | None:
        """Kind of tokenizer: "gpt2" (byte-level BPE), "bert" (WordPiece), "t5" (Unigram), ..."""
        return self._str("tokenizer.ggml.model")

    @property
    def quant(self) -> str:
        """Quantization as llama-quantize names it; the type of most weights if not stated."""
        file_type = self._int("general.file_type")
        if file_type is not None and (stated := FILE_TYPES.get(file_type & ~_FILE_TYPE_GUESSED)):
            return stated
        weights = Counter[str]()
        for tensor in self.tensors:
            weights[tensor.type] += prod(tensor.shape)
        return weights.most_common(1)[0][0] if weights else "none"

    @property
    def matrix_types(self) -> tuple[str, ...]:
        """Types of the matrices, sorted: what decides which kernels run."""
        return tuple(sorted({tensor.type for tensor in self.tensors if len(tensor.shape) > 1}))

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def split(self) -> tuple[int, int]:
        """Which part of a split model this is, from 0, and how many there are; (0, 1): whole."""
        return self._int("split.no") or 0, self._int("split.count") or 1

    def tensor(self, name: str) -> TensorInfo | None:
        """The tensor of that name, or None."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def _positive(self, name: str, *, default: int | None = None) -> int:
        key = self._key(name)
        value = default if key not in self.metadata else self._int(key)
        if value is None:
            raise self._missing(key)
        if value < 1:
            raise BadModelFile(f"{self.source}: {key} is {value}, must be at least 1")
        return value

    def _int(self, key: str) -> int | None:
        value = self.metadata.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        if isinstance(value, tuple):
            numbers = [n for n in value if isinstance(n, int) and not isinstance(n, bool)]
            if numbers and len(numbers) == len(value):
                return max(numbers)
        raise self._wrong_type(key, value, "an integer")

    def _str(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong_type(key, value, "a string")

    def _bool(self, key: str) -> bool | None:
        value = self.metadata.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong_type(key, value, "true or false")

    def _wrong_type(self, key: str, value: MetaValue, expected: str) -> BadModelFile:
        return BadModelFile(f"{self.source}: {key} is {value!r}, expected {expected}")

    def _missing(self, key: str) -> BadModelFile:
        return BadModelFile(
            f"{self.source}: the header has no {key}; convert the model again with a current "
            "convert_hf_to_gguf.py, or get another GGUF of it"
        )


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data; its rows must be whole blocks of the type."""
    block, block_bytes = BLOCK[type_name]
    assert shape[0] % block == 0, f"rows of {shape[0]} are not whole {type_name} blocks"
    return prod(shape) // block * block_bytes


def read_header(path: Path, *, keep_arrays: bool = False) -> Header:
    """The header of a local file; `keep_arrays` keeps vocabularies too."""
    if path.is_dir():
        raise BadModelFile(f"{path}: a directory; pass the .gguf file inside it")
    try:
        with path.open("rb", buffering=0) as file:
            reader = _FileReader(file)
            return parse_header(reader, source=str(path), keep_arrays=keep_arrays)
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror or error}") from error


class _FileReader:
    """A `RangeReader` over an open file."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.size: int = file.seek(0, 2)

    def read(self, offset: int, size: int, /) -> bytes:
        self._file.seek(offset)
        return self._file.read(size) or b""


def parse_header(reader: RangeReader, *, source: str, keep_arrays: bool = False) -> Header:
    """The header behind `reader`, asked for in chunks of 256 KiB growing to 4 MiB.

    `source` is what error messages call the file. Raises BadModelFile for anything but a
    whole GGUF of version 2 or 3; arrays longer than 512 become ArraySummary unless
    `keep_arrays`.
    """
    cursor = _Cursor(reader, source)
    version = _preamble(cursor)
    n_tensors = cursor.count("tensors", MAX_TENSORS)
    n_keys = cursor.count("metadata keys", MAX_KEYS)

    metadata: dict[str, MetaValue] = {}
    for _ in range(n_keys):
        key = cursor.name("metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.damaged(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(key, keep_arrays=keep_arrays)
    alignment = _alignment(metadata, cursor)

    tensors: list[TensorInfo] = []
    names: set[str] = set()
    data_bytes = 0  # of the tensors so far, with their padding
    for _ in range(n_tensors):
        tensor = _tensor_info(cursor)
        if tensor.name in names:
            raise cursor.damaged(f"tensor {tensor.name!r} occurs twice")
        if tensor.offset != data_bytes:
            # llama.cpp takes tensors end to end, each aligned; so none can overlap another.
            raise cursor.damaged(
                f"tensor {tensor.name!r} starts at {tensor.offset}, expected {data_bytes}"
            )
        names.add(tensor.name)
        tensors.append(tensor)
        data_bytes += _padded(tensor.n_bytes, alignment)

    header_bytes = _padded(cursor.position, alignment) if tensors else cursor.position
    if tensors and reader.size is not None:
        needed = header_bytes + tensors[-1].offset + tensors[-1].n_bytes
        if needed > reader.size:
            raise cursor.truncated(needed)
    return Header(
        source=source,
        version=version,
        metadata=metadata,
        tensors=tuple(tensors),
        header_bytes=header_bytes,
        file_bytes=reader.size,
    )


def _preamble(cursor: _Cursor) -> int:
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


def _alignment(metadata: Mapping[str, MetaValue], cursor: _Cursor) -> int:
    value = metadata.get("general.alignment", 32)
    # bool is an int; 1 is a power of two that llama.cpp takes, True is another type.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise cursor.damaged(f"general.alignment is {value!r}, must be a power of two")
    return value


def _padded(n_bytes: int, alignment: int) -> int:
    return (n_bytes + alignment - 1) // alignment * alignment


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.name("tensor name", MAX_NAME_BYTES)
    n_dims = cursor.u32()
    if n_dims > MAX_DIMS:
        raise cursor.damaged(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMS}")
    shape = tuple(cursor.u64() for _ in range(n_dims)) or (1,)
    type_number, offset = cursor.u32(), cursor.u64()
    type_name = TYPE_NAMES.get(type_number)
    if type_name is None:
        raise BadModelFile(
            f"{cursor.source}: tensor {name!r} has type {type_number}, which is unknown; "
            "update gguf-embed and llama-cpp-python, or get a current file"
        )
    if shape[0] % BLOCK[type_name][0]:
        raise cursor.damaged(
            f"tensor {name!r} has rows of {shape[0]}, not whole {type_name} blocks of "
            f"{BLOCK[type_name][0]}"
        )
    if prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise cursor.damaged(f"tensor {name!r} has shape {shape}, beyond 2^63 elements")
    return TensorInfo(
        name=name,
        shape=shape,
        type=type_name,
        offset=offset,
        n_bytes=tensor_bytes(type_name, shape),
    )


class _Cursor:
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
        return _U32.unpack(self.take(4))[0]

    def u64(self) -> int:
        return _U64.unpack(self.take(8))[0]

    def count(self, what: str, most: int) -> int:
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
        return BadModelFile(
            f"{self.source}: damaged GGUF header before byte {self.position}: {what}; "
            "download the file again"
        )

    def truncated(self, needed: int) -> BadModelFile:
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
            return tuple(self._text() for _ in range(n))
        layout = struct.Struct(f"<{n}{code}")
        return layout.unpack(self.take(layout.size))

    def _text(self) -> str:
        # llama.cpp takes any bytes here, and a broken description harms nothing.
        return self.take(self.count("bytes in a string", MAX_HEADER_BYTES)).decode(errors="replace")

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


def check_embedder(header: Header, *, pooling: Pooling | None = None) -> None:
    """Raise BadModelFile if text cannot be embedded with this file, saying what it is instead.

    `pooling` is the caller's choice in place of the file's. Whether llama.cpp knows the
    architecture is for llama.cpp to say: a list here would refuse what a newer build runs.
    """
    source, metadata = header.source, header.metadata
    kind = metadata.get("general.type")
    if kind == "adapter" or "adapter.type" in metadata:
        raise BadModelFile(f"{source}: a LoRA adapter; pass the model that it adapts")
    if kind == "mmproj" or metadata.get("general.architecture") == "clip":
        raise BadModelFile(
            f"{source}: the image or audio part of a multimodal model; pass its text model"
        )
    if kind == "imatrix":
        raise BadModelFile(f"{source}: an importance matrix for quantizing; pass a model")
    shard, n_shards = header.split
    if shard > 0:
        raise BadModelFile(
            f"{source}: part {shard + 1} of {n_shards}; pass the first part, its name ends in "
            f"-00001-of-{n_shards:05d}.gguf, with the others beside it"
        )
    if n_shards <= 1 and header.tensor("token_embd.weight") is None:
        holds = f"{len(header.tensors)} tensors" if header.tensors else "a vocabulary only"
        raise BadModelFile(
            f"{source}: no model: it holds {holds} and no token_embd.weight; "
            "pass a text embedding model"
        )
    if header.n_layer > MAX_LAYERS:
        raise BadModelFile(
            f"{source}: {header.architecture}.block_count is {header.n_layer}, "
            f"llama.cpp takes up to {MAX_LAYERS}; get another GGUF of this model"
        )
    if header.tokenizer_model in (None, "none", "no_vocab"):
        raise BadModelFile(
            f"{source}: no tokenizer in the file; convert the model again with its vocabulary"
        )
    scores = header.pooling if pooling is None else pooling
    heads = ("cls.output.weight", "cls.weight")
    if scores is Pooling.RANK and n_shards <= 1 and not any(map(header.tensor, heads)):
        raise BadModelFile(
            f"{source}: a reranker without its head (no cls.output.weight), its scores would be "
            "noise; get a GGUF made by a current convert_hf_to_gguf.py"
        )


def needs_pooling(header: Header) -> str | None:
    """What to tell a user whose file does not say how to pool; None when it does."""
    if header.pooling is not None:
        return None
    silent = f"{header.source}: the file does not say how token vectors become one"
    if "rerank" in (header.name or "").lower():
        return (
            f"{silent}, and its name is that of a reranker; get a GGUF with cls.output.weight, "
            "made by a current convert_hf_to_gguf.py"
        )
    if header.causal:
        return (
            f"{silent}: a {header.architecture} language model; pass pooling LAST if it was "
            "trained to embed (Qwen3-Embedding and its kin), a chat model is a poor embedder"
        )
    return f"{silent}; pass pooling MEAN or CLS, its model card says which"
