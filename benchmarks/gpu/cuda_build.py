"""llama.cpp with CUDA for the card of this machine: from source, or from libraries brought along.

CUDA's parts may lie apart: nvcc in a toolkit, cuBLAS in the wheels that PyTorch brings. What CMake
would not find is given to it by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The libraries only, for one card: no programs, no tests, no network.
FLAGS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_CUDA=ON"),
    *("-DGGML_CUDA_NCCL=OFF", "-DGGML_CCACHE=OFF", "-DLLAMA_OPENSSL=OFF"),
    "-DGGML_CUDA_FA_QUANTS=f16-f16",  # the cache is f16
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "EXAMPLES", "TOOLS", "SERVER")),
    *("-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_MTMD=OFF"),
    # The libraries find each other where they lie.
    *("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"),
)
LINKED = ("cudart", "cublas", "cublasLt", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """Where CUDA's parts are."""

    nvcc: Path
    libraries: Mapping[str, Path]  # by the names of LINKED; what was found
    include: Path | None  # of cuBLAS' headers, where the toolkit has none


def find_cuda(roots: Sequence[Path]) -> Cuda:
    """nvcc, the libraries and the headers below the first of these folders that have them."""
    nvcc = next((root / "bin/nvcc" for root in roots if (root / "bin/nvcc").exists()), None)
    on_path = shutil.which("nvcc")
    if nvcc is None and on_path is not None:
        nvcc = Path(on_path).resolve()
    if nvcc is None:
        raise FileNotFoundError(f"no nvcc on the PATH or in {', '.join(map(str, roots))}")
    toolkit = nvcc.parents[1]
    places = [toolkit, *roots]
    folders = [
        place / sub
        for place in places
        for sub in ("lib64", "lib", "targets/x86_64-linux/lib", "lib64/stubs", "lib/stubs")
    ]
    folders += [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/local/nvidia/lib64")]
    libraries: dict[str, Path] = {}
    for name in LINKED:
        files = (p for folder in folders for p in sorted(folder.glob(f"lib{name}.so*")))
        if path := next(files, None):
            libraries[name] = path
    headers = [
        place / sub for place in places for sub in ("include", "targets/x86_64-linux/include")
    ]
    holds = next((folder for folder in headers if (folder / "cublas_v2.h").exists()), None)
    own = holds is not None and holds.is_relative_to(toolkit)
    return Cuda(nvcc=nvcc, libraries=libraries, include=None if own else holds)


def cuda_roots() -> list[Path]:
    """Where CUDA usually is on a machine with PyTorch."""
    named = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    wheels = [Path(p) / "nvidia" / "cu13" for p in sys.path if p.endswith("-packages")]
    return [root for root in (*named, *usual, *wheels) if root.is_dir()]


def configure_command(
    source: Path, build: Path, cuda: Cuda, arch: str, more: Sequence[str] = ()
) -> list[str]:
    """CMake's command; `arch` is the card's compute capability as a number, "90"."""
    command = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), *FLAGS]
    command += [f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={arch}-real"]
    for name, path in cuda.libraries.items():
        variable = "CUDA_CUDART" if name == "cudart" else f"CUDA_{name}_LIBRARY"
        variable = "CUDA_cuda_driver_LIBRARY" if name == "cuda" else variable
        command.append(f"-D{variable}={path}")
    if cuda.include is not None:
        command.append(f"-DCMAKE_CUDA_FLAGS=-isystem {cuda.include}")
    return [*command, *more]


def library_path(cuda: Cuda) -> str:
    """LD_LIBRARY_PATH for programs that load the libraries: stubs left out."""
    folders = [path.parent for path in cuda.libraries.values() if path.parent.name != "stubs"]
    kept = [
        folder for folder in dict.fromkeys(folders) if folder != Path("/usr/lib/x86_64-linux-gnu")
    ]
    before = os.environ.get("LD_LIBRARY_PATH")
    return ":".join([*map(str, kept), *([before] if before else [])])


def compute_capability() -> str:
    """ "90" for a Hopper card."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()[0].replace(".", "")


def unpack(archive: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder


# Half of the compiling is for matrix kernels that no embedding model needs: those of other sizes of
# heads, and of weights in less than three bits. Their names are kept, and end the process.
HEADS = ("64", "128", "256")
LEFT_OUT_TYPES = {"IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ3_S": 21, "IQ2_S": 22}
_ATTENTION = re.compile(r"^DECL_FATTN_MMA_F16_CASE\((\d+), (\d+), (\d+), (\d+)\);\n", re.MULTILINE)
_PRODUCT = re.compile(r"^DECL_MMQ_CASE\(GGML_TYPE_(\w+)\);\n", re.MULTILINE)


def trim(source: Path) -> int:
    """Leave out kernels, in the source; returns how many. A second time it does nothing."""
    folder = source / "ggml/src/ggml-cuda/template-instances"
    stubs = folder / "mmq-instance-left-out.cu"
    if stubs.exists():
        return 0
    names: list[str] = []

    def attention(match: re.Match[str]) -> str:
        if match[1] == match[2] and match[1] in HEADS:
            return match[0]
        sizes = "".join(f"Li{number}E" for number in match.groups())
        names.append(
            f"_Z37ggml_cuda_flash_attn_ext_mma_f16_caseI{sizes}"
            "EvR25ggml_backend_cuda_contextP11ggml_tensor"
        )
        return ""

    def product(match: re.Match[str]) -> str:
        if match[1] not in LEFT_OUT_TYPES:
            return match[0]
        names.append(
            f"_Z14mul_mat_q_caseIL9ggml_type{LEFT_OUT_TYPES[match[1]]}EL9ggml_prec30E"
            "EvR25ggml_backend_cuda_contextRK8mmq_argsP11CUstream_st"
        )
        return ""

    for path in sorted(folder.glob("*.cu")):
        old = path.read_text()
        new = _PRODUCT.sub(product, _ATTENTION.sub(attention, old))
        if new != old:
            # What has nothing left in it need not be read by a compiler for a minute.
            path.write_text(new if "DECL_" in new else "// left out\n")
    lines = ["#include <cstdlib>", 'extern "C" {', *(f"void {n}() {{ abort(); }}" for n in names)]
    stubs.write_text("\n".join([*lines, "}", ""]))
    return len(names)


def build(
    source: Path, folder: Path, log: Path, *, arch: str, more: Sequence[str]
) -> dict[str, Any]:
    """Compile, with all that is said in `log`; returns the libraries' folder and times."""
    cuda = find_cuda(cuda_roots())
    command = configure_command(source, folder, cuda, arch, more)
    times: dict[str, float] = {}
    ninja = ["cmake", "--build", str(folder), "--target", "llama"]
    with log.open("w") as opened:
        for name, step in (("configure_s", command), ("compile_s", ninja)):
            print(*step, file=opened, flush=True)
            started = time.monotonic()
            done = subprocess.run(step, stdout=opened, stderr=subprocess.STDOUT, check=False)
            times[name] = round(time.monotonic() - started, 1)
            if done.returncode:
                raise RuntimeError(f"{step[0]} failed: {first_error(log.read_text())}")
    return {"libraries": str(folder / "bin"), "nvcc": str(cuda.nvcc), **times}


def shared_cxx(libraries: Path) -> Path | None:
    """The shared libstdc++, where `libraries` were linked with the static one.

    Streams of one library then meet the locale of another and crash, unless the shared one is
    loaded before them: seen on the first GPU machine.
    """
    if b"libstdc++.so.6" in (libraries / "libllama.so").read_bytes():
        return None
    folders = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/lib/x86_64-linux-gnu")
    return next((p for f in folders if (p := Path(f) / "libstdc++.so.6").exists()), None)


def first_error(log: str) -> str:
    """The first lines of a build's log that name an error, else its last ones."""
    lines = log.splitlines()
    marked = re.compile(r"error|fatal|FAILED|not found", re.IGNORECASE)
    first = next((i for i, line in enumerate(lines) if marked.search(line)), len(lines) - 8)
    return "\n".join(lines[max(0, first) : first + 8])


def main() -> None:
    """cuda_build.py SOURCE BUILD LOG [FLAG ...]: compile, print where the libraries are."""
    source, folder, log, *more = sys.argv[1:]
    arch = os.environ.get("GPU_RUN_ARCH") or compute_capability()
    n_left_out = 0 if os.environ.get("GPU_RUN_WHOLE") else trim(Path(source))
    built = build(Path(source), Path(folder), Path(log), arch=arch, more=[*host_flags(), *more])
    print("@" + json.dumps({**built, "arch": arch, "kernels_left_out": n_left_out}), flush=True)


def host_flags() -> list[str]:
    """What install.py would add for this compiler and CPU: the cure for AMX."""
    sys.path.append(str(Path(__file__).parents[2]))
    import install

    return [flag.strip("'") for flag in install.build_flags() if "CMAKE_CXX_FLAGS" in flag]


if __name__ == "__main__":
    main()
