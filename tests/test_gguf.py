"""The header reader: against ggml's own words and numbers, and against hostile files."""

from __future__ import annotations

import ctypes
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gguf_embed.gguf.cursor
from gguf_embed.errors import BadModelFile, ModelNotFound
from gguf_embed.gguf.check import check_embedder, needs_pooling
from gguf_embed.gguf.cursor import FIRST_CHUNK_BYTES, MAX_HEADER_BYTES, ArraySummary, MetaValue
from gguf_embed.gguf.header import ENCODERS, Header, parse_header, read_header
from gguf_embed.gguf.quants import BLOCK, FILE_TYPES, TYPE_NAMES
from gguf_embed.gguf.tensors import TensorInfo
from gguf_embed.vectors import Pooling

pytestmark = [pytest.mark.native, pytest.mark.branches]

# --- files by the byte -----------------------------------------------------------------

U8, U32, I32, BOOL, STR, ARR, U64 = 0, 4, 5, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def array(key: str, kind: int, length: int, values: bytes) -> bytes:
    return entry(key, ARR, struct.pack("<IQ", kind, length) + values)


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(
    *parts: bytes,
    n_tensors: int = 0,
    n_keys: int = 0,
    version: int = 3,
    data: int = 0,
    align: int = 32,
) -> bytes:
    """A whole GGUF of these entries and tensors; `data` zero bytes follow the padding."""
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(parts)
    return header + bytes(-len(header) % align + data) if data else header


class Ranges:
    """A reader over bytes that knows what was asked of it; refuses a range past the end."""

    def __init__(self, raw: bytes, *, size_known: bool = True) -> None:
        self.raw = raw
        self.size = len(raw) if size_known else None
        self.asked: list[tuple[int, int]] = []

    def read(self, offset: int, size: int, /) -> bytes:
        assert size > 0
        assert offset < len(self.raw)
        assert self.size is None or offset + size <= self.size
        self.asked.append((offset, size))
        return self.raw[offset : offset + size]


def parse(raw: bytes, *, keep_arrays: bool = False) -> Header:
    return parse_header(Ranges(raw), source="m.gguf", keep_arrays=keep_arrays)


