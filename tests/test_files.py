"""Files appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import ast
import errno
import gc
import os
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
import sources
from sources import nodes

from gguf_embed.errors import DoesNotFit, OutputFailed
from gguf_embed.system import files
from gguf_embed.system.files import WholeFile, check_free, whole_folder, write_whole


def test_it_appears_at_commit(tmp_path: Path):
    path = tmp_path / "out.bin"
    with WholeFile(path) as whole:
        whole.file.write(b"all of it")
        assert not path.exists()
        whole.commit()
        assert path.read_bytes() == b"all of it"
    assert [p.name for p in tmp_path.iterdir()] == ["out.bin"]


def test_without_commit_the_older_one_stays(tmp_path: Path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with WholeFile(path) as whole:
        whole.file.write(b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.bin"]


def test_it_obeys_the_umask_and_follows_links(tmp_path: Path):
    (tmp_path / "link").symlink_to("real")
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "link", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


@pytest.mark.slow
def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path):
    path = tmp_path / "a[1].npy"  # a name that is a pattern, too
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gguf_embed.system.files import WholeFile\n"
        f"whole = WholeFile(Path({str(path)!r})); whole.file.write(b'x' * 100)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".another.12345678.tmp").touch()
    write_whole(path, b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".another.12345678.tmp", path.name]


@pytest.mark.slow
def test_a_signal_while_the_file_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(file: BinaryIO) -> bool:
        file.close()
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "take", interrupt)
    with suppress(KeyboardInterrupt):
        WholeFile(tmp_path / "out.bin")
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_fork_that_ends_keeps_the_file_of_its_parent(tmp_path: Path):
    code = (
        "import os; from pathlib import Path\n"
        "from gguf_embed.system.files import WholeFile\n"
        f"whole = WholeFile(Path({str(tmp_path / 'out.bin')!r})); whole.file.write(b'x')\n"
        "child = os.fork()\n"
        "if child: os.waitpid(child, 0); whole.commit()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.bin"]


def test_a_run_that_lives_keeps_its_file(tmp_path: Path):
    path = tmp_path / "out.bin"
    with WholeFile(path) as slow:
        slow.file.write(b"slow")
        write_whole(path, b"quick")
        slow.commit()
    assert path.read_bytes() == b"slow"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EIO])
def test_a_refusal_has_the_numbers_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputFailed, match=rf"out\.bin: not written: {os.strerror(code)}") as said:
        write_whole(path, b"new")
    assert "the older file of that name is unchanged" in str(said.value)
    assert ("bytes free on that disk" in str(said.value)) == (code in (errno.ENOSPC, errno.EFBIG))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.bin"]


def test_a_place_that_cannot_be(tmp_path: Path):
    with pytest.raises(OutputFailed, match=f"mkdir -p {tmp_path}/none"):
        write_whole(tmp_path / "none" / "out.bin", b"")
    with pytest.raises(OutputFailed, match="is a directory or a device"):
        write_whole(tmp_path, b"")
    write_whole(tmp_path / "none" / "out.bin", b"1", make_folder=True)
    assert (tmp_path / "none" / "out.bin").read_bytes() == b"1"


def test_a_folder_appears_whole(tmp_path: Path):
    target = tmp_path / "carry"
    with suppress(KeyError), whole_folder(target) as folder:
        (folder / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    target.mkdir()  # empty: allowed
    with whole_folder(target) as folder:
        (folder / "all").touch()
    assert [p.name for p in target.iterdir()] == ["all"]
    with (
        pytest.raises(OutputFailed, match="cannot take its name"),
        whole_folder(target) as folder,
    ):
        (folder / "other").touch()
    assert [p.name for p in target.iterdir()] == ["all"]
    assert [p.name for p in tmp_path.iterdir()] == ["carry"]


def test_free_disk(tmp_path: Path):
    free = files.free_bytes(tmp_path / "not" / "made")
    assert free
    check_free(1, tmp_path, "it")
    with pytest.raises(DoesNotFit, match=r"it takes [\d,]+ MiB, the disk of .* name another") as e:
        check_free(2 * free, tmp_path, "it", "name another")
    assert e.value.needed_bytes == 2 * free


# What makes a temporary file, or starts a process, belongs to one place each.
OWNERS = {
    "subprocess.Popen": "system/child.py",
    "subprocess.run": "system/child.py",
    "subprocess.check_output": "system/child.py",
    "os.replace": "system/files.py",
    "tempfile.NamedTemporaryFile": "system/files.py",
    "tempfile.mkstemp": "system/files.py",
    "tempfile.TemporaryFile": "system/child.py",
}


def second_places(path: str, source: str) -> list[str]:
    """Calls in a file of the package that only another file may make."""
    found: list[str] = []
    for node in nodes(source):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            owner = OWNERS.get(called, path)
            temporary = called.endswith(".open") and any(
                isinstance(argument, ast.Constant) and "x" in str(argument.value)
                for argument in node.args
            )
            if owner != path or (temporary and path != "system/files.py"):
                found.append(f"{path}: {called} is for {OWNERS.get(called, 'system/files.py')}")
    return found


def test_one_place_writes_and_one_starts_children():
    assert [
        fault for path, source in sources.files().items() for fault in second_places(path, source)
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(['x'])",
        "with tempfile.NamedTemporaryFile() as f: pass",
        "path.open('xb')",
        "os.replace(a, b)",
    ],
)
def test_a_second_place_is_caught(source: str):
    (found,) = second_places("store/hub.py", source)
    assert "is for system/" in found
