"""The names of quantizations: one table, one order of quality, one parser.

A *quantization* is what llama-quantize makes of a whole file ("Q4_K_M"): a mix of tensor types.
A *tensor type* is how ggml stores the numbers of one tensor ("Q4_K"). Whoever needs to know
something of either asks this file; no other file of the package lists such names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """One of ggml's types: how many elements a block has, and how many bytes."""

    number: int  # ggml.h, `enum ggml_type`
    name: str
    block: int
    block_bytes: int
    fallback: str | None  # what llama-quantize takes where the rows are not whole blocks
    needs_imatrix: bool  # llama-quantize makes no tensor of it without an importance matrix
    writable: bool  # ggml writes it well, also without an importance matrix
    tested: bool  # stands for a family of matrix kernels that published files use
    matrix: bool  # ggml multiplies with matrices of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Quant:
    """One quantization of a file, as llama-quantize names it."""

    name: str
    file_type: int  # llama.h, `enum llama_ftype`
    mostly: str  # the tensor type of most of its matrices
    percent: float | None  # what is left of F32's retrieval, where that is published
    usual: bool  # compared where the user names no quantizations
    repack_pays: bool  # whether ggml's repacked kernels usually beat its stock ones
    mix_known: bool  # whether layout.py knows the type of each tensor

    @property
    def exact(self) -> bool:
        """Whether its weights are floats: files to quantize from."""
        return self.mostly in EXACT

    @property
    def k_quant(self) -> bool:
        """Whether it is one of llama.cpp's K-quants, in super-blocks of 256."""
        return self.mostly.endswith("_K")

    @property
    def bits(self) -> float:
        """Bits per weight of most of its matrices."""
        main = TENSOR_TYPES[self.mostly]
        return 8 * main.block_bytes / main.block


def _tensor_type(
    number: int, name: str, block: int, block_bytes: int, fallback: str = "", flags: str = ""
) -> TensorType:
    return TensorType(
        number=number,
        name=name,
        block=block,
        block_bytes=block_bytes,
        fallback=fallback or None,
        needs_imatrix="imatrix" in flags,
        writable="writable" in flags,
        tested="tested" in flags,
        matrix="no matrix" not in flags,
    )


_TENSOR_TYPES: Final = (
    _tensor_type(0, "F32", 1, 4, flags="writable"),
    _tensor_type(1, "F16", 1, 2, flags="writable tested"),
    _tensor_type(2, "Q4_0", 32, 18, flags="writable tested"),
    _tensor_type(3, "Q4_1", 32, 20, flags="writable"),
    _tensor_type(6, "Q5_0", 32, 22, flags="writable"),
    _tensor_type(7, "Q5_1", 32, 24, flags="writable"),
    _tensor_type(8, "Q8_0", 32, 34, flags="writable tested"),
    _tensor_type(9, "Q8_1", 32, 36, flags="no matrix"),
    _tensor_type(10, "Q2_K", 256, 84, "Q4_0", "writable"),
    _tensor_type(11, "Q3_K", 256, 110, "Q4_0", "writable"),
    _tensor_type(12, "Q4_K", 256, 144, "Q5_0", "writable tested"),
    _tensor_type(13, "Q5_K", 256, 176, "Q5_1", "writable tested"),
    _tensor_type(14, "Q6_K", 256, 210, "Q8_0", "writable tested"),
    _tensor_type(15, "Q8_K", 256, 292, flags="no matrix"),
    _tensor_type(16, "IQ2_XXS", 256, 66, flags="imatrix"),
    _tensor_type(17, "IQ2_XS", 256, 74, flags="imatrix"),
    _tensor_type(18, "IQ3_XXS", 256, 98, flags="imatrix"),
    _tensor_type(19, "IQ1_S", 256, 50, flags="imatrix"),
    _tensor_type(20, "IQ4_NL", 32, 18, flags="writable"),
    _tensor_type(21, "IQ3_S", 256, 110),
    _tensor_type(22, "IQ2_S", 256, 82, flags="imatrix"),
    _tensor_type(23, "IQ4_XS", 256, 136, "IQ4_NL", "writable"),
    _tensor_type(24, "I8", 1, 1, flags="no matrix"),
    _tensor_type(25, "I16", 1, 2, flags="no matrix"),
    _tensor_type(26, "I32", 1, 4, flags="no matrix"),
    _tensor_type(27, "I64", 1, 8, flags="no matrix"),
    _tensor_type(28, "F64", 1, 8, flags="no matrix"),
    _tensor_type(29, "IQ1_M", 256, 56, flags="imatrix"),
    _tensor_type(30, "BF16", 1, 2, flags="writable"),
    _tensor_type(34, "TQ1_0", 256, 54),
    _tensor_type(35, "TQ2_0", 256, 66),
    _tensor_type(39, "MXFP4", 32, 17),
    _tensor_type(40, "NVFP4", 64, 36),
    _tensor_type(41, "Q1_0", 128, 18),
    _tensor_type(42, "Q2_0", 64, 18),
)
TENSOR_TYPES: Final[Mapping[str, TensorType]] = {kind.name: kind for kind in _TENSOR_TYPES}
TYPE_NAMES: Final[Mapping[int, str]] = {kind.number: kind.name for kind in _TENSOR_TYPES}
# name -> elements and bytes of one block
BLOCK: Final[Mapping[str, tuple[int, int]]] = {
    kind.name: (kind.block, kind.block_bytes) for kind in _TENSOR_TYPES
}
EXACT: Final[tuple[str, ...]] = (
    "F16",
    "BF16",
    "F32",
)  # floats, the cheapest first; types and files alike


