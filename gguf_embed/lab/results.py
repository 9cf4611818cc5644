"""What a bench found: costs and quality of each level, and under which circumstances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf_embed.lab.levels import Level
from gguf_embed.lab.quality import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What running a level takes. Medians over the rounds; memory is the highest of them."""

    tokens_per_s: float
    tokens_per_s_rounds: tuple[float, ...]
    latency_s: float  # median of single texts, over all rounds
    load_s: float  # from the file to a model that is ready, settings known
    peak_bytes: int  # of RAM, the whole process
    python_bytes: int  # of these, before the model is opened
    gpu_bytes: int | None  # None: no GPU
    n_texts: int  # embedded in a round
    n_tokens: int
    n_gpu_layers: int
    settings: Mapping[str, Any] | None  # as tuned; None: not tuned

    @property
    def spread(self) -> float:
        """Half the range of the rounds, as a share of their median."""
        rounds = self.tokens_per_s_rounds
        return (max(rounds) - min(rounds)) / 2 / self.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that is known of one level; a level that failed has the reason instead."""

    level: Level
    costs: Costs | None = None
    quality: Quality | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `run` found. `results` are in order of size, the reference first."""

    model: str
    reference: str
    dim: int
    trained_dims: bool  # whether the model was made for shorter vectors
    task: str
    task_sha256: str
    n_passages: int
    n_queries: int
    has_qrels: bool
    rounds: int
    results: tuple[Result, ...]
    remarks: tuple[str, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
