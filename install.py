"""Install gguf_embed into a virtual environment, with a llama.cpp made for this machine.

    python3 install.py                    # .venv with the command line
    python3 install.py --extras cli,dev   # and what the tests need
    CMAKE_ARGS="-DGGML_CUDA=on" python3 install.py
    python3 install.py --wheels wheels    # a folder that installs without a compiler, on any CPU
    python3 install.py --wheelhouse wheels      # from that folder, or from its URL

llama-cpp-python is compiled once, in some minutes, and the wheel is kept in the user's cache
directory under a name made of its version, its flags, the compiler and the CPU. A portable one
(--portable) has a library for each kind of CPU, and takes longer.
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
from urllib.parse import urlsplit

from gguf_embed.system.paths import home, portable_wheels  # needs nothing installed

ROOT = Path(__file__).parent
LLAMA_CPP_PYTHON = "0.3.36"
PATTERN = f"llama_cpp_python-{LLAMA_CPP_PYTHON}-*.whl"
SLIM = "slim"  # folder of the wheels that hold llama.cpp's libraries once
BUILD = ROOT / "build" / "llama.cpp"  # sources and objects: what was compiled is not again
# Part of the key of wheels that pip made: they are still good.
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
    parser.add_argument(
        "--portable", action="store_true", help="with a llama.cpp for every CPU of this platform"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="only make wheels of all that is needed, there"
    )
    parser.add_argument(
        "--wheelhouse", metavar="DIR|URL", help="take llama.cpp from there, and compile nothing"
    )
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (run before pip could refuse)
        sys.exit(f"Python 3.11 or newer is needed, this is {platform.python_version()}")

    python = args.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(args.venv, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    if args.wheels:
        make_wheels(pip, build_portable(pip), args.wheels, args.extras)
        return
    if args.wheelhouse:
        install_from(pip, args.wheelhouse, args.extras)
        return
    wheel = build_portable(pip) if args.portable else build_wheel(pip)
    wanted = [str(wheel), "--editable", f"{ROOT}[{args.extras}]"]
    if not (args.uv and installed_by_uv(pip, python, wanted)):
        run([*pip, "install", "--quiet", *wanted])
    if not args.portable:  # there it is inside
        build_accelerator(python)


def make_wheels(pip: list[str], llama: Path, folder: Path, extras: str) -> None:
    """Fill a folder with wheels from which `--wheelhouse` installs without network."""
    command = [*pip, "wheel", "--quiet", "--wheel-dir", str(folder), str(llama)]
    run([*command, f"{ROOT}[{extras}]"])
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels; next, where they are needed:")
    print(
        f"python3 install.py --wheelhouse {folder}, or pip install --no-index --find-links {folder}"
        f' "gguf-embed[{extras}]"'
    )


def install_from(pip: list[str], wheelhouse: str, extras: str) -> None:
    """Install from a folder of wheels, or the page of one; nothing is compiled.

    Where that lacks a package, gguf_embed is this checkout, and pip's index has the rest.
    """
    address = urlsplit(wheelhouse)
    if address.scheme not in ("http", "https", "file") and not any(Path(wheelhouse).glob(PATTERN)):
        sys.exit(
            f"{wheelhouse} has no {PATTERN}; name a folder that `install.py --wheels` has filled, "
            "or its URL"
        )
    install = [*pip, "install", "--quiet", "--find-links", wheelhouse]
    if address.scheme == "http":  # which pip passes over in silence, but for this machine's own
        print(f"{wheelhouse}: http, so nothing proves who sends it", flush=True)
        install += ["--trusted-host", address.netloc.rpartition("@")[2]]
    llama = ["--only-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA_CPP_PYTHON}"]
    whole = [*install, *llama, "--no-index", f"gguf-embed[{extras}]"]
    if subprocess.run(whole, capture_output=True, check=False).returncode:
        run([*install, *llama, "--editable", f"{ROOT}[{extras}]"])


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
    folder = home() / "wheels" / hashlib.sha256(what.encode()).hexdigest()[:16]
    if wheel := next((folder / SLIM).glob(PATTERN), None):
        return wheel
    if wheel := next(folder.glob(PATTERN), None):  # of an earlier install.py
        return slim(wheel)
    check_compiler()
    print(f"compiling llama-cpp-python {LLAMA_CPP_PYTHON}, once: some minutes", flush=True)
    made = make_wheel(pip, folder / SLIM, ["--native"], CMAKE_ARGS=" ".join(flags))
    return made or slim(made_by_pip(pip, folder, flags))


def made_by_pip(pip: list[str], folder: Path, flags: list[str]) -> Path:
    """The wheel as llama-cpp-python builds it itself: more is compiled, and nothing is told."""
    print("compiling it once more, in pip's way", flush=True)
    # pip keeps what it compiled under the version alone: another flag or CPU would get the old one.
    command = [*pip, "wheel", "--quiet", "--no-cache-dir", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "--wheel-dir", str(folder)]
    run([*command, f"llama-cpp-python=={LLAMA_CPP_PYTHON}"], CMAKE_ARGS=" ".join(flags))
    return next(folder.glob(PATTERN))


def build_portable(pip: list[str]) -> Path:
    """The wheel for every CPU of this platform, from the cache or compiled now.

    One with flags of the user, as for a GPU, is kept apart: `bundle` carries that without.
    """
    folder = portable_wheels()
    if flags := os.environ.get("CMAKE_ARGS"):
        folder /= hashlib.sha256(flags.encode()).hexdigest()[:16]
    if wheel := next(folder.glob(PATTERN), None):
        return wheel
    check_compiler()
    print("compiling llama.cpp for all kinds of CPUs, once: ten minutes and more", flush=True)
    return make_wheel(pip, folder, []) or sys.exit("no portable wheel was made")


def make_wheel(pip: list[str], folder: Path, words: list[str], **environment: str) -> Path | None:
    """Have native/wheel.py make a wheel, which appears whole in the folder; None where it fails."""
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    command = [pip[0], str(ROOT / "native" / "wheel.py"), str(scratch), "--build", str(BUILD)]
    if subprocess.call([*command, *words], env={**os.environ, **environment}):
        shutil.rmtree(scratch, ignore_errors=True)
        return None
    made = next(scratch.glob(PATTERN))
    folder.mkdir(parents=True, exist_ok=True)
    wheel = made.replace(folder / made.name)
    scratch.rmdir()
    return wheel


def check_compiler() -> None:
    """End with the next step where there is no compiler."""
    if os.name != "nt" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        sys.exit(
            "no C++ compiler found; take wheels that were made elsewhere (--wheelhouse), or "
            "install one: Debian/Ubuntu `apt install build-essential python3-venv`, Fedora "
            "`dnf install gcc-c++ make`, macOS `xcode-select --install`"
        )


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
