"""ggml's quantizer: rows of a matrix, and whole files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import NativeFailed
from gguf_embed.gguf.quants import FILE_TYPES, TYPE_NAMES
from gguf_embed.native.library import bindings, forget_reason, ggml, listening, reason


def quantize_rows(values: npt.NDArray[np.float32], weight_type: str) -> tuple[int, bytes]:
    """ggml's type number and the bytes of a float32 matrix, shape (rows, row length), in that type.

    Raises NativeFailed for a type that ggml does not know or cannot write.
    """
    number = next((n for n, name in TYPE_NAMES.items() if name == weight_type), None)
    n_rows, n_row = values.shape
    if number is None or n_row % ggml("ggml_blck_size", ctypes.c_int64, ctypes.c_int)(number):
        raise NativeFailed(f"ggml cannot write rows of {n_row} values as {weight_type}")
    if weight_type == "F32":
        return number, values.tobytes()
    row_size = ggml("ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)(number, n_row)
    target = np.empty(n_rows * row_size, np.uint8)
    source = np.ascontiguousarray(values)
    importance = np.ones(n_row, np.float32)  # the smallest types refuse to work without
    pointer = ctypes.c_void_p
    quantize = ggml(
        "ggml_quantize_chunk",
        ctypes.c_size_t,
        ctypes.c_int,
        pointer,
        pointer,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        pointer,
    )
    quantize(
        number, source.ctypes.data, target.ctypes.data, 0, n_rows, n_row, importance.ctypes.data
    )
    return number, target.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeParams:
    """How to quantize; `level` is one of quants.FILE_TYPES, tensor types are those of TYPE_NAMES.

    `imatrix` holds the importance of each value of a tensor's rows, float32, by tensor name;
    `metadata` is put into the new file. A `dry_run` decides and logs, and writes nothing.
    """

    level: str
    token_embedding_type: str | None
    output_type: str | None
    pure: bool  # every matrix in the level's main type
    allow_requantize: bool
    dry_run: bool
    n_threads: int
    imatrix: Mapping[str, npt.NDArray[np.float32]]
    metadata: Mapping[str, str | int]


def quantize(
    source: Path, target: Path, params: QuantizeParams, on_line: Callable[[str], None]
) -> None:
    """Write `source` as `target` in another quantization; llama.cpp's log goes to `on_line`.

    Runs to its end, whatever signal comes. Raises NativeFailed with llama.cpp's reason.
    """
    native = bindings()
    level_numbers = {name: number for number, name in FILE_TYPES.items()}
    type_numbers = {name: number for number, name in TYPE_NAMES.items()}
    wanted = native.llama_model_quantize_default_params()
    wanted.nthread = params.n_threads
    wanted.ftype = level_numbers[params.level]
    if params.token_embedding_type is not None:
        wanted.token_embedding_type = type_numbers[params.token_embedding_type]
    if params.output_type is not None:
        wanted.output_tensor_type = type_numbers[params.output_type]
    wanted.pure = params.pure
    wanted.allow_requantize = params.allow_requantize
    wanted.dry_run = params.dry_run
    # Both arrays end with an empty entry; the values stay referred to until the call is over.
    values = {name: np.ascontiguousarray(v, np.float32) for name, v in params.imatrix.items()}
    imatrix = (native.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, array) in zip(imatrix, values.items(), strict=False):
        entry.name, entry.size = name.encode(), array.size
        entry.data = ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_float))
    if values:
        wanted.imatrix = imatrix
    overrides = (native.llama_model_kv_override * (len(params.metadata) + 1))()
    for override, (key, value) in zip(overrides, params.metadata.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, str):
            override.tag = native.LLAMA_KV_OVERRIDE_TYPE_STR
            # The field has 128 bytes, one for the end; a cut must not leave half a character.
            override.value.val_str = value.encode()[:127].decode(errors="ignore").encode()
        else:
            override.tag = native.LLAMA_KV_OVERRIDE_TYPE_INT
            override.value.val_i64 = value
    wanted.kv_overrides = overrides

    rest, failures = "", list[BaseException]()

    def listen(piece: str) -> None:
        nonlocal rest
        *lines, rest = (rest + piece).split("\n")
        try:
            for line in lines:
                on_line(line)
        except BaseException as error:  # an exception must not unwind through C
            failures.append(error)

    forget_reason()
    with listening(listen):
        status = native.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(wanted)
        )
    if failures:
        raise failures[0]
    if status != 0:
        cause = reason().rpartition("failed to quantize: ")[2]
        raise NativeFailed(f"{source}: llama.cpp cannot quantize it to {params.level}: {cause}")
