"""The Python packages that an offline machine installs gguf_embed from: one folder, through pip.

    collect(folder, HERE)                       # for a machine of this platform
    collect(folder, "manylinux_2_28_aarch64")   # for another

llama-cpp-python comes as its portable wheel, which runs on every CPU of its platform, where one is
installed or was made here (`make wheels`). Else it is the wheel that is installed here, for this
CPU alone, and for another platform its source, with what compiles it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gguf_embed import __version__
from gguf_embed.errors import BadOption, FetchFailed
from gguf_embed.store.local import file_sha256
from gguf_embed.system import paths
from gguf_embed.system.child import run_tool

# Room for them on a disk: they took 67 MiB with the wheel built here, 149 MiB with the source.
ROOM_BYTES: Final = 256 * 2**20

# How llama.cpp comes: for every CPU of the platform, for this machine's, as what is compiled there.
LlamaKind: TypeAlias = Literal["portable", "native", "source"]

HERE: Final = "here"
LLAMA: Final = "llama-cpp-python"
_PLATFORM: Final = re.compile(
    r"(?P<linux>manylinux|musllinux)_(?P<major>\d+)_(?P<minor>\d+)_(?P<arch>\w+)"
    r"|macosx_\d+_\d+_(arm64|x86_64|universal2)|win_(amd64|arm64)"
)
# Tags from before manylinux_2_N, which the newer pips do not derive from it either.
_OLD_MANYLINUX: Final = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_WITHOUT: Final = "or leave the Python packages out with --no-wheels"


def collect(
    folder: Path, platform: str = HERE, *, on_status: Callable[[str], None] | None = None
) -> LlamaKind:
    """Fill `folder` so that `pip install --no-index --find-links folder` works without network.

    `platform` is a wheel tag of the other machine, whose Python must be of this one's version.
    Returns how llama.cpp comes. Raises BadOption for no such tag, FetchFailed where pip cannot
    bring a package.
    """
    say = on_status or silent
    tags = platform_tags(platform)
    folder.mkdir(parents=True, exist_ok=True)
    say("gguf_embed's own wheel")
    own = _own_wheel(folder)
    kind: LlamaKind = "portable"
    more: list[str] = []
    portable = _portable_wheel(tags)
    if portable is not None:
        say(f"the portable wheel of {LLAMA}, for every CPU")
        llama = _wheel_from(portable, folder, portable.name)
    elif platform == HERE:
        say(
            f"the wheel of {LLAMA} that is installed here, for this CPU alone: `make wheels` in a "
            "checkout makes one for every CPU"
        )
        kind, llama = "native", _llama_wheel(folder)
    else:
        say(f"the source of {LLAMA}")
        kind, llama = "source", _llama_source(folder)
        more = [*_build_requirements(llama), "cmake", "ninja"]
        if platform.startswith("win"):
            more.append("colorama")  # pip asks this machine whether it is Windows
    say("what they depend on")
    command = ["download", "--only-binary", ":all:", "--dest", str(folder)]
    for tag in tags:
        command += ["--platform", tag]
    pip([*command, "--find-links", str(folder), f"{own}[cli]", str(llama), *more])
    return kind


def platform_tags(platform: str) -> tuple[str, ...]:
    """The tag and the older ones whose wheels such a machine runs too; none for HERE.

    Raises BadOption for what is no tag.
    """
    if platform == HERE:
        return ()
    match = _PLATFORM.fullmatch(platform)
    if match is None:
        raise BadOption(
            f"--for {platform}: not a platform of wheels; write it as pip does: "
            "manylinux_2_28_x86_64, manylinux_2_28_aarch64, musllinux_1_2_x86_64, "
            "macosx_14_0_arm64 or win_amd64"
        )
    if not match["linux"]:
        return (platform,)
    tags: list[str] = []
    for minor in range(int(match["minor"]), -1, -1):
        tags.append(f"{match['linux']}_{match['major']}_{minor}_{match['arch']}")
        if match["linux"] == "manylinux" and minor in _OLD_MANYLINUX:
            tags.append(f"{_OLD_MANYLINUX[minor]}_{match['arch']}")
    return tuple(tags)


def silent(text: str) -> None:
    """A status that nobody asked for."""


def pip(arguments: Sequence[str]) -> None:
    """Run this Python's pip; raises FetchFailed with what it said."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    done = run_tool(command, timeout_s=None)
    if done is None:
        raise FetchFailed(f"{sys.executable} cannot be started, so there is no pip; {_WITHOUT}")
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if said and said[-1].endswith("No module named pip"):
        raise FetchFailed(f"this Python has no pip: {sys.executable} -m ensurepip; {_WITHOUT}")
    errors = [line for line in said if line.startswith("ERROR:")] or said[-3:]
    raise FetchFailed(
        f"pip {arguments[0]} failed ({done.returncode}): {' '.join(errors) or 'it said nothing'}; "
        f"check the network and pip's index (pip config list), {_WITHOUT}"
    )


