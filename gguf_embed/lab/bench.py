"""What each quantization level of a model gives and takes, on this machine and on these texts.

    subject = find_subject(["model-F16.gguf"])
    levels = make_levels(subject, ["Q8_0", "Q4_K_M"], scratch, say)
    report = run(subject, levels, task, BenchOptions(), scratch=scratch, say=say)

Each level is opened and tuned. Rounds of speed follow, interleaved, then the vectors of each
level, which are compared with the reference's. The figures of the levels are kept for `plan`.

A level is never in this process: each turn is a child (`worker`). So its memory is its own, a
crash costs one level, and at most one level is in memory.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gguf_embed import __version__
from gguf_embed.errors import NativeFailed, duration
from gguf_embed.lab import ROUNDS, worker
from gguf_embed.lab.estimate import forecast_s
from gguf_embed.lab.levels import Level, Status, Subject
from gguf_embed.lab.parallel import parallel_sentences
from gguf_embed.lab.quality import LevelVectors, Quality, QualityMeter, dims_of
from gguf_embed.lab.results import Costs, Report, Result
from gguf_embed.lab.tasks import Task
from gguf_embed.machine import measured
from gguf_embed.machine import probe as hardware
from gguf_embed.machine.load import Load, LoadMeter
from gguf_embed.machine.machine import machine_to_json
from gguf_embed.machine.measured import LevelFigures, LevelQuality, MeasuredRun
from gguf_embed.native import library
from gguf_embed.plan.settings import Settings
from gguf_embed.store.local import mib

ROUND_S = 4.0  # the slowest level embeds for about so long in a round
MIN_TEXTS = 8  # but never less than that
N_LATENCIES = 24  # single texts per round, unless that takes longer than ROUND_S
UNSTEADY = 0.15  # spread of rounds from which they are not


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How to measure."""

    rounds: int = ROUNDS
    quality: bool = True
    matching: bool | None = None  # translations too; None: unless the model is English only
    settings: Settings = field(default_factory=Settings)


def run(
    subject: Subject,
    levels: Sequence[Level],
    task: Task,
    options: BenchOptions,
    *,
    scratch: Path,
    say: Status,
) -> Report:
    """Measure the levels, the first of which is the reference, and compare; keep it for `plan`.

    Raises NativeFailed where the reference fails; any other level that fails is reported so.
    """
    began = time.monotonic()
    machine = hardware.probe()
    n_cores = options.settings.n_threads or machine.usable_cores
    meter = LoadMeter(n_cores)
    bench = _Bench(subject, levels[0].name, task, options, scratch, say)
    about = bench.open_all(levels)
    costs = bench.rounds(about)
    load = meter.end()
    remarks = [*task.remarks, *busy_remarks(load), *unsteady_remarks(costs)]
    quality: dict[str, Quality] = {}
    if options.quality:
        quality = bench.qualities(levels, about)
        if not task.queries:
            remarks.append("no queries: each text is the query, and single texts give the latency")
    else:
        remarks.append("no quality figures: they were not asked for (--no-quality)")
    results = tuple(
        Result(
            level=level,
            costs=costs.get(level.name),
            quality=quality.get(level.name),
            failure=bench.failures.get(level.name),
        )
        for level in levels
    )
    reference, card = levels[0].name, subject.card
    found = Report(
        model=subject.name,
        reference=reference,
        dim=int(about[reference]["dim"]),
        trained_dims=card is not None and bool(card.mrl_dims or card.mrl_min),
        task=task.name,
        task_sha256=task.sha256,
        n_passages=len(task.passages),
        n_queries=len(task.queries),
        has_qrels=task.qrels is not None,
        rounds=options.rounds,
        results=results,
        remarks=tuple(remarks),
        machine=json.loads(machine_to_json(machine)),
        versions={
            "gguf_embed": __version__,
            "llama_cpp_python": library.version(),
            "python": platform.python_version(),
        },
        seconds=time.monotonic() - began,
    )
    shape = str(about[reference]["shape"])
    measured.keep(replace(measured_run(found, shape), load=load), n_cores)
    return found


