"""The first decode of an unknown build happens in a child process.

A llama.cpp build can die on a CPU that it was not made for (SIGILL), or on one whose AMX tiles its
compiler configured wrongly (SIGSEGV); neither can be caught. So a child decodes a tiny model per
weight type: plain, with flash attention, with weight repacking, and on the GPU where a model is
to run there. What crashes there, or gives wrong vectors, is not used, and that is kept per build,
CPU and GPU. A test that could not be made (a full disk, a child that was killed, a machine that is
too slow) says nothing about the build: it is made again at the next opening.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from gguf_embed.errors import NativeFailed
from gguf_embed.machine.selftest_child import GPU, OK, WRONG, refused
from gguf_embed.machine.tested import ENVIRONMENT, cpu_id, folder
from gguf_embed.native import library
from gguf_embed.system.child import CRASH_SIGNALS, Ending, Worker
from gguf_embed.system.kept import keep, read_kept

_log = logging.getLogger(__name__)

Stage: TypeAlias = Literal["plain", "flash", "repack"]
STAGES: tuple[Stage, ...] = ("plain", "flash", "repack")
TIMEOUT_S = 120
NOT_RUN = "not run"
CRASHED = "crash"  # followed by the reason, where there is no signal to name

REINSTALL = (
    'CMAKE_ARGS="-DCMAKE_CXX_FLAGS=-fno-tree-dse\\ -fno-dse\\ -fno-strict-aliasing" '
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
)


def is_proof(result: str) -> bool:
    """Whether the result says something about the build: it works, it crashed, or it is wrong."""
    return result in (OK, NOT_RUN, *CRASH_SIGNALS) or result.startswith((CRASHED, WRONG))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What works for one weight type: per stage "ok" or what went wrong, such as "SIGILL"."""

    weight_type: str
    plain: str = NOT_RUN
    flash: str = NOT_RUN
    repack: str = NOT_RUN

    @property
    def stages(self) -> dict[str, str]:
        """The result of each stage."""
        return {stage: getattr(self, stage) for stage in STAGES}

    @property
    def good(self) -> bool:
        """Everything works."""
        return all(result == OK for result in self.stages.values())

    @property
    def proven(self) -> bool:
        """Every result says something about the build, so the verdict may be kept."""
        results = self.stages.values()
        if self.plain == NOT_RUN or (self.plain == OK and NOT_RUN in results):
            return False
        return all(map(is_proof, results))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVerdict(Verdict):
    """A verdict as it may be in a file."""

    def __post_init__(self) -> None:
        if not self.proven:
            raise ValueError(f"{self.weight_type} has results that prove nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptGpu:
    """The results of the GPU stage by weight type, as they may be in a file."""

    results: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if not all(map(is_proof, self.results.values())):
            raise ValueError("results that prove nothing")


KEPT = (Mapping[str, KeptVerdict], KeptGpu)  # the shapes of the files: of CPUs, of GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class SafePaths:
    """What a model of several weight types may use on this machine."""

    flash: bool
    repack: bool
    remark: str | None  # one line for the user where something had to be given up
    gpu: bool = True
    accelerator: bool = False  # proved with the model itself, not here


def check(
    weight_types: Sequence[str], *, gpus: Sequence[str] = (), worker: Worker | None = None
) -> SafePaths:
    """What is safe for these weight types; runs a child for those without a verdict yet.

    `worker` is the child where the caller has one, of a module that does what
    `selftest_child` does. `gpus` describe
    the GPUs that are to hold layers; they are tested only where there are any.
    What could not be tested is not used, except for the plain path.
    Raises NativeFailed where the plain path crashes or is wrong: the build is not for this CPU.
    """
    known = verdicts()
    missing = [t for t in dict.fromkeys(weight_types) if t not in known]
    if missing:
        known = {**known, **run(missing, worker)}
    asked = [known[t] for t in dict.fromkeys(weight_types)]
    broken = next((v for v in asked if v.plain != OK and is_proof(v.plain)), None)
    if broken is not None:
        raise NativeFailed(
            f"llama.cpp's self-test failed on this CPU ({broken.weight_type}: {broken.plain}); "
            'rebuild it for this machine: CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install '
            "--force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
        )
    on_gpu = _check_gpu(weight_types, gpus, worker) if gpus else {}
    results = [(stage, v.weight_type, result) for v in asked for stage, result in v.stages.items()]
    results += [(GPU, name, result) for name, result in on_gpu.items()]
    return SafePaths(
        flash=all(v.flash == OK for v in asked),
        repack=all(v.repack == OK for v in asked),
        remark=_remark(results),
        gpu=all(result == OK for result in on_gpu.values()),
    )


def _remark(results: Iterable[tuple[str, str, str]]) -> str | None:
    """What had to be given up, given (stage, weight type, result); None where nothing had to."""
    bad = [one for one in results if one[2] not in (OK, NOT_RUN)]
    lost = [f"{stage} ({name}: {result})" for stage, name, result in bad if is_proof(result)]
    remarks: list[str] = []
    if lost:
        remarks.append(
            f"self-test: this llama.cpp build fails at {', '.join(lost)}; running without. "
            "`gguf-embed doctor` tells how to get the speed back"
        )
    if causes := dict.fromkeys(result for _, _, result in bad if not is_proof(result)):
        remarks.append(
            f"self-test: could not be made: {'; '.join(causes)}. Running on the plain path, which "
            "is slower; the test is made again at the next opening"
        )
    return ". ".join(remarks) or None


def verdicts() -> dict[str, Verdict]:
    """The kept verdicts of this build on this CPU, by weight type."""
    kept = read_kept(_file(), KEPT[0]) or {}
    return {
        name: Verdict(weight_type=name, **v.stages)
        for name, v in kept.items()
        if v.weight_type == name
    }


def run(weight_types: Sequence[str], worker: Worker | None = None) -> dict[str, Verdict]:
    """Test these weight types in child processes, return their verdicts, keep those proven."""
    with worker_or_new(worker) as used:
        found = {name: _test(name, used) for name in weight_types}
    merged = {name: v for name, v in verdicts().items() if name not in found}
    merged |= {name: v for name, v in found.items() if v.proven}
    keep(_file(), merged)
    return found


def run_gpus(weight_types: Sequence[str], gpus: Sequence[str]) -> dict[str, str]:
    """Test these weight types on GPUs so described, return their results, keep those proven."""
    with worker_or_new(None) as used:
        results = {name: _test_gpu(name, used) for name in weight_types}
    path = _file(gpus)
    known = dict((read_kept(path, KeptGpu) or KeptGpu()).results)
    _keep_gpu(path, {n: r for n, r in known.items() if n not in results} | results)
    return results


def forget_bad_gpus() -> list[str]:
    """Forget what is kept as bad on GPUs, so that the next opening tests it again; returns it.

    Of several GPUs a model may use some: which ones is known only when it is opened.
    """
    forgotten: list[str] = []
    for path in sorted(_file().parent.glob(f"{library.build_id()}-{cpu_id()}-*.json")):
        kept = read_kept(path, KeptGpu) if path != _file() else None
        bad = [f"{name}: {r}" for name, r in kept.results.items() if r != OK] if kept else []
        if kept and bad:
            _keep_gpu(path, {name: r for name, r in kept.results.items() if r == OK})
            forgotten += bad
    return forgotten


@contextmanager
def worker_or_new(worker: Worker | None) -> Generator[Worker]:
    """The caller's, which lives on, or one for the time being."""
    if worker is not None:
        yield worker
        return
    with Worker("gguf_embed.machine.selftest_child", environment=ENVIRONMENT) as new:
        yield new


def _check_gpu(
    weight_types: Sequence[str], gpus: Sequence[str], worker: Worker | None
) -> dict[str, str]:
    """The result of each weight type on these GPUs, kept like the verdicts."""
    path = _file(gpus)
    known = dict((read_kept(path, KeptGpu) or KeptGpu()).results)
    missing = [name for name in dict.fromkeys(weight_types) if name not in known]
    if missing:
        with worker_or_new(worker) as used:
            known |= {name: _test_gpu(name, used) for name in missing}
        _keep_gpu(path, known)
    return {name: known[name] for name in weight_types}


def _test_gpu(weight_type: str, worker: Worker) -> str:
    results, failure = _child(weight_type, (GPU,), worker)
    return failure or results[GPU]


def _keep_gpu(path: Path, results: Mapping[str, str]) -> None:
    proven = {name: result for name, result in results.items() if is_proof(result)}
    keep(path, KeptGpu(results=proven))


def _file(gpus: Sequence[str] = ()) -> Path:
    device = hashlib.sha256(", ".join(gpus).encode()).hexdigest()[:16] if gpus else "cpu"
    return folder() / f"{library.build_id()}-{cpu_id()}-{device}.json"


def _test(weight_type: str, worker: Worker) -> Verdict:
    """Run the stages one after the other; each crash costs one child and one stage."""
    verdict = Verdict(weight_type=weight_type)
    todo = list(STAGES)
    while todo:
        results, failure = _child(weight_type, todo, worker)
        verdict = replace(verdict, **results)
        todo = todo[len(results) :]
        if failure is None and todo:
            failure = "its process ended early"
        if failure is not None and todo:
            verdict = replace(verdict, **{todo.pop(0): failure})
        if verdict.plain != OK or (failure and not is_proof(failure)):
            break
    return verdict


def _child(
    weight_type: str, stages: Sequence[str], worker: Worker
) -> tuple[Mapping[str, str], str | None]:
    """Results of the stages that ended, in order, and why the next one did not."""
    results: dict[str, str] = {}
    failure: str | None = None
    job = {"weight_type": weight_type, "stages": list(stages)}
    try:
        for said in worker.answers(job, timeout_s=TIMEOUT_S):
            if said.get("stage") in stages:
                results[str(said["stage"])] = str(said["result"])
            elif "failure" in said:
                failure = str(said["failure"])
    except OSError as error:  # no place for what it prints, or no process to be had
        return results, refused(error)
    return results, failure or (None if worker.ending.ok else _explained(worker.ending))


def _explained(ending: Ending) -> str:
    """How the child died, with the next step where that says nothing about the build."""
    if ending.crashed:
        return ending.signal or f"{CRASHED} ({ending.reason})"
    if ending.code is None:
        return f"its process gave {ending.reason}; try again when this machine is less busy"
    if ending.signal == "SIGKILL":
        return "its process was killed (SIGKILL); see whether memory is short"
    return f"its process ended early ({ending.reason})"
