"""Which Python packages are carried, and how pip is asked for them; pip itself is played."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import pytest

from gguf_embed import __version__
from gguf_embed.bundle import wheels
from gguf_embed.bundle.wheels import collect, platform_tags
from gguf_embed.errors import BadOption, FetchFailed
from gguf_embed.system import paths

pytestmark = pytest.mark.slow

VERSION = metadata.version(wheels.LLAMA)
OWN = f"gguf_embed-{__version__}-py3-none-any.whl"
LLAMA = f"llama_cpp_python-{VERSION}-py3-none-linux_x86_64.whl"
SOURCE = f"llama_cpp_python-{VERSION}.tar.gz"
PYPROJECT = '[build-system]\nrequires = ["scikit-build-core[pyproject]>=0.9.2"]\n'
REAL_PIP = wheels.pip


class FakePip:
    """Leaves behind what pip would, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.own = OWN

    def __call__(self, arguments: Sequence[str]) -> None:
        self.asked.append([*arguments])
        words = [*arguments]
        if words[0] == "wheel":
            name = LLAMA if words[-1] == f"{wheels.LLAMA}=={VERSION}" else self.own
            (Path(words[words.index("--wheel-dir") + 1]) / name).write_text("made")
        elif "--no-binary" in words:
            self._source(Path(words[words.index("--dest") + 1]))

    @staticmethod
    def _source(folder: Path) -> None:
        with tarfile.open(folder / SOURCE, "w:gz") as archive:
            info = tarfile.TarInfo(f"llama_cpp_python-{VERSION}/pyproject.toml")
            info.size = len(PYPROJECT)
            archive.addfile(info, io.BytesIO(PYPROJECT.encode()))


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(wheels, "pip", fake)
    return fake


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that comes before the real one, for importlib.metadata."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def installed(site: Path, name: str, version: str, direct_url: object = None) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))


def wheel_url(path: Path, data: bytes = b"built here") -> dict[str, object]:
    """What pip notes of a wheel with these bytes."""
    hashes = {"sha256": sha256(data).hexdigest()}
    return {"url": path.as_uri(), "archive_info": {"hashes": hashes}}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------- this machine's


def test_the_wheel_that_is_installed_here_is_the_one_carried(
    pip: FakePip, site: Path, tmp_path: Path
):
    kept = tmp_path / "a folder with spaces" / LLAMA
    kept.parent.mkdir()
    kept.write_bytes(b"built here")
    installed(site, "llama_cpp_python", VERSION, wheel_url(kept))
    folder = tmp_path / "out" / "wheels"
    folder.parent.mkdir()
    said: list[str] = []
    collect(folder, on_status=said.append)
    assert (folder / LLAMA).read_bytes() == b"built here"
    own, download = pip.asked
    assert own == ["wheel", "--no-deps", "--wheel-dir", str(folder), str(wheels_root())]
    assert download == [
        *("download", "--only-binary", ":all:", "--dest", str(folder)),
        *("--find-links", str(folder), f"{folder / OWN}[cli]", str(folder / LLAMA)),
    ]
    assert len(said) == 3
    assert "for this CPU alone" in said[1]


def wheels_root() -> Path:
    return Path(wheels.__file__).parents[2]


@pytest.mark.parametrize("what", ["gone", "changed", "of an index", "a source", "of the net"])
def test_pip_makes_the_wheel_that_is_no_longer_here(
    pip: FakePip, site: Path, tmp_path: Path, what: str
):
    kept = tmp_path / (SOURCE if what == "a source" else LLAMA)
    if what != "gone":
        kept.write_bytes(b"other bytes" if what == "changed" else b"built here")
    url = wheel_url(kept)
    if what == "of the net":
        url["url"] = f"https://example.org/{LLAMA}"
    installed(site, "llama_cpp_python", VERSION, None if what == "of an index" else url)
    collect(tmp_path / "wheels")
    assert pip.asked[1][-1] == f"{wheels.LLAMA}=={VERSION}"
    assert (tmp_path / "wheels" / LLAMA).read_text() == "made"