# --- a model of the `gguf` package, read by both ---------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every kind of value and several tensor types, by ggml-org's own writer."""
    path = tmp_path_factory.mktemp("gguf") / "written.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    for kind, value in (
        ("uint8", 200),
        ("int8", -100),
        ("uint16", 60_000),
        ("int16", -30_000),
        ("uint32", 4_000_000_000),
        ("int32", -2_000_000_000),
        ("uint64", 1 << 60),
        ("int64", -(1 << 60)),
        ("float32", 0.5),
        ("float64", 0.1),
        ("bool", True),
        ("string", "naïve 数 🙂"),
        ("array", [1, -2, 3]),
    ):
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.labels", ["yes", "no"])
    writer.add_array("test.flags", [True, False])
    writer.add_token_list([f"token {i}" * (i % 5) for i in range(700)])
    writer.add_token_scores([float(i) for i in range(700)])
    writer.add_tensor("f32", np.zeros((3, 5), np.float32))
    writer.add_tensor("f16", np.zeros((2, 3, 7), np.float16))
    for kind in ("Q8_0", "Q4_0"):
        quant = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(np.zeros((3, 64), np.float32), quant)
        writer.add_tensor(kind, data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_reads(written: Path) -> None:
    theirs, ours = gguf.GGUFReader(written), read_header(written, keep_arrays=True)
    values: dict[str, MetaValue] = {}
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            values[key] = tuple(value) if isinstance(value, list) else value
    assert ours.metadata == values
    assert ours.version == 3
    assert ours.header_bytes == theirs.data_offset
    assert ours.file_bytes == written.stat().st_size
    assert ours.tensors == tuple(
        TensorInfo(
            name=t.name,
            shape=tuple(int(n) for n in t.shape),
            type=t.tensor_type.name,
            offset=int(t.data_offset) - theirs.data_offset,
            n_bytes=int(t.n_bytes),
        )
        for t in theirs.tensors
    )
    assert ours.weights_bytes == sum(int(t.n_bytes) for t in theirs.tensors)
    assert ours.parameters == 3 * 5 + 2 * 3 * 7 + 2 * 3 * 64
    assert ours.tensor("f16") == ours.tensors[1]
    assert ours.tensor("none") is None


def test_only_long_arrays_are_summarized(written: Path) -> None:
    short, long = read_header(written), read_header(written, keep_arrays=True)
    assert short.metadata["tokenizer.ggml.tokens"] == ArraySummary(type="str", length=700)
    assert short.metadata["tokenizer.ggml.scores"] == ArraySummary(type="f32", length=700)
    assert short.metadata["test.labels"] == ("yes", "no")
    assert short.n_vocab == long.n_vocab == 700
    assert short.tensors == long.tensors


def test_a_tensor_without_dimensions_is_one_number() -> None:
    h = parse(file(tensor("t", []), n_tensors=1, data=4))
    assert h.tensors == (TensorInfo(name="t", shape=(1,), type="F32", offset=0, n_bytes=4),)


def test_headers_travel_between_processes(written: Path) -> None:
    header = read_header(written)
    assert pickle.loads(pickle.dumps(header)) == header


@given(first=st.integers(1, 300), keep_arrays=st.booleans(), size_known=st.booleans())
def test_chunks_do_not_matter(
    written: Path, first: int, keep_arrays: bool, size_known: bool
) -> None:
    raw = written.read_bytes()
    whole = parse_header(Ranges(raw), source="m", keep_arrays=keep_arrays)
    reader = Ranges(raw, size_known=size_known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_embed.gguf.cursor, "FIRST_CHUNK_BYTES", first)
        patch.setattr(gguf_embed.gguf.cursor, "LARGEST_CHUNK_BYTES", first)
        pieces = parse_header(reader, source="m", keep_arrays=keep_arrays)
    assert replace(pieces, file_bytes=whole.file_bytes) == whole
    assert pieces.file_bytes == reader.size
    ends = [offset + size for offset, size in reader.asked]
    assert all(start >= end for (start, _), end in zip(reader.asked[1:], ends, strict=False))


def vocabulary(n: int) -> bytes:
    words = b"".join(text(f"{i:x}" * 3) for i in range(n))
    return array("tokenizer.ggml.tokens", STR, n, words)


def test_a_large_vocabulary_takes_few_ranges_and_no_weights() -> None:
    """Chunks double from 256 KiB to 4 MiB: five for the 6 MB of Qwen3, six for these 9."""
    header = file(vocabulary(400_000), tensor("t", [32]), n_keys=1, n_tensors=1)
    reader = Ranges(header + bytes(12 << 20))
    assert parse_header(reader, source="m").header_bytes > 8 << 20
    assert [size >> 10 for _, size in reader.asked] == [256, 512, 1024, 2048, 4096, 4096]


# --- the words and numbers of ggml ------------------------------------------------------


def test_types_are_those_of_the_installed_ggml() -> None:
    lib = llama_cpp.llama_cpp._lib
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    theirs = {
        number: (name, lib.ggml_blck_size(number), lib.ggml_type_size(number))
        for number in range(43)
        if (name := (lib.ggml_type_name(number) or b"").decode().upper())
        and lib.ggml_blck_size(number)
    }
    assert {number: (name.upper(), *BLOCK[name]) for number, name in TYPE_NAMES.items()} == theirs


def test_file_types_are_those_of_llama_cpp() -> None:
    theirs = {
        number: name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
        for name, number in vars(llama_cpp.llama_cpp).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    assert {number: FILE_TYPES[number] for number in theirs} == theirs


def test_pooling_numbers_are_those_of_llama_cpp() -> None:
    for pooling in Pooling:
        assert getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{pooling.name}") == pooling


# --- damaged and hostile files ----------------------------------------------------------


@pytest.mark.slow
def test_every_truncation_is_refused(written: Path) -> None:
    raw = written.read_bytes()
    last = parse(raw).tensors[-1]
    needed = parse(raw).header_bytes + last.offset + last.n_bytes
    for size in range(needed):
        with pytest.raises(BadModelFile) as caught:
            parse(raw[:size])
    assert f"{needed} bytes are needed, the file has {needed - 1}" in str(caught.value)
    # The padding after the last tensor may be missing, as llama.cpp allows.
    assert parse(raw[:needed]).tensors == parse(raw).tensors


@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1),
    keep_arrays=st.booleans(),
)
def test_damage_is_read_or_refused_in_our_own_words(
    written: Path, changes: list[tuple[int, int]], keep_arrays: bool
) -> None:
    raw = bytearray(written.read_bytes())
    for position, byte in changes:
        raw[position % len(raw)] = byte
    refusals = refused(lambda: check_embedder(parse(bytes(raw), keep_arrays=keep_arrays)))
    assert all(message.startswith("m.gguf: ") for message in refusals)


