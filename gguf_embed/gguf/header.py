"""What a GGUF file says about itself: metadata and tensor table. No weights are loaded."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Final

from gguf_embed.errors import BadModelFile, ModelNotFound
from gguf_embed.gguf.cursor import (
    MAX_ARRAY_LENGTH,
    MAX_EXPERTS,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_LAYERS,
    MAX_TENSORS,
    ArraySummary,
    Cursor,
    MetaValue,
    RangeReader,
    read_preamble,
)
from gguf_embed.gguf.quants import FILE_TYPES
from gguf_embed.gguf.tensors import TensorInfo, read_tensor_info
from gguf_embed.system.files import printable
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
# Bidirectional models that llama.cpp gives a causal mask unless it is told otherwise; their
# converter writes no `attention.causal` (llama_model_llama_embed, used by llama-embed-nemotron).
BIDIRECTIONAL: Final = frozenset({"llama-embed"})

# The most that a number of the header may say, by the key without its architecture: more would
# cost time or memory here, or abort the process in llama.cpp. No real model comes near.
_MOST: Final[Mapping[str, int]] = {
    "block_count": MAX_LAYERS,
    "nextn_predict_layers": MAX_LAYERS,
    "context_length": (1 << 31) - 1,
    "embedding_length": 1 << 20,
    "feed_forward_length": 1 << 24,
    "attention.head_count": 1 << 16,
    "attention.head_count_kv": 1 << 16,
    "attention.key_length": 1 << 16,
    "attention.value_length": 1 << 16,
    "expert_count": MAX_EXPERTS,
    "expert_used_count": MAX_EXPERTS,
    "vocab_size": MAX_ARRAY_LENGTH,
}


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
        """Whether a token sees only those before it; true of most decoders that do not say."""
        if self.architecture in ENCODERS:
            return False  # whatever the file says: llama.cpp encodes without a causal mask
        said = self._bool(self._key("attention.causal"))
        return self.architecture not in BIDIRECTIONAL if said is None else said

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

    def number(self, name: str) -> int | None:
        """An integer of the architecture's own, such as "expert_count"; None if not stated."""
        return self._int(self._key(name))

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


def read_header(path: Path, *, keep_arrays: bool = False) -> Header:
    """The header of a local file; `keep_arrays` keeps vocabularies too."""
    shown = printable(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise BadModelFile(f"{shown}: a directory; pass the .gguf file inside it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise BadModelFile(f"{shown}: a pipe or a device; pass a file that lies on a disk")
        with path.open("rb", buffering=0) as file:
            return parse_header(_FileReader(file), source=shown, keep_arrays=keep_arrays)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"{shown}: no such file; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        why = getattr(error, "strerror", None) or error
        raise BadModelFile(f"{shown}: cannot be read: {why}") from error


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
    cursor = Cursor(reader, source)
    version = read_preamble(cursor)
    n_tensors = cursor.count("tensors", MAX_TENSORS)
    n_keys = cursor.count("metadata keys", MAX_KEYS)

    metadata: dict[str, MetaValue] = {}
    for _ in range(n_keys):
        key = cursor.name("metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.damaged(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(key, keep_arrays=keep_arrays)
        # Now, not when all is read: over the network the rest may be many megabytes.
        check_size(source, key, metadata[key])
    alignment = _alignment(metadata, cursor)

    tensors: list[TensorInfo] = []
    names: set[str] = set()
    data_bytes = 0  # of the tensors so far, with their padding
    for _ in range(n_tensors):
        tensor = read_tensor_info(cursor)
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


def check_size(source: str, key: str, value: MetaValue) -> None:
    """Raise BadModelFile where a number of the header is absurd."""
    most = _MOST.get(key.partition(".")[2])
    numbers = value if isinstance(value, tuple) else (value,)
    if most is None:
        return
    for number in numbers:
        if isinstance(number, int | float) and not 0 <= number <= most:
            raise BadModelFile(
                f"{source}: {key} is {number}, llama.cpp takes up to {most}; "
                "get another GGUF of this model"
            )


def _alignment(metadata: Mapping[str, MetaValue], cursor: Cursor) -> int:
    value = metadata.get("general.alignment", 32)
    # bool is an int; 1 is a power of two that llama.cpp takes, True is another type.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise cursor.damaged(f"general.alignment is {value!r}, must be a power of two")
    return value


def _padded(n_bytes: int, alignment: int) -> int:
    return (n_bytes + alignment - 1) // alignment * alignment