# ------------------------------------------------------------------------- for every CPU

PORTABLE = f"llama_cpp_python-{VERSION}-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"


def write_portable(path: Path, kinds: Sequence[str] = ("x64", "haswell")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for kind in kinds:
            archive.writestr(f"llama_cpp/lib/libggml-cpu-{kind}.so", kind)
    return path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which install.py keeps portable wheels."""
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    return paths.portable_wheels()


def test_the_portable_wheel_goes_before_the_one_for_this_cpu(
    pip: FakePip, site: Path, kept: Path, tmp_path: Path
):
    here = tmp_path / LLAMA
    here.write_bytes(b"built here")
    installed(site, "llama_cpp_python", VERSION, wheel_url(here))
    write_portable(kept / PORTABLE)
    assert collect(tmp_path / "wheels") == "portable"
    assert names(tmp_path / "wheels") == {OWN, PORTABLE}
    assert pip.asked[-1][-1] == str(tmp_path / "wheels" / PORTABLE)


def test_the_portable_wheel_that_is_installed(pip: FakePip, site: Path, kept: Path, tmp_path: Path):
    data = write_portable(tmp_path / PORTABLE).read_bytes()
    installed(site, "llama_cpp_python", VERSION, wheel_url(tmp_path / PORTABLE, data))
    assert collect(tmp_path / "wheels") == "portable"
    assert not kept.exists()


@pytest.mark.parametrize(
    ("platform", "kind"),
    [
        ("manylinux_2_28_x86_64", "portable"),
        ("manylinux_2_35_x86_64", "portable"),
        ("manylinux_2_17_x86_64", "source"),  # an older Linux than it runs on
        ("manylinux_2_28_aarch64", "source"),
        ("win_amd64", "source"),
    ],
)
def test_a_portable_wheel_is_for_its_platform(
    pip: FakePip, kept: Path, tmp_path: Path, platform: str, kind: str
):
    write_portable(kept / PORTABLE)
    assert collect(tmp_path / "wheels", platform) == kind
    assert ("cmake" in pip.asked[-1]) == (kind == "source")


@pytest.mark.parametrize("what", ["of one CPU", "no archive", "of another version"])
def test_what_is_no_portable_wheel(pip: FakePip, kept: Path, tmp_path: Path, what: str):
    path = kept / PORTABLE
    write_portable(path, kinds=("haswell",))
    if what == "no archive":
        path.write_bytes(b"cut off")
    elif what == "of another version":
        path.unlink()
        write_portable(kept / PORTABLE.replace(VERSION, "0.3.1"))
    assert collect(tmp_path / "wheels", "manylinux_2_28_x86_64") == "source"


# ------------------------------------------------------------------------------ our own


@pytest.fixture
def no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wheels, "__file__", str(tmp_path / "site" / "gguf_embed" / "wheels.py"))


@pytest.mark.usefixtures("no_checkout")
def test_installed_from_a_wheel_that_is_still_here(pip: FakePip, site: Path, tmp_path: Path):
    kept = tmp_path / OWN
    kept.write_bytes(b"built here")
    installed(site, "gguf_embed", __version__, wheel_url(kept))
    collect(tmp_path / "wheels")
    assert (tmp_path / "wheels" / OWN).read_bytes() == b"built here"


@pytest.mark.usefixtures("no_checkout")
def test_installed_from_a_folder(pip: FakePip, site: Path, tmp_path: Path):
    installed(site, "gguf_embed", __version__, {"url": tmp_path.as_uri(), "dir_info": {}})
    collect(tmp_path / "wheels")
    assert pip.asked[0][-1] == str(tmp_path)
    pip.own = "gguf_embed-99-py3-none-any.whl"  # the folder has gone on since
    with pytest.raises(FetchFailed, match=r"gave no gguf_embed-[\d.]+-\*\.whl, the version that"):
        collect(tmp_path / "other")


@pytest.mark.usefixtures("no_checkout", "pip")
def test_installed_from_an_index_leaves_nothing_to_carry(site: Path, tmp_path: Path):
    installed(site, "gguf_embed", __version__)
    with pytest.raises(FetchFailed, match=r"no wheel to carry; .*leave the .* with --no-wheels"):
        collect(tmp_path / "wheels")


# ------------------------------------------------------------------------------- another's


def test_another_machine_gets_the_source_and_what_compiles_it(pip: FakePip, tmp_path: Path):
    folder = tmp_path / "wheels"
    collect(folder, "macosx_14_0_arm64")
    _, source, download = pip.asked
    assert source == [
        *("download", "--no-deps", "--no-binary", wheels.LLAMA, "--dest", str(folder)),
        f"{wheels.LLAMA}=={VERSION}",
    ]
    assert download == [
        *("download", "--only-binary", ":all:", "--dest", str(folder)),
        *("--platform", "macosx_14_0_arm64", "--find-links", str(folder)),
        *(f"{folder / OWN}[cli]", str(folder / SOURCE)),
        *("scikit-build-core[pyproject]>=0.9.2", "cmake", "ninja"),
    ]
    assert names(folder) == {OWN, SOURCE}


def test_windows_needs_one_package_more(pip: FakePip, tmp_path: Path):
    collect(tmp_path / "wheels", "win_amd64")
    assert pip.asked[-1][-1] == "colorama"


@pytest.mark.parametrize(
    ("platform", "first", "n", "among"),
    [
        ("manylinux_2_28_x86_64", "manylinux_2_28_x86_64", 32, "manylinux2014_x86_64"),
        ("manylinux_2_17_aarch64", "manylinux_2_17_aarch64", 21, "manylinux_2_5_aarch64"),
        ("musllinux_1_2_x86_64", "musllinux_1_2_x86_64", 3, "musllinux_1_1_x86_64"),
        ("macosx_14_0_arm64", "macosx_14_0_arm64", 1, "macosx_14_0_arm64"),
        ("win_amd64", "win_amd64", 1, "win_amd64"),
    ],
)
def test_older_wheels_of_a_platform_are_taken_too(platform: str, first: str, n: int, among: str):
    tags = platform_tags(platform)
    assert (tags[0], len(tags)) == (first, n)
    assert among in tags


@pytest.mark.parametrize(
    "platform", ["linux", "linux_x86_64", "win32", "manylinux_2_28", "", "win_amd64\n"]
)
def test_what_is_no_platform(platform: str):
    with pytest.raises(BadOption, match="write it as pip does: manylinux_2_28_x86_64"):
        platform_tags(platform)


# ------------------------------------------------------------------------------ the real pip


def test_what_pip_says_is_told(tmp_path: Path):
    with pytest.raises(FetchFailed, match=r"pip download failed .*: ERROR: .*none.*--no-wheels"):
        REAL_PIP(["download", "--no-index", "--dest", str(tmp_path), "no-such-package-is-there"])


def test_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(FetchFailed, match=r"this Python has no pip: .* -m ensurepip; or leave"):
        REAL_PIP(["download", "x"])


@pytest.mark.network
def test_a_wheel_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The one call of it that is real: everything else about packages takes seconds of network."""
    made: list[Path] = []

    def only_ours(arguments: Sequence[str]) -> None:
        if arguments[0] == "wheel" and arguments[-1] == str(wheels_root()):
            REAL_PIP(arguments)
            made.append(tmp_path / "wheels" / OWN)
        elif arguments[0] == "wheel":
            (tmp_path / "wheels" / LLAMA).write_text("made")

    monkeypatch.setattr(wheels, "pip", only_ours)
    collect(tmp_path / "wheels")
    assert made[0].stat().st_size > 20_000_000  # the built-in model is in it