def refused(*reads: Callable[[], object]) -> list[str]:
    """The messages of those that raise BadModelFile; any other exception is a bug."""
    messages: list[str] = []
    for read in reads:
        try:
            read()
        except BadModelFile as error:
            messages.append(str(error))
    return messages


HUGE = (1 << 64) - 1
ONE_KEY = u32("a.b", 1)
HOSTILE = {
    "empty file": (b"", "empty file"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "pytorch": (b"PK\x03\x04" + bytes(40), "PyTorch checkpoint"),
    "other": (b"ggml" + bytes(40), "not a GGUF file, it starts with b'ggml'"),
    "magic only": (b"GGUF", r"8 bytes are needed, the file has 4"),
    "version 0": (file(version=0), "version 0,.*convert"),
    "version 1": (file(version=1), "version 1,.*convert"),
    "version 4": (file(version=4), "version 4,.*update"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian.*little-endian"),
    "many tensors": (file(n_tensors=HUGE), f"{HUGE} tensors"),
    "many keys": (file(n_keys=HUGE), f"{HUGE} metadata keys"),
    "long key": (file(struct.pack("<Q", HUGE), n_keys=1), f"{HUGE} bytes in a metadata key"),
    "empty key": (file(text(""), n_keys=1), "empty metadata key"),
    "key not text": (file(entry(b"a\xff", U8, b"\0"), n_keys=1), "not UTF-8"),
    "key twice": (file(ONE_KEY, ONE_KEY, n_keys=2), r"'a\.b' occurs twice"),
    "long string": (file(entry("a", STR, struct.pack("<Q", HUGE)), n_keys=1), "bytes in a string"),
    "string past the end": (
        file(entry("a", STR, struct.pack("<Q", 99)), n_keys=1),
        "144 bytes are needed, the file has 45",
    ),
    "value type": (file(entry("a", 99, bytes(8)), n_keys=1), "metadata a is of type 99"),
    "long array": (file(array("a", U8, HUGE, b""), n_keys=1), f"{HUGE} elements in a"),
    "array past the end": (
        file(array("a", U64, 1000, bytes(80)), n_keys=1),
        "8049 bytes are needed, the file has 129",
    ),
    "array of arrays": (file(array("a", ARR, 1, bytes(12)), n_keys=1), "array of arrays"),
    "array of unknown": (file(array("a", 13, 9999, bytes(12)), n_keys=1), "of type 13"),
    "long string in a long array": (
        file(array("a", STR, 9999, text("") * 600 + struct.pack("<Q", HUGE)), n_keys=1),
        "headers end before",
    ),
    "alignment 0": (file(u32("general.alignment", 0), n_keys=1), "alignment is 0"),
    "alignment 48": (file(u32("general.alignment", 48), n_keys=1), "power of two"),
    "alignment true": (
        file(entry("general.alignment", BOOL, b"\1"), n_keys=1),
        "alignment is True",
    ),
    "long tensor name": (file(tensor("n" * 64, [1]), n_tensors=1), "64 bytes in a tensor name"),
    "tensor twice": (
        file(tensor("t", [8]), tensor("t", [8], offset=32), n_tensors=2, data=64),
        "'t' occurs twice",
    ),
    "five dimensions": (file(tensor("t", [1] * 5), n_tensors=1), "5 dimensions"),
    "too many elements": (file(tensor("t", [1 << 40] * 3), n_tensors=1), "beyond 2"),
    "removed type": (file(tensor("t", [32], kind=4), n_tensors=1), "type 4, which is unknown"),
    "part of a block": (file(tensor("t", [33], kind=8), n_tensors=1), "rows of 33.*Q8_0"),
    "first tensor not at 0": (
        file(tensor("t", [8], offset=32), n_tensors=1, data=64),
        "starts at 32, expected 0",
    ),
    "not aligned": (
        file(tensor("t", [9]), tensor("u", [8], offset=36), n_tensors=2, data=96),
        "'u' starts at 36, expected 64",
    ),
    "overlapping": (
        file(tensor("t", [16]), tensor("u", [8], offset=32), n_tensors=2, data=96),
        "'u' starts at 32, expected 64",
    ),
    "no data": (
        file(tensor("t", [1 << 20]), n_tensors=1),
        "4194368 bytes are needed, the file has 57",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str) -> None:
    raw, message = HOSTILE[case]
    with pytest.raises(BadModelFile, match=message) as caught:
        parse(raw)
    assert str(caught.value).startswith("m.gguf: ")
    assert "\n" not in str(caught.value)


class Endless(Ranges):
    """A server whose file goes on: `raw`, then zeros for ever, its size not told."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw, size_known=False)

    def read(self, offset: int, size: int, /) -> bytes:
        self.asked.append((offset, size))
        return self.raw[offset : offset + size].ljust(size, b"\0")


@pytest.mark.parametrize(
    ("key", "number"),
    [("qwen3.block_count", 20_000_000), ("bert.embedding_length", 1 << 30), ("x.expert_count", -1)],
)
def test_absurd_numbers_are_refused_as_soon_as_they_are_read(key: str, number: int) -> None:
    value = entry(key, I32, struct.pack("<i", number))
    reader = Endless(file(value, array("t", STR, 1 << 20, b""), n_keys=4096, n_tensors=60_000))
    with pytest.raises(BadModelFile, match=f"{key} is {number}, llama.cpp takes up to"):
        parse_header(reader, source="m")
    assert sum(size for _, size in reader.asked) <= FIRST_CHUNK_BYTES


@pytest.mark.parametrize(
    "lie",
    [
        entry("a", STR, struct.pack("<Q", MAX_HEADER_BYTES)),
        array("a", STR, 4 << 20, b"") + array("b", STR, 4 << 20, b""),
        array("a", U64, 4 << 20, b"") * 3,
    ],
    ids=["string", "strings", "numbers"],
)
def test_an_endless_header_costs_little(lie: bytes) -> None:
    reader = Endless(file(lie, n_keys=4096))
    with pytest.raises(BadModelFile):
        parse_header(reader, source="m")
    assert sum(size for _, size in reader.asked) <= MAX_HEADER_BYTES


def test_read_header_says_what_is_wrong_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.gguf: no such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(BadModelFile, match=r"a directory; pass the \.gguf file inside it"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait for a writer
    with pytest.raises(BadModelFile, match=r"pipe\.gguf: a pipe or a device"):
        read_header(tmp_path / "pipe.gguf")
    with pytest.raises(BadModelFile, match="a pipe or a device"):
        read_header(Path("/dev/zero"))
    with pytest.raises(ModelNotFound, match=r"\\xe9\.gguf: no such file"):
        read_header(tmp_path / os.fsdecode(b"\xe9.gguf"))
    with pytest.raises(BadModelFile, match="cannot be read: embedded null byte"):
        read_header(tmp_path / "a\0b.gguf")


# --- what a header says -----------------------------------------------------------------

QWEN3: dict[str, MetaValue] = {
    "general.architecture": "qwen3",
    "general.name": "Qwen3 Embedding",
    "general.file_type": 15,
    "qwen3.block_count": 28,
    "qwen3.context_length": 32768,
    "qwen3.embedding_length": 1024,
    "qwen3.feed_forward_length": 3072,
    "qwen3.attention.head_count": 16,
    "qwen3.attention.head_count_kv": 8,
    "qwen3.attention.key_length": 128,
    "qwen3.attention.value_length": 128,
    "qwen3.pooling_type": 3,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ArraySummary(type="str", length=151669),
    "tokenizer.ggml.token_type": ArraySummary(type="i32", length=151669),
    "tokenizer.ggml.merges": ArraySummary(type="str", length=151387),
    "tokenizer.ggml.bos_token_id": 151643,
    "tokenizer.ggml.eos_token_id": 151645,
    "tokenizer.ggml.add_eos_token": True,
    "tokenizer.ggml.add_bos_token": False,
}


def info(name: str, *shape: int, kind: str = "F16") -> TensorInfo:
    return TensorInfo(name=name, shape=shape, type=kind, offset=0, n_bytes=0)


TABLE = info("token_embd.weight", 1024, 151669)


def header(
    changes: dict[str, MetaValue | None] | None = None, tensors: Sequence[TensorInfo] = (TABLE,)
) -> Header:
    """Qwen3-Embedding with changed metadata; None removes a key."""
    metadata = {**QWEN3, **(changes or {})}
    return Header(
        source="m.gguf",
        version=3,
        metadata={key: value for key, value in metadata.items() if value is not None},
        tensors=tuple(tensors),
        header_bytes=0,
        file_bytes=None,
    )


def bert(changes: dict[str, MetaValue | None] | None = None) -> Header:
    metadata: dict[str, MetaValue | None] = {
        key.replace("qwen3.", "bert."): value for key, value in QWEN3.items()
    }
    removed: dict[str, MetaValue | None] = dict.fromkeys(QWEN3)
    return header({**removed, **metadata, "general.architecture": "bert", **(changes or {})})


def test_properties() -> None:
    h = header()
    assert (h.architecture, h.name, h.quant) == ("qwen3", "Qwen3 Embedding", "Q4_K_M")
    assert (h.n_layer, h.n_embd, h.n_ff, h.n_ctx_train) == (28, 1024, 3072, 32768)
    assert (h.n_head, h.n_head_kv, h.key_length, h.value_length) == (16, 8, 128, 128)
    assert (h.pooling, h.causal, h.n_vocab) == (Pooling.LAST, True, 151669)
    assert (h.tokenizer_model, h.bos_id, h.eos_id) == ("gpt2", 151643, 151645)
    assert (h.add_bos, h.add_eos) == (False, True)
    assert h.split == (0, 1)


def test_what_is_not_stated_follows_llama_cpp() -> None:
    h = header(
        {
            "general.name": None,
            "qwen3.attention.head_count_kv": None,
            "qwen3.attention.key_length": None,
            "qwen3.attention.value_length": None,
            "qwen3.pooling_type": None,
            "tokenizer.ggml.add_bos_token": None,
            "tokenizer.ggml.eos_token_id": None,
        }
    )
    assert (h.n_head_kv, h.key_length, h.value_length) == (16, 64, 64)
    assert (h.name, h.pooling, h.add_bos, h.eos_id) == (None, None, None, None)


def test_numbers_per_layer_give_the_largest() -> None:
    h = header({"qwen3.attention.head_count_kv": (2, 4, 2), "qwen3.feed_forward_length": (8, 9)})
    assert (h.n_head_kv, h.n_ff) == (4, 9)


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (ArraySummary(type="str", length=700), 7, 700),
        (("a", "b"), 7, 2),
        (None, 7, 7),
    ],
)
def test_vocabulary_without_a_table(tokens: MetaValue | None, size: int, expected: int) -> None:
    changes = {"tokenizer.ggml.tokens": tokens, "qwen3.vocab_size": size}
    assert header(changes, tensors=()).n_vocab == expected


def test_causality() -> None:
    assert header().causal
    assert not header({"qwen3.attention.causal": False}).causal
    assert not header({"general.architecture": "llama-embed"}).causal
    assert header(
        {"general.architecture": "llama-embed", "llama-embed.attention.causal": True}
    ).causal
    assert not bert().causal
    # llama.cpp encodes without a mask whatever such a file says.
    assert not bert({"bert.attention.causal": True}).causal
    assert {"bert", "nomic-bert-moe", "modern-bert", "gemma-embedding"} <= ENCODERS


@pytest.mark.parametrize(
    ("file_type", "expected"),
    [(7, "Q8_0"), (1024 + 18, "Q6_K"), (0, "F32"), (999, "Q8_0"), (None, "Q8_0")],
)
def test_quant(file_type: int | None, expected: str) -> None:
    """Stated, stated as a guess, and otherwise the type that most weights have."""
    tensors = [info("a", 64, 64, kind="Q8_0"), info("b", 64, kind="F32"), info("c", 64, kind="F32")]
    assert header({"general.file_type": file_type}, tensors).quant == expected


@pytest.mark.parametrize(
    ("key", "value", "message", "read"),
    [
        ("general.architecture", None, "no general.architecture", lambda h: h.architecture),
        ("general.architecture", 5, "is 5, expected a string", lambda h: h.architecture),
        ("qwen3.block_count", None, r"no qwen3\.block_count", lambda h: h.n_layer),
        ("qwen3.block_count", 0, "is 0, must be at least 1", lambda h: h.n_layer),
        ("qwen3.block_count", "28", "is '28', expected an integer", lambda h: h.n_layer),
        ("qwen3.block_count", True, "is True, expected an integer", lambda h: h.n_layer),
        ("qwen3.block_count", (), "expected an integer", lambda h: h.n_layer),
        ("qwen3.block_count", (1, 0.5), "expected an integer", lambda h: h.n_layer),
        ("qwen3.pooling_type", 9, "is 9, known are 0 to 4", lambda h: h.pooling),
        ("qwen3.attention.causal", 1, "is 1, expected true or false", lambda h: h.causal),
    ],
)
def test_nonsense_is_refused_when_asked_for(
    key: str, value: MetaValue | None, message: str, read: Callable[[Header], object]
) -> None:
    with pytest.raises(BadModelFile, match=message):
        read(header({key: value}))


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 64),
    st.floats(),
    st.text(),
    st.lists(st.integers() | st.floats() | st.text() | st.booleans()).map(tuple),
    st.builds(ArraySummary, type=st.just("str"), length=st.integers(0, 9)),
)
PROPERTIES = [name for name, value in vars(Header).items() if isinstance(value, property)]


@given(changes=st.dictionaries(st.sampled_from(sorted(QWEN3)), ODD_VALUES))
def test_any_metadata_is_read_or_refused(changes: dict[str, MetaValue | None]) -> None:
    h = header(changes)
    messages = refused(
        lambda: check_embedder(h),
        lambda: needs_pooling(h),
        *(lambda name=name: getattr(h, name) for name in PROPERTIES),
    )
    assert all(message.startswith("m.gguf: ") for message in messages)


# --- what a file is for -----------------------------------------------------------------


def test_an_embedder_passes() -> None:
    check_embedder(header())
    check_embedder(bert())
    check_embedder(header({"split.no": 0, "split.count": 3}, tensors=()))
    assert needs_pooling(header()) is None


RANK: dict[str, MetaValue | None] = {"qwen3.pooling_type": 4}


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"general.type": "adapter"}, (TABLE,), "LoRA adapter"),
        ({"adapter.type": "lora"}, (TABLE,), "LoRA adapter"),
        ({"general.type": "mmproj"}, (TABLE,), "multimodal"),
        ({"general.architecture": "clip"}, (TABLE,), "multimodal"),
        ({"general.type": "imatrix"}, (TABLE,), "importance matrix"),
        ({"split.no": 1, "split.count": 3}, (TABLE,), r"part 2 of 3.*-00001-of-00003\.gguf"),
        ({}, (), "a vocabulary only"),
        ({}, (info("v.blk.0.weight", 4),), "1 tensors and no token_embd.weight"),
        ({"qwen3.block_count": 513}, (TABLE,), "is 513, llama.cpp takes up to 512"),
        ({"tokenizer.ggml.model": None}, (TABLE,), "no tokenizer"),
        ({"tokenizer.ggml.model": "no_vocab"}, (TABLE,), "no tokenizer"),
        (RANK, (TABLE,), r"reranker without its head \(no cls\.output\.weight\)"),
    ],
)
def test_what_is_no_embedder_is_named(
    changes: dict[str, MetaValue | None], tensors: Sequence[TensorInfo], message: str
) -> None:
    with pytest.raises(BadModelFile, match=message):
        check_embedder(header(changes, tensors))


@pytest.mark.parametrize("head", ["cls.output.weight", "cls.weight"])
def test_a_reranker_needs_its_head_only_to_rank(head: str) -> None:
    check_embedder(header(RANK, (TABLE, info(head, 1024, 2))))
    check_embedder(header(RANK), pooling=Pooling.LAST)
    with pytest.raises(BadModelFile, match="without its head"):
        check_embedder(header(), pooling=Pooling.RANK)


@pytest.mark.parametrize(
    ("silent", "message"),
    [
        (header({"qwen3.pooling_type": None}), "qwen3 language model; pass pooling LAST"),
        (header({"qwen3.pooling_type": None, "general.name": "Qwen3 Reranker"}), "a reranker"),
        (bert({"bert.pooling_type": None}), "pass pooling MEAN or CLS"),
    ],
)
def test_a_silent_file_names_the_pooling_to_pass(silent: Header, message: str) -> None:
    check_embedder(silent)
    answer = needs_pooling(silent)
    assert answer is not None
    assert message in answer
