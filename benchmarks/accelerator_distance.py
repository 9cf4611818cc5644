"""How far vectors are from those of the same weights in float32: llama.cpp's and the accelerator's.

    python benchmarks/accelerator_distance.py models/all-minilm-l6-v2-Q8_0.gguf [--levels F16 Q4_K]

Each level is made from the file, and made float32 again: that is the reference, computed by
llama.cpp without flash attention. Prints the least and the median of 1 - cosine for each.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
from pathlib import Path

import numpy as np

from gguf_embed.engine import canaries
from gguf_embed.native import library
from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.model import Model
from gguf_embed.vectors import Pooling, Vectors

F32 = 0
LEVELS = {  # llama.cpp's numbers of file types
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q4_0": 2,
    "Q5_0": 8,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Distance to the same weights in float32.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exact, level, again = (
            Path(folder) / f"{name}.gguf" for name in ("exact", "level", "again")
        )
        convert(args.model, exact, F32)
        for name in args.levels:
            convert(exact, level, LEVELS[name])
            convert(level, again, F32)
            reference = vectors(again, flash_attn=False)
            theirs = distances(vectors(level), reference)
            ours = distances(vectors(level, accelerator=True), reference)
            print(
                f"{name}: llama.cpp {theirs.max():.1e} (median {np.median(theirs):.1e}), "
                f"accelerator {ours.max():.1e} (median {np.median(ours):.1e})",
                flush=True,
            )


def convert(source: Path, target: Path, level: int) -> None:
    native = library.bindings()
    params = native.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = level, True, 1
    failed = native.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    assert failed == 0, (source, level)


def vectors(path: Path, *, flash_attn: bool = True, accelerator: bool = False) -> Vectors:
    params = ContextParams(
        n_ctx=512,
        n_ubatch=512,
        n_seq_max=1,
        n_threads=1,
        pooling=Pooling.MEAN,
        flash_attn=flash_attn,
        accelerator=accelerator,
    )
    with Model(path, repack=False) as model, Context(model, params, encoder=True) as context:
        texts = [model.tokenize(text.encode())[:256] for text in canaries.ALL]
        made = np.concatenate([context.run([text]) for text in texts]).astype(np.float64)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def distances(a: Vectors, b: Vectors) -> Vectors:
    return 1 - (a * b).sum(axis=1)


if __name__ == "__main__":
    main()
