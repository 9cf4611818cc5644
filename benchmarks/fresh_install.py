"""From nothing to the first vector, without a compiler: a folder of wheels, and the same by HTTP.

    python3 install.py --wheels wheels
    python benchmarks/fresh_install.py wheels [--by folder listing page] > fresh.json

Each time a fresh home and a PATH that holds Python and nothing else; the index of packages leads
nowhere, so that what is installed comes from the wheels. "listing" is what `python -m http.server`
makes of the folder, "page" a page of links to files that lie elsewhere; both at this machine's own
address where it has one, since pip treats the loopback as safe.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "make", "ninja")
WAYS = ("folder", "listing", "page")


def own_address() -> str:
    """This machine's, as others see it; the loopback where that is all there is."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # an address of examples: nothing is sent
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"


@contextmanager
def served(folder: Path) -> Generator[str]:
    """The folder's URL, by Python's own server."""
    with socket.socket() as probe:
        probe.bind((own_address(), 0))
        host, port = probe.getsockname()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", host]
    child = subprocess.Popen(
        [*command, "--directory", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex((host, port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://{host}:{port}/"
    finally:
        child.kill()
        child.wait()


@contextmanager
def wheelhouse(wheels: Path, way: str, scratch: Path) -> Generator[str]:
    """What `--wheelhouse` is given."""
    if way == "folder":
        yield str(wheels)
        return
    if way == "page":
        site = scratch / "site"
        site.mkdir()
        (site / "files").symlink_to(wheels)
        links = (f'<a href="files/{path.name}">{path.name}</a>' for path in wheels.glob("*.whl"))
        (site / "index.html").write_text(f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body>")
        wheels = site
    with served(wheels) as url:
        yield url


def one(wheels: Path, way: str) -> dict[str, object]:
    """One installation and one vector; seconds from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        programs, home = scratch / "bin", scratch / "home"
        programs.mkdir()
        home.mkdir()
        (programs / "python3").symlink_to(Path(sys.executable).resolve())
        here = [name for name in COMPILERS if shutil.which(name, path=str(programs))]
        assert not here, here
        environment = {
            "PATH": str(programs),
            "HOME": str(home),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "http://127.0.0.1:9/",
        }
        began = time.monotonic()
        with wheelhouse(wheels, way, scratch) as source:
            command = [str(programs / "python3"), str(ROOT / "install.py"), "--wheelhouse", source]
            subprocess.run(
                [*command, "--venv", str(home / "venv")],
                env=environment,
                cwd=home,
                check=True,
                stdout=sys.stderr,
            )
        installed_s = time.monotonic() - began
        subprocess.run(
            [home / "venv/bin/gguf-embed", "embed", "--text", "the first", "-o", "v.npy"],
            env=environment,
            cwd=home,
            check=True,
            stdout=sys.stderr,
        )
        return {
            "way": way,
            "installed_s": round(installed_s, 1),
            "first_vector_s": round(time.monotonic() - began, 1),
            "vector_bytes": (home / "v.npy").stat().st_size,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheels", type=Path, help="what `install.py --wheels` filled")
    parser.add_argument("--by", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    print(json.dumps([one(args.wheels.resolve(), way) for way in args.by], indent=1))


if __name__ == "__main__":
    main()
