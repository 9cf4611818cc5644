"""Compile the accelerator: a ggml backend plug-in for exactly one version of llama-cpp-python.

    python native/build.py                       # into gguf_embed/native, for this Python
    python native/build.py --test [--sanitize]   # also the kernels' test program, which is run
    python native/build.py --rate                # the kernels' speed, in JSON lines
    python native/build.py --program DIR         # the test program alone, not run

Run it with the Python whose llama-cpp-python is to be accelerated; `install.py` does. It needs
the C++ compiler that llama-cpp-python was compiled with, and some seconds. An instruction set that
the compiler does not know is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parent / "gguf_embed" / "native"
# ggml checks neither the layout of its tensors nor its operation numbers: exactly this version.
LLAMA_CPP_PYTHON = "0.3.36"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wconversion"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Struct of the instruction set: function of its kernels, the flag by which Linux says that a CPU
# has it, flags of the compiler. A CPU takes the first that it has.
KERNELS = {
    "Amx": ("amx_kernels", "amx_int8", [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"]),
    "Avx512Vnni": ("avx512_vnni_kernels", "avx512_vnni", [*AVX512, "-mavx512vnni"]),
    "Avx512": ("avx512_kernels", "avx512dq", AVX512),
    "AvxVnni": ("avx_vnni_kernels", "avx_vnni", [*AVX2, "-mavxvnni"]),
    "Avx2": ("avx2_kernels", "avx2", AVX2),
}
# Contracting is the compiler's whim: a row's result would depend on its place in a tile.
COMMON = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-g0"]
# What is inlined is checked wherever it is: that alone trebles the compiler's time.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-fno-inline"]


class NotBuilt(Exception):
    """Why there is no accelerator; the text is for the user."""


def main() -> None:
    """Build what the command line asks for; failure ends with the reason and code 1."""
    parser = argparse.ArgumentParser(description="Compile the accelerator for this Python.")
    parser.add_argument("--test", action="store_true", help="build and run the test program")
    parser.add_argument("--sanitize", action="store_true", help="the test program with sanitizers")
    parser.add_argument("--rate", action="store_true", help="measure the kernels")
    parser.add_argument("--program", type=Path, help="folder for the test program; not run")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder for the library")
    args = parser.parse_args()
    try:
        if args.program:
            print(build_test_program(args.program))
        elif args.test or args.rate:
            sys.exit(run_test_program(sanitize=args.sanitize, rate=args.rate))
        else:
            print(build(args.target))
    except NotBuilt as reason:
        sys.exit(str(reason))


def library_name() -> str:
    """The file's name says which llama-cpp-python it belongs to."""
    return f"libgguf_embed_accelerator-{LLAMA_CPP_PYTHON}.so"


def build(target: Path, *, headers: Path | None = None, libraries: Path | None = None) -> Path:
    """Compile the plug-in into the folder `target`; returns its path. Raises NotBuilt.

    Against the headers and libraries of the installed llama-cpp-python, which is compiled for this
    CPU, as the plug-in then is. Against those that are given, for a wheel: for every CPU.
    """
    only_here = headers is None
    if headers is None or libraries is None:
        compiler, packages = check_requirements()
        headers, libraries = packages / "include", packages / "llama_cpp" / "lib"
    else:
        compiler = _compiler()
    if not _knows(compiler, ["-fopenmp", "-include", "omp.h"]):
        raise NotBuilt(
            f"{compiler} is without OpenMP: install it (clang on Debian/Ubuntu: libomp-dev, on "
            "Fedora: libomp-devel) or set CXX=g++, then run install.py again"
        )
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["-isystem", str(headers), "-fopenmp", *_exported()]
        units = [*_kernels(compiler, only_here=only_here), ("accelerator", flags), ("tap", flags)]
        objects = _compiled(compiler, Path(scratch), units)
        made = Path(scratch) / library_name()
        command = [compiler, "-shared", "-s", "-fopenmp", "-o", str(made)]
        command += ["-Wl,-rpath,$ORIGIN", *map(str, objects)]
        _run([*command, *_ggml(libraries)])
        target.mkdir(parents=True, exist_ok=True)
        # A library that a process has mapped must not be written into.
        placed = target / f".{library_name()}.{os.getpid()}"
        shutil.copyfile(made, placed)
        placed.replace(target / library_name())
    return target / library_name()


