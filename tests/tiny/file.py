"""A tiny model as a GGUF file: its random weights, and how they are written."""

from __future__ import annotations

import ctypes
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Pooling = gguf.PoolingType

# Made by gguf.quants; every other type goes through llama_model_quantize.
WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A written GGUF and what transformers needs to run the same model."""

    path: Path
    weights: Mapping[str, Array] = field(repr=False)  # transformers' state dict
    config: Mapping[str, Any]  # keywords of transformers' configuration class
    tokenizer: Mapping[str, Any] = field(repr=False)  # what tokenizer.json would hold
    pooling: Pooling | None
    dense: Sequence[Array] = field(repr=False, default=())  # (n_out, n_in), after pooling

    @property
    def weights_sha256(self) -> str:
        """Hash over names, shapes and bytes of all weights, in name order."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            weight = self.weights[name]
            digest.update(f"{name} {weight.shape}\n".encode())
            digest.update(np.ascontiguousarray(weight, dtype="<f4").tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------ weights


class Draw:
    """Random weights by name: each depends on the seed and its own name only."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.weights: dict[str, Array] = {}

    def matrix(self, name: str, n_rows: int, n_cols: int, *, rms: float) -> None:
        self.weights[name] = half(self._bell(name, n_rows, n_cols) * rms)

    def dense(self, name: str, n_out: int, n_in: int, *, gain: float = 1.0) -> None:
        """Input of RMS 1 gives output of RMS `gain`."""
        self.weights[name] = half(self._bell(name, n_out, n_in) * (gain / np.sqrt(n_in)))

    def vector(self, name: str, n: int, *, mean: float, spread: float) -> None:
        self.weights[name] = half(mean + self._bell(name, n) * spread)

    def _bell(self, name: str, *shape: int) -> NDArray[np.float64]:
        """Near-normal, mean 0, variance 1: a sum of uniforms.

        RandomState's stream is frozen for good, and sums round the same everywhere, which
        the logarithm in a true normal does not.
        """
        random = np.random.RandomState([self._seed, zlib.crc32(name.encode())])
        a, b, c = random.random_sample((3, *shape))
        return (a + b + c - 1.5) * 2.0


def half(values: NDArray[np.float64]) -> Array:
    return values.astype(np.float16).astype(np.float32)


# ---------------------------------------------------------------------------- GGUF files


def open_writer(path: Path, arch: str, outtype: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"Tiny {arch}")
    stored = outtype if outtype in WRITABLE else "F32"
    ftype = "ALL_F32" if stored == "F32" else f"MOSTLY_{stored}"
    writer.add_file_type(gguf.LlamaFileType[ftype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def write_tensors(
    writer: gguf.GGUFWriter,
    path: Path,
    weights: Mapping[str, Array],
    outtype: str,
    *,
    extra: Mapping[str, Array] | None = None,
) -> None:
    """Write all weights under GGUF's names; `extra` are named for GGUF already."""
    names = gguf.get_tensor_name_map(_ARCH[writer.arch], _MOST_LAYERS)
    stored = outtype if outtype in WRITABLE else "F32"
    tensors = {_gguf_name(names, name): weight for name, weight in weights.items()}
    for name, weight in {**tensors, **(extra or {})}.items():
        # As llama.cpp's converter: vectors, norms and the small tables stay F32.
        small = weight.ndim == 1 or name.endswith(_ALWAYS_F32)
        kind = gguf.GGMLQuantizationType["F32" if small else stored]
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if outtype not in WRITABLE:
        _requantize(path, outtype)


_MOST_LAYERS = 8
_ALWAYS_F32 = ("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight")
_ARCH = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    for candidate in (name, f"model.{name}"):
        if found := names.get_name(candidate, (".weight", ".bias")):
            return found
    raise KeyError(f"no GGUF name for {name}")


def _requantize(path: Path, outtype: str) -> None:
    """Replace an F32 file by llama-quantize's version of it, e.g. "Q4_K_M"."""
    import llama_cpp.llama_cpp

    llama: Any = llama_cpp.llama_cpp  # its annotations do not cover ctypes.byref
    params = llama.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{outtype}"])
    params.nthread = 1
    made = path.with_suffix(".quantized")
    status = llama.llama_model_quantize(os.fsencode(path), os.fsencode(made), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {outtype}")
    made.replace(path)
