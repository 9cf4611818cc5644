"""One command for a GPU machine that is lent for minutes: build, measure, one JSON.

    python benchmarks/gpu/pack.py                       # before, where there is a network
    python3 benchmarks/gpu/run.py --carry build/gpu-carry --out OUT --budget 530

    OUT/gpu.json      every step's result, written as soon as a step ends
    OUT/build.log     what CMake and the compilers said
    OUT/steps.log     what the steps printed
    OUT/libraries.*   with --keep-libraries: what was built, for a second run (pieces of a .tar.xz)

Each step runs in a process of its own and has a bounded share of the budget. What fails or runs
out of time is recorded with what it had found by then, and the next step goes on. The same command
again on the same machine goes on with a build that was not finished, or takes one that was. With
`--build none --small` everything runs on a CPU build in a minute or two: the rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PIECE_BYTES = 15 << 20
ERROR_CHARS = 3000  # of a step's stderr
NOT_HERE = 69  # exit code of a step that lacks a package; steps.py says which
LEFT_OUT = "left out: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step, the time without which it is not started, and the most that it gets."""

    name: str
    least_s: float
    most_s: float

    @property
    def command(self) -> list[str]:
        """What steps.py is called with: "shape:NAME:LEVEL" has two arguments."""
        return self.name.split(":")


BUILD = Step(name="build", least_s=20, most_s=420)
# The most important first: what comes late is what a slow machine loses.
STEPS = (
    Step(name="facts", least_s=2, most_s=20),
    BUILD,
    Step(name="doctor", least_s=8, most_s=70),
    Step(name="families", least_s=20, most_s=90),
    Step(name="plans", least_s=3, most_s=20),
    Step(name="shape:qwen3-embedding-0.6b:F16", least_s=8, most_s=50),
    Step(name="builtin", least_s=15, most_s=70),
    Step(name="offload", least_s=8, most_s=50),
    Step(name="shape:qwen3-embedding-0.6b:Q8_0", least_s=8, most_s=40),
    Step(name="shape:qwen3-embedding-8b:Q4_K_M", least_s=25, most_s=60),
    Step(name="peer", least_s=25, most_s=80),
    Step(name="ceiling", least_s=5, most_s=30),
    Step(name="shape:qwen3-embedding-8b:F16", least_s=35, most_s=80),
    Step(name="torch:qwen3-embedding-8b", least_s=12, most_s=50),
    Step(name="shape:qwen3-embedding-0.6b:Q4_K_M", least_s=8, most_s=40),
    Step(name="shape:qwen3-embedding-8b:Q8_0", least_s=20, most_s=60),
    Step(name="torch:qwen3-embedding-0.6b", least_s=8, most_s=30),
    Step(name="torch:all-minilm-l6-v2", least_s=8, most_s=30),
)


def limit_s(steps: Sequence[Step], index: int, left_s: float) -> float | None:
    """Seconds that a step gets when `left_s` are left; None: it is left out.

    What the later steps need at least is kept for them, but never so much that this one gets less
    than its own least.
    """
    step = steps[index]
    kept_s = sum(later.least_s for later in steps[index + 1 :])
    given_s = min(step.most_s, max(step.least_s, left_s - kept_s))
    return None if given_s > left_s else given_s


def parts_of(output: str) -> list[Any]:
    """The JSON of a step's lines that start with "@"; a line that was cut short is left out."""
    parts: list[Any] = []
    for line in output.splitlines():
        if line.startswith("@"):
            try:
                parts.append(json.loads(line[1:]))
            except ValueError:
                continue
    return parts


class Report:
    """The one JSON: whole on the disk after each step."""

    def __init__(self, path: Path, **about: object) -> None:
        self.path = path
        self.content: dict[str, Any] = {"format": "gguf-embed-gpu-run/1", **about, "steps": {}}
        self._write()

    def add(self, name: str, **result: object) -> None:
        self.content["steps"][name] = result
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a step and its children: politely first, so that ninja ends the compilers it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)