def measured_run(report: Report, shape: str) -> MeasuredRun:
    """The report in the few figures that choose a level."""
    texts = f"{report.n_passages:,} passages of {report.task}"

    def figures(costs: Costs, quality: Quality | None) -> LevelFigures:
        judged = quality and LevelQuality(
            reference=report.reference,
            texts=texts,
            cosine=quality.cosine.mean,
            overlap=quality.overlap,
            ndcg=quality.ndcg,
            loss=quality.loss,
            as_good=quality.as_good,
        )
        return LevelFigures(
            tokens_per_s=costs.tokens_per_s, n_gpu_layers=costs.n_gpu_layers, quality=judged
        )

    return MeasuredRun(
        model=report.model,
        shape=shape,
        by="bench",
        texts_sha256=report.task_sha256,
        day=measured.today(),
        levels={r.level.name: figures(r.costs, r.quality) for r in report.results if r.costs},
    )


def busy_remarks(load: Load | None) -> list[str]:
    """A warning where the machine did other work meanwhile."""
    if load is None or load.quiet:
        return []
    return [
        f"{load}: speeds are too low and uncertain, and `plan` does not go by them; quality is not "
        "affected"
    ]


def unsteady_remarks(costs: Mapping[str, Costs]) -> list[str]:
    """A warning where the rounds of a level differ more than they do on a quiet machine."""
    name, worst = max(costs.items(), key=lambda one: one[1].spread)
    if worst.spread < UNSTEADY:
        return []
    return [
        f"rounds of {name} are up to {100 * worst.spread:.0f} % off their median: something else "
        "was running; measure again on a quiet machine, or with more rounds"
    ]


