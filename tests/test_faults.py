"""tests/FAULTS.md names tests that exist; and instances of its rows that have no other place."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from gguf_embed import ModelNotFound
from gguf_embed.catalog.catalog import BUILTIN, builtin_path
from gguf_embed.cli.console import counted
from gguf_embed.engine.choice import choose
from gguf_embed.io.write import RowContent, open_writer
from gguf_embed.machine.probe import probe
from gguf_embed.plan.settings import Settings
from gguf_embed.store import names

TESTS = Path(__file__).parent
TABLE = (TESTS / "FAULTS.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([A-F]\d+) \| (.*) \|$", TABLE, re.MULTILINE))


def test_every_row_is_there():
    numbers = {"A": 4, "B": 10, "C": 5, "D": 3, "E": 9, "F": 14}
    rows = [f"{letter}{i}" for letter, n in numbers.items() for i in range(1, n + 1)]
    assert list(ROWS) == [row for row in rows if row not in ("F1", "F2")]


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row: str):
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", ROWS[row])
    assert named or row == "B10"
    for file, name in named:
        assert f"\ndef {name}(" in (TESTS / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_a_model_whose_name_is_no_utf8_can_be_described(tmp_path: Path):
    about = {"model": os.fsdecode(b"n\xff")}
    target = str(tmp_path / "a.npy")
    with open_writer(target, stdout=None, inputs=(), content=RowContent()) as writer:
        writer.write([], np.empty((0, 2), np.float32), [])
        writer.finish(dim=2, about=about)
    assert json.loads((tmp_path / "a.npy.meta.json").read_text()) == about


def test_a_folder_is_no_model_and_says_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"is a directory, not a GGUF file; folder holds m\."):
        names.resolve("folder")


def test_nobody_asked_for_the_only_file(tmp_path: Path):
    machine = probe(store=tmp_path)
    for name, settings, reason in (
        (BUILTIN, Settings(), "built in"),
        (builtin_path(), Settings(), "the file that was named"),
        (BUILTIN, Settings(quant="q8_0"), "asked for"),
        (f"{BUILTIN}:Q8_0", Settings(), "asked for"),
    ):
        plan = choose(name, machine, settings).plan
        assert plan.reason == reason
        assert plan.why[0].startswith(f"quant Q8_0: {reason}")


def test_one_text_is_one_text():
    assert [counted(n, "text") for n in (0, 1, 2000)] == ["0 texts", "1 text", "2,000 texts"]


def test_no_example_is_too_slow():
    settings = hypothesis.settings.default
    assert settings is not None
    assert settings.deadline is None
    assert hypothesis.HealthCheck.too_slow in settings.suppress_health_check
