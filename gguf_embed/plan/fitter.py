"""What of a variant fits on a machine, and how: one candidate for each place it could run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from gguf_embed.gguf import quants
from gguf_embed.machine.machine import Machine
from gguf_embed.machine.measured import LevelFigures
from gguf_embed.plan import reasons, speed
from gguf_embed.plan.candidate import Candidate, Fit, Tier
from gguf_embed.plan.contexts import splits
from gguf_embed.plan.memory import HOST, MIB, Memory, Pool, gpus_of, places_of_layers, predict
from gguf_embed.plan.settings import BATCH_SEQS, BATCH_TOKENS, N_CTX_LEAST, RunSettings, Settings
from gguf_embed.plan.variants import Variant
from gguf_embed.vectors import Pooling

# What stays free: llama.cpp's own default per device (common/common.h, fit_params_target), on small
# devices an eighth of what is free. A tight plan leaves at least a quarter of that.
MARGIN_BYTES: Final = 1024 * MIB
MARGIN_SHARE: Final = 8
TIGHT_SHARE: Final = 4
# A context that a plan must have memory for before it counts as one that fits. Where a text is one
# microbatch (encoders, pooled paths) llama.cpp's buffers grow with n_ctx x vocabulary, so less is
# asked.
N_CTX: Final = 8192
N_CTX_WHOLE: Final = 2048
BATCH_TOKENS_TIGHT: Final = 128
BATCH_TOKENS_ENCODER: Final = 256  # what encoders on a CPU are fastest with, on most machines


@dataclass(frozen=True, slots=True)
class Fitter:
    """A machine, and what the user said of how to use it."""

    machine: Machine
    settings: Settings
    figures: Mapping[str, LevelFigures]  # by quantization

    def candidate(self, variant: Variant, tier: Tier) -> Candidate:
        """The variant on one tier, with the most that memory allows."""
        counts = self._layer_counts(variant, tier)
        for count in counts:
            for run in self._comfortable(variant, tier):
                run = replace(run, n_gpu_layers=count)
                if self.spare_bytes(variant, run) >= 0:
                    return self._row(variant, self._grown(variant, run), tier, "fits")
        # Where layers may move to the CPU instead, nothing needs to be tight.
        count, search = counts[-1], tier != "split" or len(counts) == 1
        cramped = [replace(run, n_gpu_layers=count) for run in self._cramped(variant, tier)]
        for run in cramped if search else ():
            if self.spare_bytes(variant, run, TIGHT_SHARE) >= 0:
                return self._row(variant, run, tier, "tight")
        return self._row(variant, cramped[-1], tier, "no")

    def spare_bytes(self, variant: Variant, run: RunSettings, share: int = 1) -> int:
        """Bytes left in the scarcest memory beyond 1/share of the margin; below 0: too much."""
        pools = self._pools(predict(variant, self.machine, run))
        return min(pool.spare_bytes(share) for pool in pools)

    def _layer_counts(self, variant: Variant, tier: Tier) -> Sequence[int]:
        """Values of n_gpu_layers to try, the best first."""
        n_layer = variant.shape.n_layer
        if tier != "split":
            return (n_layer + 1,) if tier == "gpu" else (0,)
        if self.settings.n_gpu_layers:
            return (self.settings.n_gpu_layers,)
        return range(n_layer, max(1, n_layer // 4) - 1, -1)  # fewer are not worth the copying

    def _comfortable(self, variant: Variant, tier: Tier) -> Iterator[RunSettings]:
        """Runs without a compromise, the best first."""
        n_ctx = self._n_ctx_wanted(variant, tier)
        if tier != "cpu" or not variant.mode.encoder:
            yield self._run(variant, tier, n_ctx, BATCH_TOKENS)
            return
        # Small models are fastest with a context per core, each with buffers of its own.
        asked = self.settings.n_contexts
        n_contexts = asked or self.machine.usable_cores
        while n_contexts:
            yield self._run(variant, tier, n_ctx, BATCH_TOKENS, n_contexts)
            n_contexts = 0 if asked else n_contexts // 2

    def _cramped(self, variant: Variant, tier: Tier) -> Iterator[RunSettings]:
        """Runs for tight memory, the longest context first."""
        n_ctx = self._n_ctx_wanted(variant, tier)
        yield self._run(variant, tier, n_ctx, BATCH_TOKENS_TIGHT)
        while self.settings.n_ctx is None and n_ctx > N_CTX_LEAST:
            n_ctx = max(n_ctx // 2, N_CTX_LEAST)
            yield self._run(variant, tier, n_ctx, BATCH_TOKENS_TIGHT)

    def _n_ctx_wanted(self, variant: Variant, tier: Tier) -> int:
        if self.settings.n_ctx is not None:
            return self.settings.n_ctx
        split = splits(self._run(variant, tier, N_CTX, BATCH_TOKENS), variant.mode)
        return min(N_CTX if split else N_CTX_WHOLE, variant.shape.n_ctx_train)

    def _run(
        self, variant: Variant, tier: Tier, n_ctx: int, n_tokens: int, n_contexts: int = 1
    ) -> RunSettings:
        """What the user said, and for the rest what is right everywhere."""
        asked, mode = self.settings, variant.mode
        size = asked.max_batch_tokens or n_tokens
        on_cpu = mode.encoder and tier == "cpu" and not asked.max_batch_tokens
        n_contexts = asked.n_contexts or n_contexts
        n_threads = max(1, self.machine.usable_cores // n_contexts)
        if asked.n_contexts and asked.n_threads:
            n_threads = asked.n_threads
        repack = quants.repack_pays(variant.quant) if asked.repack is None else asked.repack
        tap = asked.tap is not False and not mode.encoder and mode.pooling is not Pooling.RANK
        return RunSettings(
            n_ctx=n_ctx,
            max_batch_tokens=size,
            batch_tokens=min(BATCH_TOKENS_ENCODER, size) if on_cpu else size,
            max_batch_seqs=asked.max_batch_seqs or BATCH_SEQS,
            n_contexts=n_contexts,
            n_threads=n_threads,
            flash_attn=asked.flash_attn is not False,
            repack=repack,
            tap=tap,
        )

    def _grown(self, variant: Variant, run: RunSettings) -> RunSettings:
        """The longest context that leaves the margin free, by doubling; none to save memory."""
        longest = variant.shape.n_ctx_train
        if self.settings.n_ctx or self.settings.prefer == "memory":
            return run
        while run.n_ctx < longest:
            longer = replace(run, n_ctx=min(2 * run.n_ctx, longest))
            if self.spare_bytes(variant, longer) < 0:
                break
            run = longer
        return run

    def _pools(self, memory: Mapping[str, Memory]) -> list[Pool]:
        """Each GPU that is used, then RAM, which holds what is on GPUs without their own memory."""
        machine, gpus = self.machine, gpus_of(self.machine)
        in_ram = [gpu.name for gpu in gpus if machine.unified_memory or gpu.kind == "igpu"]
        ram_bytes = sum(memory[name].used_bytes for name in (HOST, *in_ram))
        sizes = [(gpu.name, memory[gpu.name].used_bytes, gpu.free_bytes) for gpu in gpus]
        sizes.append(("+".join(("RAM", *in_ram)), ram_bytes, machine.ram_available_bytes))
        pools: list[Pool] = []
        for name, used_bytes, free_bytes in sizes:
            margin_bytes = self.settings.margin_bytes
            if margin_bytes is None:
                margin_bytes = min(MARGIN_BYTES, free_bytes // MARGIN_SHARE)
            if self.settings.memory_bytes is not None:
                # What the user keeps for others counts as left free.
                kept_bytes = max(0, free_bytes - self.settings.memory_bytes)
                free_bytes -= kept_bytes
                margin_bytes = max(0, margin_bytes - kept_bytes)
            if used_bytes:  # a GPU that nothing is put on has no say, full as it may be
                pools.append(
                    Pool(
                        name=name,
                        used_bytes=used_bytes,
                        free_bytes=free_bytes,
                        margin_bytes=margin_bytes,
                    )
                )
        return pools

    def _row(self, variant: Variant, run: RunSettings, tier: Tier, fit: Fit) -> Candidate:
        """The candidate with its numbers and its reason."""
        memory = predict(variant, self.machine, run)
        pools = self._pools(memory)
        pool = min(pools, key=Pool.spare_bytes)
        margins = {pool.name: pool.margin_bytes for pool in pools} | {HOST: pools[-1].margin_bytes}
        return Candidate(
            quant=variant.quant,
            tier=tier,
            where=_where(variant, self.machine, run),
            fit=fit,
            needed_bytes=pool.used_bytes,
            free_bytes=pool.free_bytes,
            reason=self._reason(variant, run, pool, fit),
            run=run,
            memory={
                name: replace(part, margin_bytes=margins.get(name, 0))
                for name, part in memory.items()
            },
            measured=self._figures(variant, run),
            expected_tokens_per_s=(
                speed.expected_tokens_per_s(variant, self.machine) if tier == "cpu" else None
            ),
        )

    def _reason(self, variant: Variant, run: RunSettings, pool: Pool, fit: Fit) -> str:
        below_floor = quants.rank(variant.quant) > quants.rank(quants.FLOOR)
        unasked = below_floor and not self.settings.quant and not variant.on_disk
        return reasons.of_fit(fit, run, pool) + (reasons.BELOW_FLOOR if unasked else "")

    def _figures(self, variant: Variant, run: RunSettings) -> LevelFigures:
        """What was measured of the variant; its speed only with as many layers on GPUs."""
        known = self.figures.get(variant.quant, LevelFigures())
        n_places = variant.shape.n_layer + 1
        measured, planned = (
            n_places if n < 0 else min(n, n_places) for n in (known.n_gpu_layers, run.n_gpu_layers)
        )
        return known if measured == planned else replace(known, tokens_per_s=None)


def _where(variant: Variant, machine: Machine, run: RunSettings) -> str:
    """ "CUDA0", "CUDA0 20/37 + CPU" (layers, the output counted), "CPU"."""
    places = places_of_layers(variant.shape.n_layer, run.n_gpu_layers, gpus_of(machine))
    names = "+".join(dict.fromkeys(place for place in places if place != HOST))
    if not names:
        return HOST
    n_on_gpu = sum(place != HOST for place in places)
    return names if n_on_gpu == len(places) else f"{names} {n_on_gpu}/{len(places)} + {HOST}"