def _own_wheel(folder: Path) -> Path:
    """gguf_embed as it runs here: from its checkout, or from where it was installed from."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "models").is_dir():
        source = checkout
    else:
        source = _installed_from("gguf-embed")
    if source is None:
        raise FetchFailed(
            "gguf_embed was installed from an index or a folder that is gone, which leaves no "
            "wheel to carry; run this from its checkout (python3 install.py), install it from its "
            f"wheel (pip install ./gguf_embed-{__version__}-py3-none-any.whl), {_WITHOUT}"
        )
    return _wheel_from(source, folder, f"gguf_embed-{__version__}-*.whl")


def _portable_wheel(tags: Sequence[str]) -> Path | None:
    """The wheel for every CPU that is installed, or was made here; `tags`: of that platform."""
    installed = _installed_from(LLAMA)
    pattern = f"llama_cpp_python-{metadata.version(LLAMA)}-*.whl"
    made = sorted(paths.portable_wheels().glob(pattern))
    for wheel in (*([installed] if installed else []), *made):
        # "...-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64"
        of_platform = not tags or {*wheel.stem.rpartition("-")[2].split(".")} & {*tags}
        if wheel.suffix == ".whl" and of_platform and is_portable(wheel):
            return wheel
    return None


def is_portable(wheel: Path) -> bool:
    """Whether it has a library for each of several kinds of CPU."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return sum("ggml-cpu-" in name for name in archive.namelist()) > 1
    except (OSError, zipfile.BadZipFile):
        return False


def _llama_wheel(folder: Path) -> Path:
    """The wheel that is installed here; made by pip where it is no longer on this disk."""
    version = metadata.version(LLAMA)
    source = _installed_from(LLAMA) or f"{LLAMA}=={version}"
    return _wheel_from(source, folder, f"llama_cpp_python-{version}-*.whl")


def _wheel_from(source: Path | str, folder: Path, pattern: str) -> Path:
    """Copy a wheel, or have pip make one of a folder or a requirement."""
    if isinstance(source, Path) and source.suffix == ".whl":
        shutil.copyfile(source, folder / source.name)
    else:
        pip(["wheel", "--no-deps", "--wheel-dir", str(folder), str(source)])
    made = sorted(folder.glob(pattern))
    if not made:
        raise FetchFailed(f"{source} gave no {pattern}, the version that runs here; {_WITHOUT}")
    return made[0]


def _installed_from(package: str) -> Path | None:
    """The wheel or folder that a package was installed from, if it is still there, unchanged.

    pip notes it: https://packaging.python.org/en/latest/specifications/direct-url/
    """
    said: dict[str, Any] = {}
    try:
        text = metadata.distribution(package).read_text("direct_url.json")
        said = cast("dict[str, Any]", json.loads(text or "{}"))
    except (metadata.PackageNotFoundError, ValueError):
        return None
    url = urlsplit(str(said.get("url", "")))
    path = Path(url2pathname(url.path))
    if url.scheme != "file" or not path.exists():
        return None
    if path.is_file():
        sha256 = said.get("archive_info", {}).get("hashes", {}).get("sha256")
        return path if path.suffix == ".whl" and sha256 == file_sha256(path) else None
    return path


def _llama_source(folder: Path) -> Path:
    version = metadata.version(LLAMA)
    command = ["download", "--no-deps", "--no-binary", LLAMA, "--dest", str(folder)]
    pip([*command, f"{LLAMA}=={version}"])
    found = sorted(folder.glob(f"llama_cpp_python-{version}.tar.gz"))
    if not found:
        raise FetchFailed(f"pip brought no source of {LLAMA} {version}; {_WITHOUT}")
    return found[0]


def _build_requirements(source: Path) -> list[str]:
    """What a source distribution says that building it needs."""
    with tarfile.open(source) as archive:
        file = archive.extractfile(f"{source.name.removesuffix('.tar.gz')}/pyproject.toml")
        assert file is not None, "a source distribution has one"
        return list(tomllib.loads(file.read().decode())["build-system"]["requires"])