def run_test_program(
    *, sanitize: bool = False, rate: bool = False, kernels: Path | None = None
) -> int:
    """Compile the kernels' test program and run it; returns its exit code. Raises NotBuilt.

    It tests the kernels of the library in the folder `kernels`; where there is no library they are
    compiled anew, and so are those for the sanitizers, of this CPU's instruction sets.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = (kernels or TARGET) / library_name()
        objects = [made] if made.exists() and not sanitize else []
        program = build_test_program(Path(scratch), objects, sanitize=sanitize)
        return subprocess.run([program, *(["rate"] if rate else [])], check=False).returncode


def build_test_program(
    target: Path, objects: Sequence[Path] = (), *, sanitize: bool = False
) -> Path:
    """Compile the kernels' test program into the folder `target`; returns its path.

    Raises NotBuilt. With the kernels of `objects`, else with all of them, compiled anew.
    """
    compiler, packages = check_requirements()
    extra = SANITIZERS if sanitize else []
    if not objects:
        objects = _compiled(compiler, target, _kernels(compiler, only_here=sanitize), extra)
    program, libraries = target / "test_kernels", packages / "llama_cpp" / "lib"
    command = [compiler, *COMMON, "-O1", *WARNINGS, *extra, *_includes(packages)]
    command += [str(HERE / "test_kernels.cpp"), *map(str, objects), "-o", str(program)]
    _run([*command, *_ggml(libraries), f"-Wl,-rpath,{libraries}"])
    return program


def _kernels(compiler: str, *, only_here: bool = False) -> list[tuple[str, list[str]]]:
    """Sources of the kernels and their flags: all instruction sets, or those that this CPU has."""
    cpuinfo = Path("/proc/cpuinfo")
    # AVX2 always: a library of no set would not compile, and one of AVX2 is not loaded without it.
    here = {"avx2", *cpuinfo.read_text().split()} if only_here and cpuinfo.exists() else None
    functions: list[str] = []
    units: list[tuple[str, list[str]]] = []
    for isa, (function, name, flags) in KERNELS.items():
        if (here is None or name in here) and _knows(compiler, flags):
            functions.append(function)
            units.append(("kernels", [*flags, f"-DISA={isa}", f"-DKERNELS={function}"]))
    return [*units, ("instruction_sets", [f"-DSETS={','.join(functions)}"])]


def _knows(compiler: str, flags: list[str]) -> bool:
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _compiled(
    compiler: str, scratch: Path, units: list[tuple[str, list[str]]], extra: Sequence[str] = ()
) -> list[Path]:
    """Object files of sources with their flags; as many compilers at a time as there are CPUs."""

    def compiled(number: int) -> Path:
        source, flags = units[number]
        made = scratch / f"{number}-{source}.o"
        command = [compiler, *COMMON, *WARNINGS, *extra, *flags, "-c", str(HERE / f"{source}.cpp")]
        _run([*command, "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(compiled, range(len(units))))


def check_requirements() -> tuple[str, Path]:
    """The compiler, and the folder of this Python's packages."""
    compiler = _compiler()
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise NotBuilt("llama-cpp-python is not installed")
    installed = version("llama-cpp-python")
    if installed != LLAMA_CPP_PYTHON:
        raise NotBuilt(f"the accelerator fits {LLAMA_CPP_PYTHON}, llama-cpp-python is {installed}")
    packages = Path(spec.origin).parents[1]
    if not (packages / "include" / "ggml-backend.h").exists():
        raise NotBuilt("llama-cpp-python was installed without ggml's headers")
    return compiler, packages


def _compiler() -> str:
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        raise NotBuilt(f"no accelerator for {sys.platform} on {platform.machine()}")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise NotBuilt("no C++ compiler found")
    return compiler


def _includes(packages: Path) -> list[str]:
    return ["-isystem", str(packages / "include")]


def _exported() -> list[str]:
    return ["-DGGML_BACKEND_SHARED", "-DGGML_BACKEND_BUILD"]


def _ggml(libraries: Path) -> list[str]:
    """The library whose functions we call; the running llama.cpp has loaded it already."""
    name = "libggml-base.so.0"
    if not (libraries / name).exists():  # of the portable wheel
        name = "libggml-base.so"
    return [f"-L{libraries}", f"-l:{name}"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotBuilt(f"the accelerator does not compile:\n{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    main()
