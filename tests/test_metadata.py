"""What a file says of itself: front matter, conditions on it, and searches that go by it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.index.index import Index
from gguf_embed.index.making import Wanted, make_index
from gguf_embed.index.metadata import files_that_hold, metadata_of, parse_conditions
from gguf_embed.index.update import UpdateReport
from gguf_embed.io.front_matter import front_matter
from gguf_embed.testing import FakeEmbedder

MAY = 1714564800 * 10**9  # 2024-05-01, noon in UTC


# -- front matter ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlang: en\n---\n# Title\n", {"lang": ("en",)}),
        ("---\ntags: [a, b c]\nIn:\n- x\n- 2\n---\n", {"tags": ("a", "b c"), "in": ("x", "2")}),
        # What YAML would make something else of.
        ("---\nlang: no\nversion: 1.10\n---\n", {"lang": ("no",), "version": ("1.10",)}),
        ("---\ndate: 2024-05-01 # it\nat: 1:30\n---", {"date": ("2024-05-01",), "at": ("1:30",)}),
        ('---  \ntitle: "a: b"\nempty:\nnone: ""\n...\n', {"title": ("a: b",)}),
        ("---\nnested: {a: b}\nlists: [[a], b]\n---\n", {"lists": ("b",)}),
        ("---\nonly: one\nonly: last\n---", {"only": ("last",)}),
        ("---\nprose between two rules\n---\nmore\n", {}),
        ("---\n---\n# Title\n", {}),
        ("---\nlang: en\n# never ended\n", {}),
        ("# Title\n---\nlang: en\n---\n", {}),
        ("----\nlang: en\n---\n", {}),
        ("---\na: " + "x" * 70_000 + "\n---\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_front_matter(text: str, expected: dict[str, tuple[str, ...]]):
    assert front_matter(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("---\nlang: en\ntags: [a, b\n---\n", "line 4: its front matter is no YAML: "),
        ("---\n{{ a }}: x\n---\n", "line 2: its front matter is no YAML: "),
        ("---\na: \x07\n---\n", "its front matter is no YAML"),
        ("---\na: " + "[" * 2_000 + "\n---\n", "line 2: its front matter is no YAML: exceeded"),
    ],
)
def test_front_matter_that_is_none(text: str, reason: str):
    with pytest.raises(BadInput) as refused:
        front_matter(text)
    assert str(refused.value).startswith(reason)


def test_it_is_read_without_the_parser_in_c(monkeypatch: pytest.MonkeyPatch):
    yaml = pytest.importorskip("yaml")
    monkeypatch.delattr(yaml, "CBaseLoader", raising=False)
    assert front_matter("---\nlang: no\n---\n") == {"lang": ("no",)}
    with pytest.raises(BadInput, match="nested too deeply"):
        front_matter("---\na: " + "[" * 600 + "\n---\n")


@given(st.text(max_size=200))
def test_any_text_has_front_matter_or_says_why_not(text: str):
    for each in (text, f"---\n{text}\n---\n", f"---\na: {text}\n---\n"):
        try:
            found = front_matter(each)
        except BadInput:
            continue
        assert all(key == key.casefold() and values for key, values in found.items())


# -- conditions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "yes", "no"),
    [
        ("lang=en", ["en", "EN"], ["en-GB", "de", ""]),
        ("title = a = b", ["a = b"], ["a"]),
        ("pages>=10", ["10", "10.5", "9e9"], ["9", "ten", "2024-01-01"]),
        ("pages<=10", ["10.0", "-3"], ["10.1", "ten"]),
        ("pages=10", ["10", "10.0"], ["1", "100"]),
        ("date>=2024-05", ["2024-05-01", "2024-05-31T23:00:00", "2025"], ["2024-04-30", "soon"]),
        ("date<=2024-05", ["2024-05-31", "2024-05-31 10:00", "2023"], ["2024-06-01"]),
        ("date=2024-05-01", ["2024-05-01", "2024-05-01T10:00:00+02:00"], ["2024-05-02", "2024"]),
        ("date<=2024-05-01 10:00", ["2024-05-01T10:00:59", "2024-05-01"], ["2024-05-01 10:01"]),
        ("date>=2024", ["2024-01-01", "2024", "2025-01-01"], ["2023-12-31"]),
        ("version=1.10", ["1.10", "1.1"], ["1.2"]),
    ],
)
def test_conditions(condition: str, yes: list[str], no: list[str]):
    (parsed,) = parse_conditions([condition])
    assert [value for value in yes if not parsed.holds(value)] == []
    assert [value for value in no if parsed.holds(value)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date", "write KEY=VALUE"),
        ("=en", "write KEY=VALUE"),
        ("lang=", "write KEY=VALUE"),
        ("a>b", "write KEY=VALUE"),
        ("date=>2024", "write KEY=VALUE"),
        ("lang>=en", ">= compares numbers and dates"),
        ("pages<=nan", "<= compares numbers and dates"),
    ],
)
def test_what_is_no_condition(text: str, message: str):
    with pytest.raises(BadOption, match=message):
        parse_conditions([text])


def test_all_conditions_must_hold_for_a_value_each():
    values = {"tags": [(1, "a"), (1, "b"), (2, "a")], "lang": [(1, "en"), (2, "en"), (3, "en")]}

    def holding(*where: str) -> set[int]:
        return files_that_hold(parse_conditions(where), values.__getitem__)

    assert holding("lang=en") == {1, 2, 3}
    assert holding("TAGS=a", "lang=en") == {1, 2}
    assert holding("tags=a", "tags=b") == {1}
    assert holding("tags=c") == set()


def test_every_file_has_an_ending_and_a_date():
    found = metadata_of(PurePath("a.B.MD"), MAY)
    assert found["ext"] == ("md",)
    assert found["modified"][0][:10] in ("2024-05-01", "2024-05-02")  # by the clock here
    assert metadata_of(PurePath("Makefile"), 10**30) == {}


# -- in an index -------------------------------------------------------------------------------

DIARY = {
    "en.md": "---\nlang: en\ntags: [travel, rail]\ndate: 2024-05-01\n---\n# Trains\n\nBy train.\n",
    "de.md": "---\nlang: de\ntags: travel\ndate: 2023\nmodified: 2020\n---\n# Bahn\n\nBy train.\n",
    "notes.txt": "by train\n",
}


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    folder = tmp_path / "diary"
    folder.mkdir()
    for name, text in DIARY.items():
        (folder / name).write_text(text)
        os.utime(folder / name, ns=(MAY, MAY))
    return folder


def make(place: Path, *folders: Path, **wanted: object) -> UpdateReport:
    with FakeEmbedder.open() as embedder:
        what = Wanted(folders=dict.fromkeys(folders), **wanted)  # type: ignore[arg-type]
        return make_index(place, embedder, what, model="fake")


def ask(place: Path, *where: str, **how: object) -> set[str]:
    with Index.open(place) as index:
        hits = index.search("train", by="words", where=where, **how)  # type: ignore[arg-type]
        with FakeEmbedder.open() as embedder:
            for by in ("meaning", "both"):
                found = index.search("train", embedder, by=by, where=where, **how)  # type: ignore[arg-type]
                assert {hit.path for hit in found} == {hit.path for hit in hits}
        return {hit.path.name for hit in hits}


def test_answers_are_chosen_by_metadata(diary: Path, tmp_path: Path):
    place = tmp_path / "made.index"
    make(place, diary)
    assert ask(place, "lang=en") == {"en.md"}
    assert ask(place, "tags=travel") == {"en.md", "de.md"}
    assert ask(place, "tags=travel", "date>=2024") == {"en.md"}
    assert ask(place, "tags=travel", "date>=2024", paths=["de.md"]) == set()
    assert ask(place, "ext=txt") == {"notes.txt"}
    # What a document says of itself goes before what the disk says.
    assert ask(place, "modified>=2024") == {"en.md", "notes.txt"}
    assert ask(place, "modified=2020") == {"de.md"}
    assert ask(place, "lang=fr") == set()
    with Index.open(place) as index:
        assert index.status().metadata_keys == ("date", "ext", "lang", "modified", "tags")
        for hit in index.search("train", by="words"):
            text = DIARY[hit.path.name]
            assert hit.passage.text == text[hit.passage.start : hit.passage.end]
        first = index.search("lang de", by="words")[0]
        assert first.passage.start == 0  # the front matter is in a passage, as all of the text is
        with pytest.raises(BadInput, match="--where colour: no file of the index has it"):
            index.search("train", by="words", where=["colour=red"])
        with pytest.raises(BadOption, match="write KEY=VALUE"):
            index.search("train", by="words", where=["colour"])


def test_metadata_follows_its_file(diary: Path, tmp_path: Path):
    place = tmp_path / "made.index"
    make(place, diary)
    (diary / "en.md").write_text(DIARY["en.md"].replace("lang: en", "lang: fr"))
    (diary / "de.md").rename(diary / "moved.md")
    os.utime(diary / "notes.txt", ns=(MAY, MAY + 400 * 86_400 * 10**9))
    report = make(place)
    assert (report.n_changed, report.n_moved, report.n_unchanged) == (1, 1, 1)
    assert ask(place, "lang=en") == set()
    assert ask(place, "lang=fr") == {"en.md"}
    assert ask(place, "lang=de") == {"moved.md"}
    assert ask(place, "modified>=2025", "ext=txt") == {"notes.txt"}
    (diary / "moved.md").unlink()
    make(place)
    with pytest.raises(BadInput, match="there are date, ext, lang, modified, tags"):
        ask(place, "colour=red")
    assert ask(place, "lang=de") == set()
    assert ask(place, "tags=travel") == {"en.md"}


def test_front_matter_that_is_not_understood_is_named(diary: Path, tmp_path: Path):
    (diary / "bad.md").write_text("---\ntags: [a\n---\n# Trains\n\nBy train.\n")
    report = make(tmp_path / "made.index", diary)
    ((path, reason),) = report.no_metadata
    assert (path.name, reason[:33]) == ("bad.md", "line 3: its front matter is no YA")
    assert ask(tmp_path / "made.index", "ext=md") == {"bad.md", "en.md", "de.md"}


def before_metadata(place: Path) -> None:
    """Make of an index what the version before this one would have made."""
    database = sqlite3.connect(place / "1" / "tables.sqlite")
    database.executescript("DROP TRIGGER metadata_gone; DROP TABLE metadata;")
    database.close()


def test_an_older_index_answers_and_gets_its_metadata_without_embedding(
    diary: Path, tmp_path: Path
):
    place = tmp_path / "made.index"
    make(place, diary)
    before_metadata(place)
    assert ask(place) == {*DIARY}
    with pytest.raises(BadInput, match=r"embeds nothing again: gguf-embed index -o made\.index"):
        ask(place, "lang=en")
    report = make(place)
    assert (report.n_unchanged, report.n_embedded) == (3, 0)
    assert ask(place, "lang=en") == {"en.md"}
    assert ask(place, "ext=txt") == {"notes.txt"}


def test_a_version_that_knows_no_metadata_leaves_none_behind(diary: Path, tmp_path: Path):
    place = tmp_path / "made.index"
    make(place, diary)
    database = sqlite3.connect(place / "1" / "tables.sqlite")
    with database:
        database.execute("DELETE FROM files WHERE name = 'en.md'")
    assert database.execute("SELECT * FROM metadata WHERE value = 'en'").fetchall() == []
    database.close()