def outcome(code: int | None, errors: str) -> str:
    """How a step ended, in a word or two; `code` None: it was stopped."""
    if code == NOT_HERE:
        return f"{LEFT_OUT}{errors.strip().rpartition(chr(10))[2]}"
    return "ok" if code == 0 else "out of time" if code is None else f"failed ({code})"


def run_step(
    command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float
) -> dict[str, Any]:
    """Run one step in a process group of its own; what came of it."""
    started = time.monotonic()
    out, err = log.with_name("step.out"), log.with_name("step.err")
    with out.open("w") as stdout, err.open("w") as stderr:
        child = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
        try:
            code: int | None = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            end_group(child)
    printed, errors = out.read_text(errors="replace"), err.read_text(errors="replace")
    with log.open("a") as opened:
        opened.write(
            f"\n==== {' '.join(command)}: {code}\n{printed}\n---- stderr\n{errors[-20_000:]}\n"
        )
    out.unlink()
    err.unlink()
    result: dict[str, Any] = {
        "outcome": outcome(code, errors),
        "seconds": round(time.monotonic() - started, 1),
        "limit_s": round(limit, 1),
        "parts": parts_of(printed),
    }
    if code not in (0, NOT_HERE):
        result["error"] = errors[-ERROR_CHARS:]
    return result


def build_step(
    args: argparse.Namespace, environment: dict[str, str], limit: float
) -> dict[str, Any]:
    """Unpack what was carried, compile or try the libraries; sets the environment of the rest."""
    started = time.monotonic()
    site = cuda_build.unpack(args.carry / "python.tar.xz", args.work / "site")
    environment["PYTHONPATH"] = f"{environment['PYTHONPATH']}:{site}"
    tried: dict[str, Any] = {}
    carried = args.carry / "libraries.tar.xz"
    if args.build == "auto" and carried.exists():
        folder = cuda_build.unpack(carried, args.work / "carried")
        use_libraries(environment, folder)
        tried = run_step(
            [sys.executable, "-c", LOADS], environment, args.out / "steps.log", min(60, limit)
        )
        if any(part.get("gpu") for part in tried["parts"]):
            return {
                "outcome": "ok",
                "seconds": since(started),
                "how": "carried",
                "parts": tried["parts"],
            }
    source = cuda_build.unpack(args.carry / "llama.cpp.tar.xz", args.work / "source") / "llama.cpp"
    job = [sys.executable, str(HERE / "cuda_build.py"), str(source), str(args.work / "build")]
    left = limit - (time.monotonic() - started)
    result = run_step(
        [*job, str(args.out / "build.log")], environment, args.out / "steps.log", left
    )
    result |= {"seconds": since(started), "how": "compiled"}
    if tried:
        result["carried"] = tried
    if result["outcome"] == "ok":
        use_libraries(environment, Path(result["parts"][0]["libraries"]))
    return result


# Whether the libraries load, what they find, and whether they load a model.
LOADS = """
import json, pathlib
from gguf_embed.native import library
from gguf_embed.native.model import Model
kinds = {device.name: device.kind for device in library.devices()}
(file,) = pathlib.Path("models").glob("*.gguf")
Model(file, n_gpu_layers=99).close()
print("@" + json.dumps({"devices": kinds, "gpu": "gpu" in kinds.values()}))
"""


def use_libraries(environment: dict[str, str], folder: Path) -> None:
    """The bindings load the libraries in this folder, and those find CUDA's."""
    environment["LLAMA_CPP_LIB_PATH"] = str(folder)
    if (shared := cuda_build.shared_cxx(folder)) is not None:
        environment["LD_PRELOAD"] = str(shared)
    try:
        environment["LD_LIBRARY_PATH"] = cuda_build.library_path(
            cuda_build.find_cuda(cuda_build.cuda_roots())
        )
    except FileNotFoundError as error:  # the loader may know the place
        print(error, flush=True)


