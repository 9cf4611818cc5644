"""Pack what a GPU machine without network needs beside this repository: a folder of some megabytes.

    python benchmarks/gpu/pack.py                          # build/gpu-carry
    python benchmarks/gpu/pack.py --sdist llama_cpp_python-0.3.36.tar.gz
    python benchmarks/gpu/pack.py --libraries DIR          # and libraries that are built already

    llama.cpp.tar.xz   the source, of that only what a CUDA build compiles
    python.tar.xz      llama-cpp-python's bindings and other pure Python that such machines lack
    libraries.tar.xz   with --libraries: no minutes of compiling there, if they load there

The source is that of the installed llama-cpp-python's version, fetched by pip. Run it where this
project is installed with the extra `dev`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
VENDORED = "vendor/llama.cpp/"
# Of llama.cpp: its libraries, no programs; of ggml's backends: the CPU's and CUDA's.
KEPT = (
    *("CMakeLists.txt", "LICENSE", "cmake/", "include/", "src/"),
    *("vendor/CMakeLists.txt", "vendor/hash/", "vendor/nlohmann/", "vendor/sheredom/"),
    *("vendor/stb/", "vendor/miniaudio/"),
    *("ggml/CMakeLists.txt", "ggml/cmake/", "ggml/include/", "ggml/src/"),
)
BACKENDS = ("ggml-cpu", "ggml-cuda")
# Pure Python that the bindings and the random-weight files need, by import name.
PACKAGES = ("diskcache", "gguf")
BINDINGS = "llama-cpp-python"


def is_compiled(path: str) -> bool:
    """Whether a file of llama.cpp's source belongs to a build with CUDA; `path` is within it."""
    if not path.startswith(KEPT):
        return False
    parts = PurePosixPath(path).parts
    if parts[:2] == ("ggml", "src") and len(parts) > 3:
        return parts[2] in BACKENDS
    return True


def pack_source(sdist: Path, out: Path) -> list[str]:
    """Write the source's archive; returns the files in it."""
    kept: list[str] = []
    with tarfile.open(sdist) as old, tarfile.open(out, "w:xz", preset=9) as new:
        for entry in old:
            _, _, path = entry.name.partition(VENDORED)
            if entry.isfile() and path and is_compiled(path):
                # A new entry: an old one of a long name keeps that in its extended header.
                fresh = tarfile.TarInfo(f"llama.cpp/{path}")
                fresh.size, fresh.mtime = entry.size, entry.mtime
                new.addfile(fresh, old.extractfile(entry))
                kept.append(path)
    return kept


def python_files() -> Iterator[tuple[Path, str]]:
    """(file here, its name there) of the Python packages that travel."""
    for name in ("llama_cpp", *PACKAGES):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{name} is not installed: python3 install.py --extras cli,dev")
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            yield path, f"{name}/{path.relative_to(folder)}"
    for file in importlib.metadata.files(BINDINGS) or ():
        if file.name == "METADATA":
            yield Path(str(file.locate())), str(file)


def pack_python(out: Path) -> None:
    with tarfile.open(out, "w:xz") as archive:
        for path, name in python_files():
            archive.add(path, name)


def pack_libraries(folder: Path, out: Path) -> None:
    """The shared libraries of a build, links followed and each once."""
    with tarfile.open(out, "w:xz", preset=9) as archive:
        for path in sorted(folder.glob("lib*.so*")):
            whole = path.resolve().read_bytes()
            entry = tarfile.TarInfo(path.name)
            if path.is_symlink() and path.resolve().name != path.name:
                entry.type, entry.linkname = tarfile.SYMTYPE, path.resolve().name
                archive.addfile(entry)
                continue
            entry.size, entry.mode = len(whole), 0o755
            archive.addfile(entry, io.BytesIO(whole))


def fetch_sdist(folder: Path) -> Path:
    """llama-cpp-python's source distribution of the installed version, by pip."""
    version = importlib.metadata.version(BINDINGS)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", BINDINGS, "--dest", str(folder), f"{BINDINGS}=={version}"]
    subprocess.run(command, check=True)
    return next(folder.glob("*.tar.gz"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-carry")
    parser.add_argument("--sdist", type=Path, help="the source, if it is here already")
    parser.add_argument("--libraries", type=Path, help="folder of built libraries to take along")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        sdist = args.sdist or fetch_sdist(Path(scratch))
        files = pack_source(sdist, args.out / "llama.cpp.tar.xz")
    print(f"{len(files)} files of llama.cpp")
    pack_python(args.out / "python.tar.xz")
    if args.libraries is not None:
        pack_libraries(args.libraries, args.out / "libraries.tar.xz")
    for path in sorted(args.out.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
