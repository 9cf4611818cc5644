"""Install gguf_embed into a virtual environment, with a llama.cpp made for this machine.

    python3 install.py                    # .venv with the command line
    python3 install.py --extras cli,dev   # and what the tests need
    CMAKE_ARGS="-DGGML_CUDA=on" python3 install.py

llama-cpp-python is compiled once, in some minutes, and the wheel is kept in the user's cache
directory under a name made of its version, its flags, the compiler and the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from gguf_embed.system.paths import home  # needs nothing installed

ROOT = Path(__file__).parent
LLAMA_CPP_PYTHON = "0.3.36"
SLIM = "slim"  # folder of the wheels that hold llama.cpp's libraries once
# Without the multimodal library, which embedding text does not use.
FLAGS = ["-DLLAVA_BUILD=OFF"]
# GCC before 12.4 and 13 drops the stores of the AMX tile configuration (GCC PR 114098), so that
# the first quantized matrix product dies. Without these passes it keeps them.
AMX_FLAGS = "-fno-tree-dse -fno-dse -fno-strict-aliasing"


def main() -> None:
    """Make the environment, build or reuse the wheel, install."""
    parser = argparse.ArgumentParser(description="Install gguf_embed into a virtual environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    parser.add_argument("--extras", default="cli", help="extras of pyproject.toml (default: cli)")
    parser.add_argument(
        "--uv", action="store_true", help="install with uv, in seconds; it does not read pip.conf"
    )
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (run before pip could refuse)
        sys.exit(f"Python 3.11 or newer is needed, this is {platform.python_version()}")

    python = args.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(args.venv, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    wheel = build_wheel(pip)
    wanted = [str(wheel), "--editable", f"{ROOT}[{args.extras}]"]
    if not (args.uv and installed_by_uv(pip, python, wanted)):
        run([*pip, "install", "--quiet", *wanted])
    build_accelerator(python)


def installed_by_uv(pip: list[str], python: Path, wanted: list[str]) -> bool:
    """Whether uv could be fetched and could install what is wanted; pip, slower, can too."""
    fetch = [*pip, "install", "--quiet", "uv"]
    install = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    return all(not subprocess.call(command) for command in (fetch, [*install, *wanted]))


def build_accelerator(python: Path) -> None:
    """Compile our own ggml backend, in some seconds; everything works without it."""
    command = [str(python), str(ROOT / "native" / "build.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"no accelerator: {done.stderr.strip()}", flush=True)


def build_wheel(pip: list[str]) -> Path:
    """The llama-cpp-python wheel for this machine, from the cache or compiled now."""
    flags = build_flags()
    what = "\n".join([LLAMA_CPP_PYTHON, *flags, compiler(), platform.platform(), cpu()])
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    folder = home() / "wheels" / key
    pattern = f"llama_cpp_python-{LLAMA_CPP_PYTHON}-*.whl"
    if wheel := next((folder / SLIM).glob(pattern), None):
        return wheel
    if wheel := next(folder.glob(pattern), None):  # of an earlier install.py
        return slim(wheel)
    if os.name != "nt" and not (
        shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    ):
        sys.exit(
            "no C++ compiler found; install one: Debian/Ubuntu `apt install build-essential "
            "python3-venv`, Fedora `dnf install gcc-c++ make`, macOS `xcode-select --install`"
        )
    print(f"compiling llama-cpp-python {LLAMA_CPP_PYTHON}, once: some minutes", flush=True)
    scratch = folder.with_name(f"{key}.{os.getpid()}")
    # pip keeps what it compiled under the version alone: another flag or CPU would get the old one.
    command = [*pip, "wheel", "--quiet", "--no-cache-dir", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python"]
    command += ["--wheel-dir", str(scratch), f"llama-cpp-python=={LLAMA_CPP_PYTHON}"]
    run(command, CMAKE_ARGS=" ".join(flags))
    whole = next(scratch.glob(pattern))
    slim(whole)
    whole.unlink()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        scratch.rename(folder)
    except OSError:  # somebody else finished first
        shutil.rmtree(scratch)
    return next((folder / SLIM).glob(pattern))


def slim(wheel: Path) -> Path:
    """A copy beside it, in SLIM, without the second copy of llama.cpp's libraries.

    llama-cpp-python installs them twice: into its own package, from which it loads them, and into
    lib/, where nothing looks (32 of 51 MB on Linux).
    """
    target = wheel.parent / SLIM / wheel.name
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if entry.filename.startswith("lib/"):
                continue
            data = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if not line.startswith("lib/")).encode()
            new.writestr(entry, data)  # with its permissions
    partial.replace(target)
    return target


def build_flags() -> list[str]:
    """CMake flags: ours, the cure for AMX where this compiler needs it, the user's last."""
    flags = list(FLAGS)
    if "amx_tile" in cpu() and gcc_breaks_amx(compiler()):
        flags.append(f"'-DCMAKE_CXX_FLAGS={AMX_FLAGS}'")
    return [*flags, *filter(None, [os.environ.get("CMAKE_ARGS")])]


def gcc_breaks_amx(version: str) -> bool:
    """Whether this is a GCC with bug 114098 (fixed in 11.5, 12.4, 13.3 and 14)."""
    found = re.search(r"\) (\d+)\.(\d+)\.", version)
    if "clang" in version or not found:
        return False
    major, minor = int(found[1]), int(found[2])
    return (major, minor) < {11: (11, 5), 12: (12, 4), 13: (13, 3)}.get(major, (14, 0))


def compiler() -> str:
    """First line of the C++ compiler's --version; empty if there is none on the PATH."""
    command = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if command is None:
        return ""
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0]


def cpu() -> str:
    """Model and feature flags: llama.cpp is compiled for exactly this CPU."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = first.splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


def run(command: list[str], **environment: str) -> None:
    """Run a command; its failure ends the installation with its exit code."""
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    main()
