"""What is kept in a file is read as its shape, or counts as absent; nothing else happens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.system.kept import check_kept, keep, read_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    score: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    n: int
    flag: bool
    inner: Inner | None
    by_name: Mapping[str, Inner]
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError("n is below 0")


VALUE = Outer(
    name="é",
    n=3,
    flag=True,
    inner=Inner(score=0.5),
    by_name={"x": Inner(score=1, kind="b")},
    numbers=(1, 2),
)
GOOD: dict[str, Any] = {
    "name": "é",
    "n": 3,
    "flag": True,
    "inner": {"score": 0.5},
    "by_name": {"x": {"score": 1, "kind": "b"}},
    "numbers": [1, 2],
}


def test_what_is_kept_comes_back(tmp_path: Path):
    path = tmp_path / "not" / "made" / "value.json"
    keep(path, VALUE)
    assert read_kept(path, Outer) == VALUE
    keep(path, (VALUE, VALUE))
    assert read_kept(path, tuple[Outer, ...]) == (VALUE, VALUE)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_default_may_be_missing(tmp_path: Path):
    (tmp_path / "a").write_text(json.dumps(GOOD | {"inner": None}))
    assert read_kept(tmp_path / "a", Outer) == Outer(
        name="é", n=3, flag=True, inner=None, by_name=VALUE.by_name, numbers=(1, 2)
    )


WRONG: dict[str, str] = {
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "a number": "3",
    "no JSON": "{",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep inside": json.dumps(GOOD).replace("3", "[" * 100_000 + "]" * 100_000),
    **{
        name: json.dumps(GOOD | change)
        for name, change in {
            "an unknown key": {"other": 1},
            "text for a number": {"n": "3"},
            "true for a number": {"n": True},
            "a fraction for a whole number": {"n": 3.5},
            "a number for true": {"flag": 1},
            "null for text": {"name": None},
            "an object for a list": {"numbers": {}},
            "a list for an object": {"by_name": []},
            "text inside": {"inner": {"score": "0.5"}},
            "an unknown choice": {"inner": {"score": 1, "kind": "c"}},
            "an unhashable choice": {"inner": {"score": 1, "kind": []}},
            "an unknown key inside": {"by_name": {"x": {"score": 1, "more": 2}}},
            "NaN": {"inner": {"score": float("nan")}},
            "infinity": {"inner": {"score": float("inf")}},
            "what the class refuses": {"n": -1},
        }.items()
    },
    "too large a number": json.dumps(GOOD).replace("0.5", "1e999"),
    "an endless number": json.dumps(GOOD).replace("0.5", "9" * 5000),
    "a number of 400 digits": json.dumps(GOOD).replace("0.5", "9" * 400),
    "a missing key": json.dumps({k: v for k, v in GOOD.items() if k != "name"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_right_counts_as_absent(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "value.json"
    path.write_text(WRONG[name])
    with caplog.at_level(logging.INFO):
        assert read_kept(path, Outer) is None
    assert "measured anew" in caplog.text
    with pytest.raises(ValueError, match=r"\w"):
        check_kept(path, Outer)
    keep(path, VALUE)
    assert read_kept(path, Outer) == VALUE


def test_bytes_and_folders_count_as_absent(tmp_path: Path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert read_kept(tmp_path / "bytes", Outer) is None
    assert read_kept(tmp_path, Outer) is None
    assert check_kept(tmp_path / "bytes" / "below", Outer) is None


def test_what_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO):
        keep(tmp_path / "file" / "value.json", VALUE)
        keep(tmp_path / "value.json", {"speed": float("nan")})
    assert caplog.text.count("not kept") == 2
    assert not (tmp_path / "value.json").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*GOOD, "score", "kind"]), inner, max_size=7)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(json_values)
def test_any_json_is_a_value_or_absent(tmp_path_factory: pytest.TempPathFactory, value: object):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    assert isinstance(read_kept(path, Outer), Outer | None)
