"""What a plan considers: quantizations, each in one place, with its numbers and its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gguf_embed.machine.measured import LevelFigures
from gguf_embed.plan.memory import Memory
from gguf_embed.plan.settings import RunSettings

Tier: TypeAlias = Literal["gpu", "split", "cpu"]  # all layers on GPUs, some of them, none
Fit: TypeAlias = Literal["fits", "tight", "no"]  # leaves the margin free, a part of it, or does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What was considered; needed and free bytes are those of the scarcest memory."""

    quant: str
    tier: Tier
    where: str
    fit: Fit
    needed_bytes: int  # without margin
    free_bytes: int
    reason: str
    run: RunSettings
    memory: Mapping[str, Memory]  # by device, "CPU" for RAM
    measured: LevelFigures  # on this machine, with as many layers on GPUs
    expected_tokens_per_s: float | None = None  # on a CPU like this one, by a table

    @property
    def fits(self) -> bool:
        """Comfortably or not."""
        return self.fit != "no"

    @property
    def weights_bytes(self) -> int:
        """On all devices."""
        return sum(part.weights_bytes for part in self.memory.values())

    @property
    def tokens_per_s(self) -> float | None:
        """Measured here, else expected."""
        return self.measured.tokens_per_s or self.expected_tokens_per_s

    @property
    def known(self) -> str:
        """What was measured of it: "612 tokens/s, 99.7 % of F16's nDCG@10", or ""."""
        speed, quality = self.measured.tokens_per_s, self.measured.quality
        shown = [f"{speed:,.0f} tokens/s"] if speed is not None else []
        if quality is not None and quality.reference != self.quant:
            shown.append(str(quality))
        return ", ".join(shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Nothing fits: the row that came nearest, and a quantization that was not acceptable."""

    model: str
    nearest: Candidate
    lower: str | None