def since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def keep_libraries(folder: Path, out: Path) -> None:
    """The libraries as a .tar.xz in pieces, each small enough to be fetched."""
    archive = out.parent / "libraries.tar.xz"
    names = [path.name for path in sorted(folder.glob("lib*.so*"))]
    environment = {**os.environ, "XZ_OPT": "-6 -T0"}
    command = ["tar", "-cJf", str(archive), "-C", str(folder), *names]
    subprocess.run(command, env=environment, check=True, timeout=60)
    with archive.open("rb") as opened:
        for number in range(5):
            if piece := opened.read(PIECE_BYTES):
                (out / f"libraries.{number}").write_bytes(piece)


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """What every step sees."""
    folders = (ROOT, HERE, ROOT / "benchmarks", ROOT / "tests")
    environment = {
        **os.environ,
        "PYTHONPATH": ":".join(map(str, folders)),
        "GGUF_EMBED_HOME": str(args.work / "home"),
        "GPU_RUN_WORK": str(args.work),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
    }
    if args.small:
        environment["GPU_RUN_SMALL"] = "1"
    return environment


def default_work() -> Path:
    """In memory, where that has place for a model of 8 billion weights in F16."""
    shared = Path("/dev/shm")
    large = shared.is_dir() and shutil.disk_usage(shared).free > 40 << 30
    return (shared if large else Path(tempfile.gettempdir())) / "gguf-embed-gpu"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--carry", type=Path, default=ROOT / "build" / "gpu-carry")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/gguf-embed-gpu"))
    parser.add_argument(
        "--budget", type=float, default=530, metavar="SECONDS", help="for all steps"
    )
    parser.add_argument(
        "--build",
        choices=("auto", "always", "none"),
        default="auto",
        help="auto: carried libraries where they load; none: what this Python has installed",
    )
    parser.add_argument("--steps", nargs="*", metavar="NAME", help="only these, and the build")
    parser.add_argument("--small", action="store_true", help="small shapes: a rehearsal on a CPU")
    parser.add_argument("--keep-libraries", action="store_true", help="put what was built into OUT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    environment = environment_of(args)
    report = Report(args.out / "gpu.json", budget_s=args.budget, small=args.small)
    steps = [
        step
        for step in STEPS
        if (step is BUILD and args.build != "none")
        or (step is not BUILD and (not args.steps or step.name in args.steps))
    ]
    for index, step in enumerate(steps):
        limit = limit_s(steps, index, args.budget - (time.monotonic() - began))
        if limit is None:
            result: dict[str, Any] = {"outcome": f"{LEFT_OUT}no time"}
        elif step is BUILD:
            result = build_step(args, environment, limit)
        else:
            command = [sys.executable, str(HERE / "steps.py"), *step.command]
            result = run_step(command, environment, args.out / "steps.log", limit)
        report.add(step.name, **result)
        print(f"{since(began):6.1f} s  {step.name}: {result['outcome']}", flush=True)
        if step is BUILD and result["outcome"] != "ok":
            print(result.get("error", ""), flush=True)
            break  # the rest would measure nothing
        if step is BUILD and args.keep_libraries and result["how"] == "compiled":
            keep_libraries(Path(environment["LLAMA_CPP_LIB_PATH"]), args.out)
    for summary in summaries(report.content["steps"]):
        print(summary, flush=True)
    ends = [str(result["outcome"]) for result in report.content["steps"].values()]
    absent = [end for end in ends if end.startswith(LEFT_OUT) and end.endswith(" here")]
    return 0 if ends.count("ok") + len(absent) == len(ends) else 1


def summaries(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures in a line each, for the end of the output."""
    lines: list[str] = []
    for name, step in steps.items():
        for part in step.get("parts", ()):
            if isinstance(part, dict) and not {"report", "memory", "run"} & part.keys():
                lines.append(f"{name} {json.dumps(part)}"[:300])
        if "error" in step:
            lines.append(f"{name} ERROR {step['error'][-500:]}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
