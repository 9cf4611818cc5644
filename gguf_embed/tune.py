"""Which settings run a model fastest on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gguf_embed import hardware
from gguf_embed.gguf import Header
from gguf_embed.runner import Meaning, RunSettings
from gguf_embed.selftest import Working

# ggml's repacked kernels beat the stock ones for these types; for K-quants it is the reverse on
# CPUs with VNNI (benchmarks/LOG.md).
_REPACK_PAYS = frozenset({"Q4_0", "Q8_0", "IQ4_NL", "F16"})


def untuned(header: Header, meaning: Meaning, working: Working, n_cores: int) -> RunSettings:
    """The settings that a measurement starts from.

    An encoder attends over the whole microbatch and is small: little batches, a context per core.
    """
    encoder = meaning.encoder
    return RunSettings(
        max_batch_tokens=256 if encoder else 512,
        max_batch_seqs=64,
        n_contexts=n_cores if encoder else 1,
        n_threads=1 if encoder else n_cores,
        flash_attn=working.flash,
        repack=working.repack and header.quant in _REPACK_PAYS,
        tap=not encoder,
    )


def choose(
    header: Header, meaning: Meaning, working: Working, wanted: Mapping[str, Any]
) -> RunSettings:
    """Settings for a model: what the caller wants, else what was measured, else the defaults."""
    n_cores = int(wanted.get("n_threads") or hardware.probe().usable_cores)
    settings = untuned(header, meaning, working, n_cores)
    if "n_threads" in wanted and "n_contexts" not in wanted:
        # The caller gives a number of cores; how they are shared out is ours to choose.
        wanted = {k: v for k, v in wanted.items() if k != "n_threads"}
    settings = replace(settings, **wanted)
    return replace(settings, repack=settings.repack and working.repack)
