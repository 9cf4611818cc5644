"""Make the portable wheel of llama-cpp-python: one for every CPU of a platform, no compiler needed.

    python native/wheel.py DIR              # DIR/llama_cpp_python-0.3.36-py3-none-*.whl
    python native/wheel.py DIR --build B    # keeps what was compiled in B, and goes on there

It takes the sources of llama-cpp-python from the package index, compiles its llama.cpp by
native/CMakeLists.txt with a library for each kind of CPU, and puts the libraries into the wheel in
place of those that its own build would make. Our accelerator travels with them. Where `auditwheel`
is installed it names the oldest Linux that the wheel runs on, and brings the OpenMP library along.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import build

HERE = Path(__file__).parent
LIB = "llama_cpp/lib"


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a portable wheel of llama-cpp-python.")
    parser.add_argument("target", type=Path, help="folder for the wheel")
    parser.add_argument("--build", type=Path, help="folder for what is compiled; kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.build or Path(scratch)).absolute()
        print(make(args.target.absolute(), work, args.jobs))


def make(target: Path, work: Path, jobs: int) -> Path:
    """The wheel in `target`; sources and objects in `work`."""
    source = _sources(work)
    made = work / "objects"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    command = ["cmake", *generator, "-S", str(HERE), "-B", str(made)]
    _run([*command, f"-DLLAMA_CPP={source / 'vendor' / 'llama.cpp'}"])
    _run(["cmake", "--build", str(made), "--parallel", str(jobs)], progress=True)
    pure = _pure_wheel(source, work)
    libraries = {f"{LIB}/{path.name}": path for path in sorted((made / "lib").iterdir())}
    headers = source / "vendor" / "llama.cpp" / "ggml" / "include"
    accelerator = _accelerator(headers, made / "lib", work)
    if accelerator is not None:
        libraries[f"{LIB}/{accelerator.name}"] = accelerator
    target.mkdir(parents=True, exist_ok=True)
    return _named(_with_files(pure, libraries, target))


def _sources(work: Path) -> Path:
    folder = work / f"llama_cpp_python-{build.LLAMA_CPP_PYTHON}"
    if folder.exists():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    _run([*pip, "--dest", str(work), f"llama-cpp-python=={build.LLAMA_CPP_PYTHON}"])
    archive = next(work.glob(f"llama_cpp_python-{build.LLAMA_CPP_PYTHON}.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    return folder


def _pure_wheel(source: Path, work: Path) -> Path:
    """The wheel without a library: Python only."""
    folder = work / "pure"
    shutil.rmtree(folder, ignore_errors=True)
    flags = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"]
    _run([*pip, "--wheel-dir", str(folder), str(source)], **flags)
    return next(folder.glob("*.whl"))


def _accelerator(headers: Path, libraries: Path, work: Path) -> Path | None:
    """Our own backend, compiled against these libraries; None where there is none for them."""
    try:
        return build.build(work / "accelerator", headers=headers, libraries=libraries)
    except build.NotBuilt as reason:
        print(f"no accelerator in the wheel: {reason}", file=sys.stderr)
        return None


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
    """The wheel with the tag that auditwheel proves, where it is installed."""
    command = shutil.which("auditwheel", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if sys.platform != "linux" or command is None:
        return wheel
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


def _run(command: list[str], *, progress: bool = False, **environment: str) -> None:
    """Run a step; where it fails, its last lines and what it was."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=not progress, text=True, check=False, env=env)
    if done.returncode:
        last = (done.stderr or done.stdout or "").strip().splitlines()[-3:]
        sys.exit(f"{' '.join(command[:4])} ... failed: {' | '.join(last) or 'see above'}")


if __name__ == "__main__":
    main()
