"""TEMPORARY until gguf/quants is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# Quantizations, best quality first, with what is left of F32's retrieval in percent where that is
# published: nDCG@10 of Qwen3-Embedding-0.6B, mean over SciFact, NFCorpus, ArguAna and SciDocs, the
# 5 and 4 bit files with a token table in Q4_0, the 3 bit one called "Q3_K". The others are in the
# order of their bits per weight. BF16 and F32 give nothing over F16.
QUALITY_SOURCE: Final = "rosecky/embedding-quantization-public, 2026-09"
QUALITY: Final[Mapping[str, float | None]] = {
    "F16": 100.0,
    "BF16": None,
    "F32": 100.0,
    "Q8_0": None,
    "Q6_K": None,
    "Q5_K_M": 100.0,
    "Q5_K_S": None,
    "Q5_1": None,
    "Q5_0": None,
    "Q4_K_M": 99.7,
    "Q4_K_S": None,
    "Q4_1": None,
    "IQ4_NL": None,
    "IQ4_XS": None,
    "Q4_0": None,
    "Q3_K_L": None,
    "Q3_K_M": 95.2,
    "Q3_K_S": None,
    "Q2_K": None,
}
_RANK: Final = {quant: rank for rank, quant in enumerate(QUALITY)}
FLOOR: Final = "Q4_K_M"  # below it small models lose percents, not tenths
SPEED_FLOOR: Final = "Q5_K_M"  # with `prefer="speed"`, unless quality was measured
# ggml's repacked kernels beat the stock ones for these types; for K-quants it is the reverse on
# CPUs with VNNI (benchmarks/LOG.md).
REPACK_PAYS = frozenset({"Q4_0", "Q8_0", "IQ4_NL", "F16"})


def quality_rank(quant: str) -> int:
    """Position in QUALITY, 0 the best; quantizations that are not in it come last."""
    return _RANK.get(quant, len(QUALITY))
