"""install.py and native/wheel.py: what they install from, and what they say of a build."""

from __future__ import annotations

import importlib
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("install", ROOT, monkeypatch)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("wheel", ROOT / "native", monkeypatch)


def script(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the checkout as a module, which nobody else sees."""
    monkeypatch.syspath_prepend(folder)
    for each in (name, "build"):
        monkeypatch.delitem(sys.modules, each, raising=False)
    return importlib.import_module(name)


def test_the_second_copy_of_the_libraries_goes(tmp_path: Path, install: Any):
    wheel, record = tmp_path / "x-1-py3-none-any.whl", "x-1.dist-info/RECORD"
    names = ["x/__init__.py", "x/lib/libx.so", "lib/libx.so", "include/x.h"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o755 << 16
            archive.writestr(entry, name)
        archive.writestr(record, "".join(f"{name},sha256=x,1\n" for name in [*names, record]))
    thin = install.slim(wheel)
    kept = ["x/__init__.py", "x/lib/libx.so", "include/x.h"]
    with zipfile.ZipFile(thin) as archive:
        assert archive.namelist() == [*kept, record]
        assert archive.read("x/lib/libx.so") == b"x/lib/libx.so"
        assert archive.getinfo("x/lib/libx.so").external_attr == 0o755 << 16
        told = [line.split(",")[0] for line in archive.read(record).decode().splitlines()]
    assert told == [*kept, record]
    assert [path.name for path in thin.parent.iterdir()] == [wheel.name]


@pytest.fixture
def wheels(tmp_path: Path) -> str:
    """A folder of wheels, as far as its names tell."""
    (tmp_path / "llama_cpp_python-0.3.36-py3-none-any.whl").touch()
    return str(tmp_path)


def test_from_a_wheelhouse_nothing_is_compiled(
    install: Any, wheels: str, monkeypatch: pytest.MonkeyPatch
):
    """Of a whole one without the index; else what is missing comes from there."""
    asked: list[list[str]] = []

    def call(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=complete)

    monkeypatch.setattr(install.subprocess, "run", call)
    complete = False
    install.install_from(["python", "-m", "pip"], wheels, "cli")
    (command,) = asked
    assert command[-2:] == ["--no-index", "gguf-embed[cli]"]
    assert command[command.index("--only-binary") + 1] == "llama-cpp-python"

    def refuse(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=len(asked) == 2)

    monkeypatch.setattr(install.subprocess, "run", refuse)
    install.install_from(["python", "-m", "pip"], wheels, "cli")
    assert asked[-1][-2:] == ["--editable", f"{ROOT}[cli]"]
    assert asked[-1][asked[-1].index("--find-links") + 1] == wheels


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("http://wheels.lan:8000/portable/", "wheels.lan:8000"),
        ("http://me:secret@[fd00::2]/", "[fd00::2]"),
        ("https://wheels.lan/", None),  # whose certificate says who it is
        ("file:///srv/wheels", None),
    ],
)
def test_a_wheelhouse_at_a_url(
    url: str, trusted: str | None, install: Any, monkeypatch: pytest.MonkeyPatch
):
    """pip takes nothing by plain http from another machine, unless it is told to."""
    asked: list[list[str]] = []

    def call(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(install.subprocess, "run", call)
    install.install_from(["python", "-m", "pip"], url, "cli")
    (command,) = asked
    assert command[command.index("--find-links") + 1] == url
    after = dict(pairwise(command))
    assert after.get("--trusted-host") == trusted


def test_a_folder_without_llama_cpp_is_no_wheelhouse(install: Any, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"has no llama_cpp_python-.*; name a folder"):
        install.install_from(["python", "-m", "pip"], str(tmp_path), "cli")


def test_a_portable_wheel_is_made_once(install: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    made: list[list[str]] = []

    def make(command: list[str], **_: object) -> int:
        made.append(command)
        folder = Path(command[2])
        folder.mkdir(parents=True)
        (folder / "llama_cpp_python-0.3.36-py3-none-manylinux_2_34_x86_64.whl").write_text("made")
        return 0

    monkeypatch.setattr(install.subprocess, "call", make)
    monkeypatch.setattr(install, "check_compiler", lambda: None)
    first = install.build_portable(["python", "-m", "pip"])
    assert install.build_portable(["python", "-m", "pip"]) == first
    assert first.read_text() == "made"
    assert len(made) == 1
    assert [path.name for path in first.parent.parent.iterdir()] == ["portable"]
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_VULKAN=on")
    other = install.build_portable(["python", "-m", "pip"])
    assert len(made) == 2
    assert other.parent.parent == first.parent


def test_where_our_own_build_fails_pip_makes_the_wheel(
    install: Any, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))
    monkeypatch.setattr(install.subprocess, "call", lambda *_, **__: 1)
    monkeypatch.setattr(install, "check_compiler", lambda: None)

    def by_pip(command: list[str], **_: str) -> None:
        folder = Path(command[command.index("--wheel-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        name = "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("x-1.dist-info/RECORD", "")

    monkeypatch.setattr(install, "run", by_pip)
    wheel = install.build_wheel(["python", "-m", "pip"])
    assert wheel.parent.name == install.SLIM
    with pytest.raises(SystemExit, match="no portable wheel was made"):
        install.build_portable(["python", "-m", "pip"])


def test_without_a_compiler_the_next_step_is_told(install: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found; .*--wheelhouse.*apt install"):
        install.check_compiler()


def test_how_far_a_build_is(wheel: Any):
    """Of Ninja's lines, and of those of make."""
    lines = [
        "-- Configuring",
        "[0/2] Re-checking globbed directories...",
        "[1/320] Building ggml.c.o",
        "[41/320] Building x",
        "[319/320] y",
    ]
    told = list(wheel.progress(lines, iter([0.0, 80.0, 640.0]).__next__))
    assert told == [
        "compiling llama.cpp: 1 of 320",
        "compiling llama.cpp: 41 of 320, about 9 min left",
        "compiling llama.cpp: 319 of 320, a minute left",
    ]
    assert list(wheel.progress(["[ 50%] Building x"], iter([0.0]).__next__)) == [
        "compiling llama.cpp: 50 of 100 %"
    ]


def test_the_line_that_says_what_failed(wheel: Any):
    log = """\
[1/9] Building CXX object error_model.cpp.o
FAILED: ops.cpp.o
/usr/bin/c++ -O3 -c ops.cpp
ops.cpp:7:1: error: 'vec' was not declared in this scope
    7 | vec
ninja: build stopped: subcommand failed.
"""
    assert wheel.fault(log) == "ops.cpp:7:1: error: 'vec' was not declared in this scope"
    assert wheel.fault("") == "?"


def test_files_come_into_a_wheel_and_its_record(wheel: Any, tmp_path: Path):
    record = "x-1.dist-info/RECORD"
    with zipfile.ZipFile(tmp_path / "x-1-py3-none-any.whl", "w") as archive:
        archive.writestr("x/__init__.py", "")
        archive.writestr("x/lib/old.so", "old")
        archive.writestr(record, f"x/__init__.py,,\nx/lib/old.so,,\n{record},,\n")
    library = tmp_path / "new.so"
    library.write_text("new")
    (tmp_path / "out").mkdir()
    files = {"x/lib/old.so": library, "x/lib/new.so": library}
    made = wheel._with_files(tmp_path / "x-1-py3-none-any.whl", files, tmp_path / "out")
    with zipfile.ZipFile(made) as archive:
        assert sorted(archive.namelist()) == [
            *("x-1.dist-info/RECORD", "x/__init__.py", "x/lib/new.so", "x/lib/old.so"),
        ]
        assert archive.read("x/lib/old.so") == b"new"
        lines = archive.read(record).decode().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        *("x/__init__.py", "x/lib/old.so", "x/lib/new.so", record),
    ]
    assert lines[1].split(",")[1:] == [lines[2].split(",")[1], "3"]