class _Bench:
    """The turns of all levels; what fails is taken out and its reason kept."""

    def __init__(
        self,
        subject: Subject,
        reference: str,
        task: Task,
        options: BenchOptions,
        scratch: Path,
        say: Status,
    ) -> None:
        self.subject = subject
        self.reference = reference
        self.task = task
        self.options = options
        self.scratch = scratch
        self.say = say
        self.failures: dict[str, str] = {}
        matching = options.matching
        if matching is None:
            matching = subject.card is None or subject.card.languages != "English"
        self.n_parallel = len(parallel_sentences().texts) if matching else 0
        # Distinct texts in an order that favours none: any first part of them is a sample.
        self.passages = _shuffled(task.passages)
        self.singles = _shuffled(task.queries or task.passages)

    def open_all(self, levels: Sequence[Level]) -> dict[str, dict[str, Any]]:
        """Open and tune each level, and find out roughly how fast it is."""
        about: dict[str, dict[str, Any]] = {}
        for n_done, level in enumerate(levels):
            self.say(f"opening {level.name}, {mib(level.n_bytes)} ({n_done + 1} of {len(levels)})")
            began = time.monotonic()
            answer = self._turn(level, "open", passages=self.passages[: max(worker.TRIAL_TEXTS)])
            if answer is not None:
                about[level.name] = {**answer, "level": level}
            if n_done == 0:
                # The reference opened, or there is no going on.
                to_open = (len(levels) - 1) * (time.monotonic() - began)
                speeds = [float(about[level.name]["texts_per_s"])] * len(levels)
                self.say(
                    f"this will take about {duration(to_open + self._seconds(speeds))}; shorter: "
                    "fewer --quants, a lower --limit, --rounds 1, --no-quality"
                )
        return about

    def _seconds(self, texts_per_s: Sequence[float], n_rounds: int | None = None) -> float:
        """What rounds (None: all) and the vectors of levels so fast will take, roughly."""
        rounds = self.options.rounds if n_rounds is None else n_rounds
        n_singles = min(N_LATENCIES, len(self.singles))
        n_vectors = len(self.task.passages) + len(self.task.queries) + self.n_parallel
        return forecast_s(
            texts_per_s,
            n_in_round=self._n_texts(texts_per_s) + n_singles,
            n_rounds=rounds,
            n_vectors=n_vectors if self.options.quality else 0,
        )

    def _n_texts(self, texts_per_s: Sequence[float]) -> int:
        """Texts that each level embeds in a round."""
        return min(max(round(ROUND_S * min(texts_per_s)), MIN_TEXTS), len(self.passages))

    def rounds(self, about: Mapping[str, dict[str, Any]]) -> dict[str, Costs]:
        """Costs by level. Rounds go to and fro, so that a slow drift of the machine cancels out."""
        speeds = [float(one["texts_per_s"]) for one in about.values()]
        n_texts = self._n_texts(speeds)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in about}
        for number in range(self.options.rounds):
            n_left = self.options.rounds - number
            self.say(
                f"speed: round {number + 1} of {self.options.rounds}, {n_texts} texts per level, "
                f"about {duration(self._seconds(speeds, n_left))} left"
            )
            order = [*about] if number % 2 == 0 else [*about][::-1]
            # Other single texts in each round: a cache must not look like speed.
            first = number * N_LATENCIES % max(len(self.singles) - N_LATENCIES, 1)
            singles = self.singles[first : first + N_LATENCIES]
            for name in order:
                if name not in self.failures:
                    answer = self._turn(
                        about[name]["level"],
                        "speed",
                        passages=self.passages[:n_texts],
                        queries=singles,
                    )
                    if answer is not None:
                        answers[name].append(answer)
        return {
            name: _costs(of_one, about[name]["settings"])
            for name, of_one in answers.items()
            if name not in self.failures
        }

    def qualities(
        self, levels: Sequence[Level], about: Mapping[str, dict[str, Any]]
    ) -> dict[str, Quality]:
        """Quality by level, the reference's own included."""
        card = self.subject.card
        parallel = parallel_sentences().texts if self.n_parallel else ()
        n_texts = len(self.task.passages) + len(self.task.queries)
        found: dict[str, Quality] = {}
        meter: QualityMeter | None = None
        for level in levels:
            if level.name in self.failures:
                continue
            self.say(f"quality: vectors of {n_texts:,} texts in {level.name}")
            target = self.scratch / f"vectors-{len(found)}.npz"
            answer = self._turn(
                level,
                "vectors",
                passages=self.task.passages,
                queries=self.task.queries,
                parallel=parallel,
                target=str(target),
            )
            if answer is None:
                continue
            with np.load(target) as arrays:
                vectors = LevelVectors(**{name: arrays[name] for name in arrays.files})
            target.unlink()
            if meter is None:
                meter = QualityMeter(
                    self.task, vectors, dims_of(card, int(about[level.name]["dim"]))
                )
            found[level.name] = meter.quality(vectors, n_truncated=int(answer["n_truncated"]))
        return found

    def _turn(self, level: Level, do: str, **wanted: Any) -> dict[str, Any] | None:
        """One child's answer; None where it failed, which takes the level out."""
        settings = {k: v for k, v in asdict(self.options.settings).items() if v is not None}
        job = {
            "do": do,
            "path": str(level.path.absolute()),
            "card": self.subject.card and self.subject.card.id,
            "settings": settings,
            **wanted,
        }
        try:
            return worker.turn(job, self.say)
        except worker.TurnFailed as failure:
            if level.name == self.reference:
                raise NativeFailed(
                    f"{level.name}, the level to compare with, fails: {failure}"
                ) from failure
            self.failures[level.name] = str(failure)
            self.say(f"{level.name} fails and is left out: {failure}")
            return None


def _shuffled(texts: Sequence[str]) -> list[str]:
    unique = list(dict.fromkeys(texts))
    return [unique[i] for i in np.random.default_rng(0).permutation(len(unique))]


def _costs(answers: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None) -> Costs:
    speeds = tuple(float(one["n_tokens"] / one["seconds"]) for one in answers)
    gpu = [one["gpu_bytes"] for one in answers if one["gpu_bytes"] is not None]
    return Costs(
        tokens_per_s=median(speeds),
        tokens_per_s_rounds=speeds,
        latency_s=median(second for one in answers for second in one["latencies"]),
        load_s=median(one["load_s"] for one in answers),
        peak_bytes=max(one["peak_bytes"] for one in answers),
        python_bytes=min(one["python_bytes"] for one in answers),
        gpu_bytes=max(gpu, default=None),
        n_texts=answers[0]["n_texts"],
        n_tokens=answers[0]["n_tokens"],
        n_gpu_layers=answers[0]["n_gpu_layers"],
        settings=settings,
    )
