"""`gguf-embed index`, `search --index` and `show`: what they print, and what they refuse."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from commands import run_command

from gguf_embed.cli import console, options
from gguf_embed.plan.settings import Settings
from gguf_embed.testing import FakeEmbedder, FakeReranker

Run = Callable[..., tuple[int, str, str]]
opened: list[tuple[str, str | None]] = []


def open_fake(
    model: str, settings: Settings | None = None, *, quiet: bool = False, isolated: bool = False
) -> FakeEmbedder:
    opened.append((model, settings.quant if settings else None))
    return FakeEmbedder.open(model, settings=settings, dim=32 if model == "other" else 64)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """run(*arguments) -> (exit code, standard output, standard error), with the fakes."""
    monkeypatch.setattr(options, "open_embedder", open_fake)
    monkeypatch.setattr(options, "open_reranker", lambda model, *_, **how: FakeReranker.open())
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    opened.clear()
    return partial(run_command, capsys)


@pytest.fixture
def handbook(run: Run, tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "refunds.md").write_text("# Refunds\n\nWe refund late parcels.\n\nAt once.\n")
    (folder / "travel.md").write_text("# Travel\n\nTrains are booked by the office.\n")
    code, _, err = run("index", "handbook", "-o", "hb", "--about", "handbook=house rules")
    assert code == 0, err
    return folder


def test_index_says_what_it_did(run: Run, handbook: Path):
    (handbook / "late.txt").write_bytes(b"\xff\xff")
    (handbook / "image.png").touch()
    (handbook / "travel.md").write_text("# Travel\n\nTrains are booked by you.\n")
    code, out, err = run("index", "-o", "hb")
    assert (code, out) == (0, "")
    assert re.search(
        r"hb: files: 1 changed, 1 unchanged; 1 passage embedded, 0 had a vector, 10 tokens in "
        r"[\d.]+ s; now 2 passages",
        err,
    )
    assert "not read: handbook/late.txt: line 1: not UTF-8" in err
    assert "1 other file passed over (.png)" in err
    found = json.loads(run("index", "-o", "hb", "--json")[1])
    assert found["format"] == "gguf-embed-index/1"
    assert (found["n_unchanged"], found["n_passages"], found["passed_over"]) == (2, 2, {".png": 1})
    assert found["unread"][0]["source"] == str(handbook / "late.txt")


def test_the_cache_is_for_all_that_embed(run: Run, handbook: Path):
    assert "2 passages embedded" in run("index", "handbook", "-o", "one", "--cache")[2]
    said = run("index", "handbook", "-o", "two", "--cache")[2]
    assert "0 passages embedded, 2 had a vector" in said
    found = json.loads(run("index", "-o", "two", "--rebuild", "--cache", "--json")[1])
    assert (found["n_embedded"], found["n_cached"]) == (0, 2)
    plain = run("search", "late parcels", "handbook")[1]
    assert [run("search", "late parcels", "handbook", "--cache")[1] for _ in "12"] == [plain] * 2
    code, _, err = run("search", "late parcels", "--index", "hb", "--cache")
    assert (code, "--cache: is for a search without --index" in err) == (2, True)


def test_watching_updates_after_each_change(
    run: Run, handbook: Path, monkeypatch: pytest.MonkeyPatch
):
    watched: list[tuple[list[Path], Path]] = []

    def changed(folders: list[Path], *, place: Path) -> Iterator[None]:
        watched.append((folders, place))
        (handbook / "bread.md").write_text("# Bread\n\nFlour and water.\n")
        yield None
        yield None  # a change that changes nothing
        (handbook / "travel.md").unlink()
        yield None
        raise KeyboardInterrupt

    monkeypatch.setattr("gguf_embed.index.watch.changed", changed)
    code, _, err = run("index", "-o", "hb", "--watch")
    assert code == 130
    ((folders, place),) = watched
    assert (folders, place.name) == ([handbook], "hb")
    assert re.findall("hb: files: [^;]*", err) == [
        "hb: files: 2 unchanged",
        "hb: files: 1 new, 2 unchanged",
        "hb: files: 1 deleted, 2 unchanged",
    ]
    assert "watching handbook; Ctrl-C ends" in err
    assert "bread.md" in run("search", "flour", "--index", "hb", "--by", "words")[1]


@pytest.mark.slow
def test_changes_are_seen_but_those_of_the_index(tmp_path: Path):
    pytest.importorskip("watchfiles")
    from gguf_embed.index.watch import changed

    folder, place = tmp_path / "texts", tmp_path / "texts" / "made.index"
    place.mkdir(parents=True)
    seen: queue.SimpleQueue[None] = queue.SimpleQueue()

    def watch() -> None:
        for each in changed([folder, tmp_path / "absent"], place=place):
            seen.put(each)

    threading.Thread(target=watch, daemon=True).start()
    deadline = time.monotonic() + 60
    while seen.empty() and time.monotonic() < deadline:  # until the watcher is at work
        (folder / "new.md").write_text(f"# New {time.monotonic()}\n")
        time.sleep(0.2)
    assert not seen.empty()
    for _ in range(3):  # what was written while it began
        with suppress(queue.Empty):
            seen.get(timeout=1.5)
    (place / "tables.sqlite").write_bytes(b"x")
    with pytest.raises(queue.Empty):
        seen.get(timeout=1.5)
    (folder / "new.md").unlink()
    assert seen.get(timeout=60) is None


def test_dedupe_names_groups(run: Run, handbook: Path):
    (handbook / "again.md").write_text("# Travel\n\nTrains are booked by the office.\n")
    run("index", "-o", "hb", "--quiet")
    code, out, err = run("dedupe")
    assert code == 0, err
    assert out.splitlines()[0] == " 1  2 passages"
    places = [line.split()[:2] for line in out.splitlines()[1:]]
    assert places == [["1.000", "handbook/travel.md:1-3"], ["1.000", "handbook/again.md:1-3"]]
    assert "hb: 1 group; 1 passage beside the first of each" in err
    ((first, second),) = json.loads(run("dedupe", "--index", "hb", "--json")[1])["groups"]
    assert (first["id"], first["text"]) == (second["id"], second["text"])
    assert run("dedupe", "--path", "refunds.md")[1] == ""
    code, _, err = run("dedupe", "--above", "1.5")
    assert (code, "--above 1.5: a cosine" in err) == (2, True)


def test_which_files_are_taken_is_kept(run: Run, handbook: Path):
    (handbook / "tool.py").write_text("late = 'parcels'\n")
    (handbook / ".gitignore").write_text("refunds.md\n")

    def files(*options: str) -> set[str]:
        code, _, err = run("index", "-o", "hb", *options)
        assert code == 0, err
        out = run("search", "parcels trains", "--index", "hb", "--all", "--files")[1]
        return {Path(line.split()[2]).name for line in out.splitlines()}

    assert files("--include", "*.py", "--exclude", "travel*") == {"tool.py"}
    assert files() == {"tool.py"}
    assert files("--no-gitignore") == {"tool.py", "refunds.md"}
    out = run("index", "list", "hb")[1]
    for row in (r"include +\*\.py", r"exclude +travel\*", r"gitignore +not regarded"):
        assert re.search(row, out)
    assert json.loads(run("index", "list", "--json")[1])["indexes"][0]["gitignore"] is False
    assert files("--exclude", "") == {"tool.py", "refunds.md", "travel.md"}
    assert files("--include", "", "--gitignore") == {"travel.md"}
    said = json.loads(run("index", "-o", "hb", "--exclude", "travel.md", "--json")[1])
    assert (said["n_passages"], said["n_ignored"], said["passed_over"]) == (0, 1, {".py": 1})
    assert "1 name left out by .gitignore; --no-git" in run("index", "-o", "hb")[2]
    assert "--include 'a', '': is" not in run("index", "-o", "hb", "--include", "a")[2]
    assert "--include '': is no pattern" in run("index", "-o", "hb", *["--include", ""] * 2)[2]


def test_metadata_chooses(run: Run, handbook: Path):
    text = (handbook / "travel.md").read_text()
    (handbook / "travel.md").write_text(f"---\nlang: en\ndate: 2024-05-01\n---\n{text}")
    (handbook / "refunds.md").write_text("---\nlang: [en\n---\n# Refunds\n\nAlways.\n")
    code, _, err = run("index", "-o", "hb")
    assert (code, "handbook/refunds.md: line 3: its front matter is no YAML" in err) == (0, True)
    found = json.loads(run("index", "-o", "hb", "--rebuild", "--json")[1])
    assert [each["source"] for each in found["no_metadata"]] == [str(handbook / "refunds.md")]
    for where, there in [
        (["lang=en"], True),
        (["lang=en", "--where", "date<=2024-04"], False),
        (["date>=2024-05", "--where", "ext=md"], True),
    ]:
        code, out, err = run("search", "parcels", "--index", "hb", "--where", *where)
        assert (code, "travel.md" in out, "refunds.md" in out) == (0, there, False)
        assert ("no passage in hb" in err) == (not there)
    out = run("index", "list", "hb")[1]
    assert re.search(r"metadata +date, ext, lang, modified", out)
    (row,) = json.loads(run("index", "list", "--json")[1])["indexes"]
    assert row["metadata_keys"] == ["date", "ext", "lang", "modified"]


def test_search_shows_places(run: Run, handbook: Path):
    code, out, err = run("search", "late parcels", "--index", "hb", "--top", 1)
    assert (code, err) == (0, "")
    first, above, text = out.splitlines()
    assert re.fullmatch(r" 1  0\.\d{3}  handbook/refunds\.md:1-5  [0-9a-f]{8}", first)
    assert above.strip() == "Refunds  [house rules]"
    assert text.strip() == "# Refunds We refund late parcels. At once."
    assert opened[-1] == ("all-minilm-l6-v2", "F32")  # the model of the index, as it was
    found = json.loads(run("search", "late parcels", "--index", "hb", "--json")[1])
    assert (found["model"], found["n_passages"], found["by"]) == ("fake", 2, "both")
    hit = found["results"][0]
    assert hit["source"] == str(handbook / "refunds.md")
    assert (hit["position"], hit["last_position"]) == (1, 5)
    assert (hit["headings"], hit["about"], hit["words"]) == (["Refunds"], "house rules", 1.0)


def test_search_by_words_opens_no_model(run: Run, handbook: Path):
    opened.clear()
    code, out, _ = run("search", "office", "--index", "hb", "--by", "words", "--files")
    assert (code, out) == (0, " 1  1.000  handbook/travel.md  [house rules]\n")
    assert opened == []
    assert "no passage in hb" in run("search", "zebra", "--index", "hb", "--by", "words")[2]


def test_search_takes_all_or_some(run: Run, handbook: Path):
    def sources(*arguments: object) -> list[str]:
        out = run("search", "late parcels", "--index", "hb", "--json", *arguments)[1]
        return [Path(each["source"]).name for each in json.loads(out)["results"]]

    assert sources("--all", "--top", 1) == ["refunds.md", "travel.md"]
    assert sources("--min-score", 0.3) == ["refunds.md"]
    assert sources("--path", "travel*") == ["travel.md"]
    assert sources("--rerank", "any", "--top", 1) == ["refunds.md"]
    assert sources("--rerank", "any", "--min-score", 0.99) == []


def test_context_and_links(run: Run, handbook: Path, monkeypatch: pytest.MonkeyPatch):
    out = run("search", "late parcels", "--index", "hb", "--top", 1, "--context", 0)[1]
    assert out.splitlines()[2:] == [
        "1  # Refunds",
        "2",
        "3  We refund late parcels.",
        "4",
        "5  At once.",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    place = (handbook / "refunds.md").as_uri()
    linked = console.linked("refunds\x1b.md", handbook / "refunds.md", 3)
    assert linked == f"\x1b]8;;{place}#L3\x1b\\refunds\\x1b.md\x1b]8;;\x1b\\"


def test_show(run: Run, handbook: Path):
    out = run("search", "late parcels", "--index", "hb", "--json")[1]
    id = json.loads(out)["results"][0]["id"]
    code, out, err = run("show", id)
    assert (code, err) == (0, "")
    place, heading, blank, first, *_ = out.splitlines()
    assert (place, heading, blank) == ("handbook/refunds.md:1-5", "Refunds", "")
    assert first == "1  # Refunds"
    (handbook / "travel.md").write_text("other\n")
    code, out, err = run("show", "travel.md:3", "--index", "hb")
    assert out.splitlines()[-1] == "3  Trains are booked by the office."
    assert "handbook/travel.md: has changed since it was indexed" in err
    (excerpt,) = json.loads(run("show", "travel.md:2-3", "--json")[1])["excerpts"]
    assert excerpt["text"] == "\nTrains are booked by the office."


def test_open_starts_the_editor(run: Run, handbook: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[list[str]] = []
    monkeypatch.setattr(
        "gguf_embed.system.child.run_for_user", lambda each: started.append(each) or 0
    )
    monkeypatch.setenv("VISUAL", "vi -R")
    run("search", "late parcels", "--index", "hb", "--open")
    assert started == [["vi", "-R", "+1", str(handbook / "refunds.md")]]
    monkeypatch.setenv("VISUAL", "code")
    run("show", "travel.md:3", "--open")
    assert started[1] == ["code", "--goto", f"{handbook / 'travel.md'}:3"]
    monkeypatch.delenv("VISUAL")
    monkeypatch.delenv("EDITOR", raising=False)
    assert "no editor is known" in run("show", "travel.md:3", "--open")[2]


def test_list(run: Run, handbook: Path):
    run("index", "handbook/travel.md", "-o", "./other.index", "--exclude", "drafts")
    out = run("index", "list")[1]
    assert re.search(r"^hb +fake F32 +2 +2 +\d\.\d +\S+ \S+ +handbook$", out, re.MULTILINE)
    assert "other" not in out
    out = run("index", "list", "hb", "./other.index")[1]
    assert re.search(r"folder +handbook \(2 files\): house rules", out)
    assert re.search(r"exclude +drafts", out)
    rows = json.loads(run("index", "list", "--json")[1])["indexes"]
    assert [row["name"] for row in rows] == ["hb"]
    assert rows[0]["folders"] == [
        {"folder": str(handbook), "about": "house rules", "n_files": 2},
    ]


def test_another_model(run: Run, handbook: Path):
    for command in (["search", "x", "--index", "hb"], ["index", "-o", "hb"]):
        code, _, err = run(*command, "--model", "other")
        assert code == 2
        assert re.search(r"made by fake F32 \(vector space \w+\).* fake F32 \(vector space", err)
    assert run("index", "-o", "hb", "--rebuild", "--model", "other")[0] == 0
    assert run("search", "late parcels", "--index", "hb")[0] == 0
    assert opened[-1][0] == "other"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["index", "handbook"], "the index has no name"),
        (["index", "-o", "none"], "there is no such index; name its folders"),
        (["index", "absent", "-o", "hb"], "absent: no such file or directory"),
        (["index", "", "-o", "hb"], "a folder is empty"),
        (["index", "handbook", "-o", "a b"], "is no name for an index"),
        (["index", "-o", "hb", "--about", "nothing"], "write FOLDER=TEXT"),
        (["index", "-o", "hb", "--chunk-tokens", "99"], "fake takes 32 tokens here"),
        (["index", "list", "none"], "none: no index in"),
        (["search", "x", "--index", "hc"], "there are hb"),
        (["search", "x", "handbook", "--index", "hb"], "--path handbook"),
        (["search", "x", "--index", "hb", "--prose"], "--prose: is for a search without --index"),
        (["search", "x", "handbook", "--files"], "--files: is for a search with --index"),
        (["search", "x", "handbook", "--by", "words"], "--by: is for a search with --index"),
        (["search", "w " * 50, "--index", "hb"], "the question has 53 tokens, fake takes 32"),
        (["search", "x", "--index", "hb", "--path", "none"], "matches no file"),
        (["search", "x", "--index", "hb", "--where", "a=b"], "--where a: no file of the index has"),
        (["search", "x", "--index", "hb", "--where", "a"], "--where 'a': write KEY=VALUE"),
        (["search", "x", "handbook", "--where", "a=b"], "--where: is for a search with --index"),
        (["search", "a\udcff", "--index", "hb"], "lone surrogate"),
        (["show", "ffffffff"], "no passage has this id"),
        (["show", "none.md:1", "--index", "hb"], "no such file in the index"),
        (["show", "travel.md:9-2", "--index", "hb"], "lines count from 1"),
        (["show", "x", "--context", "-1"], "--context -1"),
    ],
)
def test_bad_input(run: Run, handbook: Path, arguments: list[str], complaint: str):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert complaint in err