def _quant(
    name: str, file_type: int, mostly: str = "", percent: float | None = None, flags: str = ""
) -> Quant:
    return Quant(
        name=name,
        file_type=file_type,
        mostly=mostly or name,
        percent=percent,
        usual="usual" in flags,
        repack_pays="repack" in flags,
        mix_known="mix" in flags,
    )


# Best quality first: this is the one order. BF16 and F32 give nothing over F16; the others follow
# by published figures, then by bits per weight. Figures: nDCG@10 of Qwen3-Embedding-0.6B, mean over
# SciFact, NFCorpus, ArguAna and SciDocs, the 5 and 4 bit files with a token table in Q4_0, the
# 3 bit one called "Q3_K". "repack": benchmarks/LOG.md; K-quants are slower so on CPUs with VNNI.
PERCENT_SOURCE: Final = "rosecky/embedding-quantization-public, 2026-09"
_QUANTS: Final = (
    _quant("F16", 1, percent=100.0, flags="usual mix repack"),
    _quant("BF16", 32, flags="mix"),
    _quant("F32", 0, percent=100.0, flags="mix"),
    _quant("Q8_0", 7, flags="usual mix repack"),
    _quant("Q6_K", 18, flags="usual mix"),
    _quant("Q5_K_M", 17, "Q5_K", 100.0, "usual mix"),
    _quant("Q5_K_S", 16, "Q5_K", flags="mix"),
    _quant("Q5_1", 9, flags="mix"),
    _quant("Q5_0", 8, flags="mix"),
    _quant("Q4_K_M", 15, "Q4_K", 99.7, "usual mix"),
    _quant("Q4_K_S", 14, "Q4_K", flags="mix"),
    _quant("Q4_1", 3, flags="mix"),
    _quant("IQ4_NL", 25, flags="mix repack"),
    _quant("IQ4_XS", 30, flags="mix"),
    _quant("Q4_0", 2, flags="usual mix repack"),
    _quant("NVFP4", 39),
    _quant("MXFP4_MOE", 38, "MXFP4"),
    _quant("Q3_K_L", 13, "Q3_K", flags="mix"),
    _quant("Q3_K_M", 12, "Q3_K", 95.2, "usual mix"),
    _quant("Q3_K_S", 11, "Q3_K", flags="mix"),
    _quant("IQ3_M", 27, "IQ3_S"),
    _quant("IQ3_S", 26),
    _quant("IQ3_XS", 22, "IQ3_S"),
    _quant("IQ3_XXS", 23),
    _quant("Q2_K", 10, flags="mix"),
    _quant("Q2_K_S", 21, "Q2_K"),
    _quant("IQ2_M", 29, "IQ2_S"),
    _quant("IQ2_S", 28, "IQ2_XS"),
    _quant("IQ2_XS", 20),
    _quant("Q2_0", 41),
    _quant("IQ2_XXS", 19),
    _quant("TQ2_0", 37),
    _quant("IQ1_M", 31),
    _quant("TQ1_0", 36),
    _quant("IQ1_S", 24),
    _quant("Q1_0", 40),
)
QUANTS: Final[Mapping[str, Quant]] = {quant.name: quant for quant in _QUANTS}
FILE_TYPES: Final[Mapping[int, str]] = {
    quant.file_type: quant.name for quant in sorted(_QUANTS, key=lambda quant: quant.file_type)
}
_RANK: Final[Mapping[str, int]] = {quant.name: rank for rank, quant in enumerate(_QUANTS)}
FLOOR: Final = "Q4_K_M"  # below it small models lose percents, not tenths
# As good as F16 by the figures above, whose model has vectors of 1,024 numbers, unless quality was
# measured. Of smaller models, which lose more, no figures are known to us.
SPEED_FLOOR: Final = "Q5_K_M"
SPEED_FLOOR_SMALL: Final = "Q8_0"
SPEED_FLOOR_DIM: Final = 1024
USUAL: Final = tuple(quant.name for quant in _QUANTS if quant.usual)
TESTED_TYPES: Final = tuple(kind.name for kind in _TENSOR_TYPES if kind.tested)
WRITABLE_TYPES: Final = tuple(kind.name for kind in _TENSOR_TYPES if kind.writable)
IMATRIX_TYPES: Final = frozenset(kind.name for kind in _TENSOR_TYPES if kind.needs_imatrix)

