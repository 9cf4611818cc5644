"""install.py: the wheel of llama-cpp-python holds llama.cpp's libraries once."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_second_copy_of_the_libraries_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "install", raising=False)
    import install

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
