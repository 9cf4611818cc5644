"""How fast a quantization runs on a kind of CPU, where nothing was measured on the machine itself.

Rates are those of one core, in thousand million multiplications of weights a second, with texts of
about a hundred tokens. Each family names the machine that its figures come from: one of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gguf_embed.machine.machine import Machine
from gguf_embed.plan.variants import Variant

TEXT_TOKENS: Final = 128  # of "a text", where speeds are told in texts
SLOW_TEXTS_PER_S: Final = 1.0  # fewer are named as slow, and a smaller model is proposed
LEAST_DIM: Final = 1024  # of models that the table is about
NEAR: Final = 0.9  # of the fastest: as fast, as far as a table can tell


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFamily:
    """CPUs whose matrix kernels are alike."""

    name: str
    source: str  # the machine and what ran on it
    rates: Mapping[str, float]  # GMAC/s of one core, by quantization


# With Q8_0, F16 and Q4_K_M a whole model was timed. The others have kernels as fast as Q8_0's.
AMX: Final = CpuFamily(
    name="AMX with our kernels",
    source="Xeon (Emerald Rapids), 0.6B shape, 2 cores",
    rates={"F16": 120} | dict.fromkeys(("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"), 130),
)
VNNI: Final = CpuFamily(
    name="AVX-512 VNNI with our kernels",
    source="Xeon (Emerald Rapids), AMX not in use, 0.6B shape, 2 cores",
    rates={"F16": 88} | dict.fromkeys(("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"), 95),
)
VNNI_GGML: Final = CpuFamily(
    name="VNNI",
    source="Xeon without AMX in use, 0.6B shape, 2 cores, llama.cpp's kernels",
    rates={"F16": 40, "Q8_0": 40, "Q6_K": 76, "Q5_K_M": 80, "Q4_K_M": 81, "Q4_0": 53},
)
AVX2: Final = CpuFamily(
    name="AVX2 with our kernels",
    source="EPYC Zen 3, 0.6B shape, one core",
    rates={"F16": 58, "Q8_0": 58, "Q4_K_M": 57},
)
AVX2_GGML: Final = CpuFamily(
    name="AVX2",
    source="EPYC Zen 3, 0.6B shape, one core, llama.cpp's kernels",
    rates={"F16": 29, "Q8_0": 24, "Q4_K_M": 27},
)


FAMILIES: Final = (AMX, VNNI, VNNI_GGML, AVX2, AVX2_GGML)


def family_of(machine: Machine) -> CpuFamily | None:
    """The family of its CPU; None where none like it was measured."""
    features = {*machine.cpu_features}
    if not {"avx2", "fma"} <= features:
        return None
    if machine.os in ("linux", "wsl"):
        if "amx_int8" in features:
            return AMX
        return VNNI if "avx512_vnni" in features else AVX2
    return VNNI_GGML if features & {"avx512_vnni", "avx_vnni"} else AVX2_GGML


def expected_tokens_per_s(variant: Variant, machine: Machine) -> float | None:
    """On all usable cores of the CPU, by the table; None where that does not tell.

    Nor does it of small models, which spend as much time outside of their products.
    """
    family = family_of(machine)
    rate = family.rates.get(variant.quant) if family is not None else None
    if rate is None or variant.shape.n_embd < LEAST_DIM:
        return None
    return 1e9 * rate * machine.usable_cores / macs_per_token(variant)


def macs_per_token(variant: Variant) -> int:
    """Multiplications with weights for one token, attention and the head left out."""
    shape = variant.shape
    n_query, n_key = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    attention = shape.n_embd * (2 * n_query + 2 * n_key)
    feed_forward = shape.n_embd * shape.n_ff * (3 if variant.gated else 2)
    return shape.n_layer * (attention + feed_forward)


def in_words(tokens_per_s: float) -> str:
    """ "13 tokens/s, 0.1 texts/s"."""
    texts = tokens_per_s / TEXT_TOKENS
    return f"{tokens_per_s:,.0f} tokens/s, {texts:,.{0 if texts >= 10 else 1}f} texts/s"


def is_slow(tokens_per_s: float | None) -> bool:
    """Whether it is known to be."""
    return tokens_per_s is not None and tokens_per_s < SLOW_TEXTS_PER_S * TEXT_TOKENS