# What a quantization's name looks like in the name of a file or model, in any case of letters;
# also one that is newer than the table, or another maker's ("Q4_K_XL").
PATTERN: Final = (
    r"(?:[IT]?Q\d\w*(?:-(?:[01K]|NL|X{0,2}[SML])(?:-(?:XL|[SML]))?)?"
    r"|(?:MX|NV)FP4(?:-MOE|\w*)|BF16|FP?16|FP?32|B?FLOAT16|FLOAT32)"
)
# Other spellings, letters and digits only. The first four are llama-quantize's own.
_OTHER: Final[Mapping[str, str]] = {
    **{f"Q{bits}K": f"Q{bits}_K_M" for bits in (3, 4, 5)},
    "MXFP4": "MXFP4_MOE",
    **{f"{word}{bits}": f"F{bits}" for word in ("FP", "FLOAT") for bits in (16, 32)},
    "BFLOAT16": "BF16",
}
_SPELLINGS: Final[Mapping[str, str]] = {name.replace("_", ""): name for name in QUANTS} | _OTHER


def parse(text: str) -> str:
    """A quantization as llama.cpp spells it: "fp16" -> "F16", "q4-k-m" -> "Q4_K_M".

    A name that is not in the table is kept, in capitals: a file may have a newer one.
    """
    plain = text.strip().upper()
    return _SPELLINGS.get(re.sub(r"[\W_]", "", plain)) or plain.replace("-", "_")


def parse_type(text: str) -> str:
    """A tensor type as ggml spells it: "q4_k" stays a Q4_K, where `parse` says Q4_K_M."""
    plain = text.strip().upper().replace("-", "_")
    return plain if plain in TENSOR_TYPES else parse(text)


def rank(quant: str) -> int:
    """Position in the order of quality, 0 the best; what is not in the table comes last."""
    return _RANK.get(quant, len(_RANK))


def percent(quant: str) -> float | None:
    """What is left of F32's retrieval in percent, as PERCENT_SOURCE measured it; None: unknown."""
    return QUANTS[quant].percent if quant in QUANTS else None


def repack_pays(quant: str) -> bool:
    """Whether ggml's repacked kernels usually beat its stock ones for this quantization."""
    return quant in QUANTS and QUANTS[quant].repack_pays


def tolerance(weight_types: Iterable[str], *, same_kernels: bool = False) -> float:
    """The least cosine between two right vectors of one text, by the types of the weights.

    Other kernels, another microbatch or another machine round otherwise. Of weights in floats the
    least seen was 0.99999, of quantized ones 0.9994, whose kernels round activations to 8 bits;
    another machine may differ more than ten times as much. What is wrong gives far less: a lost
    end token or wrong pooling 0.6, a wrong kernel noise near 0. With `same_kernels`, and in the
    same company, only sums are in another order.
    """
    if same_kernels:
        return 0.9999
    return 0.999 if set(weight_types) <= set(EXACT) else 0.99
