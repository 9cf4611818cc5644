"""An index: what updates do, what answers are, and what happens when a run is killed."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.engine.backend import Outcome
from gguf_embed.errors import BadInput, BadOption, OutputFailed
from gguf_embed.index.changes import SeenFile, changes_between
from gguf_embed.index.database import make_database
from gguf_embed.index.duplicates import near_groups
from gguf_embed.index.facts import KnownFile, Passage
from gguf_embed.index.index import Index
from gguf_embed.index.making import Wanted, make_index
from gguf_embed.index.nearness import Near
from gguf_embed.index.places import existing, named_indexes, place_of
from gguf_embed.index.ranking import best_rows, bonus_of, by_meaning, by_words, fused
from gguf_embed.index.tables import Tables
from gguf_embed.index.update import UpdateReport
from gguf_embed.index.vector_file import VectorFile
from gguf_embed.index.word_scores import WordScores
from gguf_embed.index.word_tables import WordTables
from gguf_embed.index.words import phrases, searchable
from gguf_embed.io.folder import FileStamp
from gguf_embed.jobs.cache import VectorCache
from gguf_embed.testing import FakeBackend, FakeEmbedder

HANDBOOK = {
    "refunds.md": "# Refunds\n\nWe refund every order within ten days.\n\n"
    "## Late orders\n\nA late parcel is refunded at once.\n",
    "travel.md": "# Travel\n\nTrains are booked by the office.\n",
    "deep/bread.txt": "flour and water make bread in the oven\n",
}


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    for name, text in HANDBOOK.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "made.index"


def make(
    place: Path,
    *folders: Path,
    embedder: FakeEmbedder | None = None,
    cache: VectorCache | None = None,
    **wanted: object,
) -> UpdateReport:
    wanted.setdefault("folders", dict.fromkeys(folders))
    wanted.setdefault("chunk_tokens", 20)
    with embedder or FakeEmbedder.open() as opened:
        what = Wanted(**wanted)  # type: ignore[arg-type]
        return make_index(place, opened, what, model="fake", cache=cache)


def ask(place: Path, question: str, **how: object) -> list[str]:
    """The files that answer, the best first."""
    with Index.open(place) as index, FakeEmbedder.open() as embedder:
        return [hit.path.name for hit in index.search(question, embedder, **how)]  # type: ignore[arg-type]


def counts(report: UpdateReport) -> tuple[int, ...]:
    """New, changed, moved, deleted, unchanged files, and passages that were embedded."""
    return (
        report.n_new,
        report.n_changed,
        report.n_moved,
        report.n_deleted,
        report.n_unchanged,
        report.n_embedded,
    )


# -- updates -----------------------------------------------------------------------------------


def test_an_index_answers_with_places(handbook: Path, place: Path):
    report = make(place, folders={handbook: "house rules"})
    assert counts(report)[0] == 3
    assert report.n_embedded == report.n_passages == 4
    with Index.open(place) as index, FakeEmbedder.open() as embedder:
        hit, *others = index.search("a late parcel", embedder)
        assert len(others) == 3
        assert hit.path == handbook / "refunds.md"
        assert hit.passage.text == HANDBOOK["refunds.md"][hit.passage.start : hit.passage.end]
        assert (hit.passage.first_line, hit.passage.last_line) == (5, 7)
        assert hit.passage.headings == ("Refunds", "Late orders")
        assert hit.folder.about == "house rules"
        alone = embedder.encode(hit.passage.text, prompt=embedder.prompt("document"))
        asked = embedder.encode_query("a late parcel")
        assert hit.similarity == pytest.approx(float(alone @ asked), abs=1e-6)


def test_an_update_embeds_what_is_new_alone(handbook: Path, place: Path):
    make(place, handbook)
    assert counts(make(place)) == (0, 0, 0, 0, 3, 0)
    (handbook / "travel.md").rename(handbook / "deep" / "journeys.md")
    assert counts(make(place)) == (0, 0, 1, 0, 2, 0)
    assert ask(place, "trains", top=1) == ["journeys.md"]
    assert ask(place, "journeys", top=1, by="words") == ["journeys.md"]
    assert ask(place, "travel.md", paths=["journeys.md"], by="words") == ["journeys.md"]  # heading
    (handbook / "refunds.md").write_text(HANDBOOK["refunds.md"] + "\n## Gifts\n\nNone.\n")
    report = make(place)
    assert counts(report) == (0, 1, 0, 0, 2, 1 + 1)  # the passage before it ends elsewhere now
    assert report.n_reused == 1
    (handbook / "deep" / "bread.txt").unlink()
    assert counts(make(place)) == (0, 0, 0, 1, 2, 0)
    assert "bread.txt" not in ask(place, "flour and bread")
    assert ask(place, "flour", by="words") == []
    (handbook / "copy.md").write_text((handbook / "refunds.md").read_text())
    report = make(place)
    assert (report.n_new, report.n_embedded, report.n_reused) == (1, 0, 3)


def test_after_any_changes_it_is_as_if_made_anew(handbook: Path, place: Path, tmp_path: Path):
    make(place, handbook)
    (handbook / "travel.md").write_text("# Travel\n\nPlanes are not booked.\n")
    (handbook / "more.md").write_text("# More\n\nA parcel of bread.\n")
    (handbook / "refunds.md").rename(handbook / "money.md")
    make(place)
    make(tmp_path / "anew.index", handbook)
    for by in ("both", "meaning", "words"):
        found = []
        for each in (place, tmp_path / "anew.index"):
            with Index.open(each) as index, FakeEmbedder.open() as embedder:
                hits = index.search("a parcel of bread", embedder, by=by)  # type: ignore[arg-type]
            found.append([(hit.id, hit.path, hit.score) for hit in hits])
        ids = [[each[:2] for each in one] for one in found]
        assert sorted(ids[0]) == sorted(ids[1])
        np.testing.assert_allclose([h[2] for h in found[0]], [h[2] for h in found[1]], rtol=1e-6)


def test_what_cannot_be_read_is_named_and_comes_back_when_it_can(handbook: Path, place: Path):
    (handbook / "travel.md").write_bytes(b"caf\xe9\n")
    (handbook / "blank.txt").write_text(" \n")
    (handbook / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (handbook / "broken.docx").write_bytes(b"PK")
    (handbook / "vectors.npy").touch()
    report = make(place, handbook)
    reasons = {path.name: reason for path, reason in report.unread}
    assert reasons.keys() == {"travel.md", "blank.txt", "broken.pdf", "broken.docx"}
    assert "not UTF-8: byte 0xe9 at offset 3" in reasons["travel.md"]
    assert reasons["blank.txt"] == "holds no text"
    assert report.passed_over == {".npy": 1}
    with Index.open(place) as index:
        assert {each.name for each in index.status().unread} == reasons.keys()
    (handbook / "travel.md").write_text("trains\n")
    assert "travel.md" not in {path.name for path, _ in make(place).unread}
    (handbook / "travel.md").write_bytes(b"\xff\xff")
    make(place)
    assert "travel.md" not in ask(place, "trains")


def test_folders_that_are_not_there_keep_their_files(handbook: Path, place: Path, tmp_path: Path):
    make(place, handbook)
    handbook.rename(tmp_path / "elsewhere")
    report = make(place)
    assert report.absent == [handbook]
    assert ask(place, "a late parcel", top=1) == ["refunds.md"]
    (tmp_path / "elsewhere").rename(handbook)
    assert counts(make(place)) == (0, 0, 0, 0, 3, 0)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.md").write_text("zebras\n")
    make(place, other)
    make(place, remove=[handbook])
    assert ask(place, "a late parcel") == ["a.md"]
    with pytest.raises(BadInput, match="not in this index; its folders: "):
        make(place, remove=[handbook])
    with pytest.raises(BadInput, match="would be there twice"):
        make(place, tmp_path)


def test_which_files_are_taken_is_kept(handbook: Path, place: Path):
    (handbook / "tool.py").write_text("def bake(): pass\n")
    (handbook / ".gitignore").write_text("deep/\n")
    (handbook / ".hidden.md").write_text("hidden\n")
    report = make(place, handbook, include=["*.py"], exclude=["travel.*"])
    assert report.n_new == 2
    assert {*ask(place, "bake")} == {"tool.py", "refunds.md"}
    assert make(place).n_unchanged == 2
    assert make(place, gitignore=False).n_new == 1
    with pytest.raises(BadOption, match="--include '/': is no pattern"):
        make(place, include=["/"])
    assert make(place, include=[]).n_deleted == 1


def test_a_single_file_is_a_folder_of_one(handbook: Path, place: Path):
    make(place, handbook / "refunds.md")
    assert {*ask(place, "trains")} == {"refunds.md"}
    assert ask(place, "refunds", paths=["refunds.md"], top=1) == ["refunds.md"]


def test_an_index_does_not_read_itself(handbook: Path):
    place = handbook / "own.index"
    make(place, handbook)
    (place / "notes.md").write_text("x\n")
    report = make(place)
    assert (report.n_unchanged, report.n_new, report.passed_over) == (3, 0, {})


# -- kills, locks, generations -------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from gguf_embed.index import update
from gguf_embed.index.making import Wanted, make_index
from gguf_embed.jobs.cache import VectorCache
from gguf_embed.testing import FakeEmbedder
update.BATCH_LEAST = 1
after, done, append = int(sys.argv[3]), 0, update.VectorFile.append
def append_and_die(self, vectors, n_rows):
    global done
    append(self, vectors, n_rows)
    done += 1
    if done > after:
        os.kill(os.getpid(), signal.SIGKILL)
update.VectorFile.append = append_and_die
with FakeEmbedder.open() as embedder:
    wanted = Wanted(folders={Path(sys.argv[2]): None}, chunk_tokens=20)
    make_index(Path(sys.argv[1]), embedder, wanted, model="fake")
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_an_index_and_the_next_goes_on(handbook: Path, place: Path):
    """It dies between the vectors and the tables, the one moment when they differ."""
    for after, n_there in ((0, 0), (0, 0), (1, 1)):
        done = subprocess.run([sys.executable, "-c", KILLED, place, handbook, str(after)])
        assert done.returncode == -signal.SIGKILL
        with Index.open(place) as index:
            assert index.status().n_files == n_there
            assert index.status().unfinished == 3 - n_there
        assert len(ask(place, "bread in the oven")) == n_there
    report = make(place)
    assert (report.n_new, report.n_unchanged) == (2, 1)
    assert ask(place, "a late parcel", top=1) == ["refunds.md"]
    assert ask(place, "bread in the oven", top=1) == ["bread.txt"]
    with Index.open(place) as index:
        assert index.status().unfinished == 0
    size = (place / "1" / "vectors.f32").stat().st_size
    assert size == 4 * 64 * report.n_passages


def test_what_the_cache_knows_is_not_embedded(handbook: Path, place: Path, tmp_path: Path):
    with VectorCache.open(tmp_path / "vectors.sqlite") as cache:
        first = make(place, handbook, cache=cache)
        assert (first.n_embedded, first.n_cached) == (first.n_passages, 0)
        report = make(tmp_path / "second.index", handbook, cache=cache)
        assert (report.n_embedded, report.n_cached) == (0, first.n_passages)
        for question in ("a late parcel", "trains"):
            answers = [ask(each, question) for each in (place, tmp_path / "second.index")]
            assert answers[0] == answers[1]
        (handbook / "travel.md").write_text("# Travel\n\nPlanes are not booked.\n")
        report = make(place, cache=cache)
        assert (report.n_embedded, report.n_cached) == (1, 0)
        assert make(place, rebuild=True, cache=cache).n_embedded == 0
        other = make(place, embedder=FakeEmbedder.open(dim=32), rebuild=True, cache=cache)
        assert (other.n_embedded, other.n_cached) == (other.n_passages, 0)


def test_passages_without_a_vector_are_not_cached(handbook: Path, place: Path, tmp_path: Path):
    with VectorCache.open(tmp_path / "vectors.sqlite") as cache:
        for _ in range(2):
            embedder = FakeEmbedder.open(backend=_Nan())
            report = make(place, handbook, embedder=embedder, cache=cache, rebuild=True)
        assert (len(report.no_vector), report.n_embedded, report.n_cached) == (1, 1, 3)


def test_one_writer_at_a_time(handbook: Path, place: Path):
    from gguf_embed.index.generations import only_writer

    make(place, handbook)
    with only_writer(place), pytest.raises(OutputFailed, match=r"made.index .*another run is at"):
        make(place)
    assert counts(make(place))[4] == 3


def test_a_reader_sees_what_an_update_has_finished(handbook: Path, place: Path):
    make(place, handbook)
    with Index.open(place) as index, FakeEmbedder.open() as embedder:
        assert len(index.search("zebras", embedder)) == 4
        (handbook / "zebras.md").write_text("zebras\n")
        make(place)
        assert index.search("zebras", embedder)[0].path.name == "zebras.md"
        make(place, rebuild=True)
        (handbook / "gnus.md").write_text("gnus\n")
        make(place)
        assert index.search("gnus", embedder)[0].path.name == "gnus.md"
        assert [path.name for path in place.iterdir() if path.is_dir()] == ["2"]


class _Dies(FakeBackend):
    """Ends the run when it meets a word."""

    def run(self, sequences, **how):  # type: ignore[no-untyped-def]
        if any(int(self.tokenize("oven")[1]) in ids for ids in sequences):
            raise KeyboardInterrupt
        return super().run(sequences, **how)


def test_another_model_is_refused_and_taken_by_a_rebuild(handbook: Path, place: Path):
    make(place, folders={handbook: "rules"}, exclude=["travel*"])
    space = FakeEmbedder.open().fingerprint(prompt="document: ").id
    with FakeEmbedder.open(dim=32) as other, Index.open(place) as index:
        with pytest.raises(BadInput, match=rf"made by fake F32 .*{space}.*embedded by fake F32"):
            index.search("x", other)
        assert index.search("parcel", by="words")
        with pytest.raises(BadInput, match="embed it all anew with --rebuild"):
            make(place, embedder=other)
    dying = FakeEmbedder.open(dim=32, backend=_Dies(dim=32))
    with pytest.raises(KeyboardInterrupt):
        make(place, embedder=dying, rebuild=True)
    assert ask(place, "a late parcel", top=1) == ["refunds.md"]  # the old one goes on
    report = make(place, embedder=FakeEmbedder.open(dim=32), rebuild=True)
    assert report.n_passages == 3
    with FakeEmbedder.open(dim=32) as other, Index.open(place) as index:
        hit = index.search("a late parcel", other)[0]
        assert (hit.path.name, hit.folder.about) == ("refunds.md", "rules")
        assert index.facts.space.dim == 32
        assert index.status().selection.exclude == ("travel*",)
    with pytest.raises(BadInput, match="passages of 20 tokens with an overlap of 0, not 24"):
        make(place, embedder=FakeEmbedder.open(dim=32), chunk_tokens=24)


def test_vectors_that_nobody_needs_go(handbook: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gguf_embed.index.making.TIDY_ROWS", 2)
    make(place, handbook)
    for n in range(4):
        (handbook / "travel.md").write_text(f"# Travel\n\nTrain number {n} goes to town.\n")
        make(place)
    with Index.open(place) as index:
        status = index.status()
        assert (status.n_passages, status.n_dead_rows) == (4, 1)
    assert ask(place, "train number 3", top=1) == ["travel.md"]
    assert ask(place, "a late parcel", top=1) == ["refunds.md"]
    assert ask(place, "late", by="words") == ["refunds.md"]


class _Nan(FakeBackend):
    """Has no vectors for texts with the word "oven"."""

    def run(self, sequences, **how):  # type: ignore[no-untyped-def]
        outcome = super().run(sequences, **how)
        oven = int(self.tokenize("oven")[1])
        return Outcome(
            vectors=outcome.vectors,
            bad=tuple(row for row, ids in enumerate(sequences) if oven in ids),
        )


def test_a_passage_without_a_vector_is_named_and_found_by_its_words(handbook: Path, place: Path):
    report = make(place, handbook, embedder=FakeEmbedder.open(backend=_Nan()))
    (named,) = report.no_vector
    assert f"{handbook}/deep/bread.txt:1: " in named
    assert ask(place, "oven", by="words") == ["bread.txt"]


def test_a_database_has_all_of_its_tables_or_none(tmp_path: Path):
    path = tmp_path / "made.sqlite"
    with pytest.raises(OutputFailed, match="not made: table one already exists"):
        make_database(path, "CREATE TABLE one (x); CREATE TABLE one (x);")
    assert path.stat().st_size == 0


@pytest.mark.parametrize(
    "damage", ["index.json", "1/facts.json", "1/tables.sqlite", "1/vectors.f32"]
)
def test_a_damaged_index_is_refused_with_the_way_out(handbook: Path, place: Path, damage: str):
    make(place, handbook)
    (place / damage).write_bytes(b"?")
    with pytest.raises(BadInput, match=r"anew|damaged"):
        ask(place, "x")
    if damage != "index.json":
        make(place, handbook, rebuild=True)
        assert ask(place, "a late parcel", top=1) == ["refunds.md"]


# -- answers -----------------------------------------------------------------------------------


def test_a_file_alone_is_chosen_by_its_path(handbook: Path, place: Path):
    make(place, handbook / "refunds.md")
    for pattern in ("refunds.md", "*.md", f"{handbook}/refunds.md"):
        assert ask(place, "a late parcel", paths=[pattern], top=1) == ["refunds.md"]


def test_answers_may_be_chosen(handbook: Path, place: Path):
    make(place, handbook)
    assert ask(place, "bread", paths=["deep"]) == ["bread.txt"]
    assert {*ask(place, "bread", paths=["*.md"])} == {"refunds.md", "travel.md"}
    assert ask(place, "office", by="words", paths=["*.md"]) == ["travel.md"]
    assert ask(place, "office", by="words", paths=["*.txt"]) == []
    assert ask(place, "bread in the oven", min_score=0.5) == ["bread.txt"]
    assert len(ask(place, "bread", top=None)) == 4
    with pytest.raises(BadInput, match="matches no file"):
        ask(place, "x", paths=["none"])
    with pytest.raises(BadOption, match="choose both, meaning, words"):
        ask(place, "x", by="luck")
    with pytest.raises(BadOption, match="question is empty"):
        ask(place, " ")
    with Index.open(place) as index, pytest.raises(BadOption, match="needs the embedder"):
        index.search("x")


def test_words_are_found_in_any_script(tmp_path: Path, place: Path):
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "ja.md").write_text("返金は十日以内に行います\n")
    (folder / "de.md").write_text("Über die Brücke gehen\n")
    (folder / "code.md").write_text("call openTheDoor or close_the_window\n")
    make(place, folder)
    for question, answer in [
        ("十日", "ja.md"),
        ("返金", "ja.md"),
        ("brucke", "de.md"),
        ("door", "code.md"),
        ("openthedoor", "code.md"),
        ("window", "code.md"),
        ('"quoted" OR (window', "code.md"),
    ]:
        assert ask(place, question, by="words") == [answer], question
    assert ask(place, "日十", by="words") == []
    assert ask(place, "?!", by="words") == []


def test_a_passage_is_shown_in_its_document(handbook: Path, place: Path):
    make(place, handbook)
    with Index.open(place) as index, FakeEmbedder.open() as embedder:
        hit = index.search("a late parcel", embedder)[0]
        (alone,) = index.passage(hit.id)
        assert "\n".join(alone.lines) == "## Late orders\n\nA late parcel is refunded at once."
        (around,) = index.passage("#" + hit.id.upper(), context=99)
        assert "\n".join(around.lines) + "\n" == HANDBOOK["refunds.md"] + "\n" * (
            around.lines[-1] == ""
        )
        assert around.headings == ("Refunds", "Late orders")
        lines = index.lines("deep/bread.txt", 1, 1)
        assert lines.lines == (HANDBOOK["deep/bread.txt"].rstrip(),)
        assert not lines.stale
        (handbook / "deep" / "bread.txt").write_text("other\n")
        assert index.lines(str(handbook / "deep" / "bread.txt"), 1, 9).stale
        for bad, message in [("ffffffff", "no passage has this id"), ("xyz", "is no id")]:
            with pytest.raises(BadInput, match=message):
                index.passage(bad)
        with pytest.raises(BadInput, match="no such file in the index"):
            index.lines("none.md", 1, 2)
        with pytest.raises(BadInput, match="no lines 50 to 60; it has 7"):
            index.lines("refunds.md", 50, 60)


def test_indexes_have_names(handbook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    assert named_indexes() == []
    make(place_of("handbook"), handbook)
    assert named_indexes() == ["handbook"]
    assert existing("handbook") == tmp_path / "home" / "indexes" / "handbook"
    with pytest.raises(BadInput, match="there are handbook"):
        existing("handbok")
    monkeypatch.chdir(tmp_path)
    assert place_of("a.index") == tmp_path / "a.index"
    assert place_of("./a") == tmp_path / "a"
    for bad in ("", "..", "-x"):
        with pytest.raises(BadOption):
            place_of(bad)


# -- pure parts --------------------------------------------------------------------------------


def known(id: int, name: str, digest: bytes, n: int = 1) -> KnownFile:
    stamp = FileStamp(n_bytes=1, mtime_ns=n, ctime_ns=0)
    return KnownFile(id=id, folder=1, name=name, digest=digest, stamp=stamp, first_row=0, n_rows=1)


def seen(name: str, digest: bytes, n: int = 1) -> SeenFile:
    stamp = FileStamp(n_bytes=1, mtime_ns=n, ctime_ns=0)
    return SeenFile(folder=1, name=name, path=Path(name), stamp=stamp, digest=digest)


FILES = st.dictionaries(
    st.sampled_from(["a.md", "b.md", "c.md", "d.txt"]), st.sampled_from([b"1", b"2", b"3"])
)


@given(FILES, FILES)
def test_changes_lead_from_what_is_known_to_what_is_seen(before, after):
    changes = changes_between(
        [known(i, name, digest) for i, (name, digest) in enumerate(before.items())],
        [seen(name, digest) for name, digest in after.items()],
    )
    files = dict(before)
    for old in changes.deleted:
        del files[old.name]
    for old, _ in changes.moved:
        del files[old.name]
    for _, now in (*changes.moved, *changes.changed):
        files[now.name] = now.digest
    for now in changes.new:
        assert now.name not in files
        files[now.name] = now.digest
    assert files == after
    for old, now in changes.moved:
        assert old.digest == now.digest
        assert old.name[-3:] == now.name[-3:]
    left = {old.digest for old in changes.deleted if old.name != "d.txt"}
    assert not left & {now.digest for now in changes.new if now.name != "d.txt"}


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=40),
    st.integers(1, 50),
)
def test_the_best_rows_are_those_of_a_sort(values: list[int], n: int):
    scores = np.float32(values)
    expected = sorted(range(len(values)), key=lambda row: (-values[row], row))[:n]
    assert best_rows(scores, n).tolist() == expected


def test_scores_are_fused():
    near = Near(rows=np.array([0, 2, 3]), cosines=np.float32([0.5, 0.4, 0.3]))
    assert [each.row for each in by_meaning(near, 9)] == [0, 2, 3]
    words = np.float32([0, 8, 4, 8])
    found = fused(near, words, 3, share=0.5)
    assert [each.row for each in found] == [3, 2, 0]
    assert [round(each.score, 3) for each in found] == [0.65, 0.45, 0.25]
    assert found[2].words is None
    assert fused(near, np.zeros(4, np.float32), 3, share=0.5)[0].score == 0.25
    np.testing.assert_allclose(bonus_of(words, share=0.2), [0, 0.25, 0.125, 0.25])
    assert not bonus_of(np.zeros(4, np.float32)).any()
    found = by_words(np.float32([0, 2, 4]), 3)
    assert [(each.row, each.score, each.similarity) for each in found] == [
        (2, 1, None),
        (1, 0.5, None),
    ]
    assert by_words(np.zeros(3, np.float32), 3) == by_words(np.zeros(0, np.float32), 3) == []


WORDS = (
    "the",
    "Refund",
    "refunds",
    "parcel",
    "l'état",
    "東京",
    "東",
    "京都",
    "ภาษา",
    "HTTPServer",
    "x_y",
    "a",
)
word_texts = st.lists(st.sampled_from(WORDS), max_size=200).map(" ".join)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(word_texts, min_size=1, max_size=8), word_texts, st.data())
def test_words_score_as_fts5_scores_them(texts: list[str], question: str, data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tables.sqlite"
        with Tables.create(path) as tables:
            with tables.writing():
                tables.set_folder(Path(folder), "")
                for i, text in enumerate(texts):  # two passages a file
                    passages = [passage_of(text), passage_of(question)]
                    tables.add_file(known_file(f"{i}.md", first_row=2 * i, n_rows=2), passages)
                if len(texts) > 1:
                    gone = data.draw(st.sampled_from([file.id for file in tables.files()]))
                    tables.remove_file(gone)
            files = tables.files()
            n_rows = 2 * len(texts)
            found = WordScores(WordTables(tables), files, n_rows).scores(question, [(0, n_rows)])
        wanted = np.zeros(n_rows, np.float32)
        database = sqlite3.connect(path)
        firsts = {file.id: file.first_row for file in files}
        for file, ordinal, rank in database.execute(
            "SELECT file, ordinal, bm25(words) FROM words JOIN passages ON passages.id = "
            "words.rowid WHERE words MATCH ?",
            (" OR ".join(phrases(question)) or '"nothing"',),
        ):
            wanted[firsts[file] + ordinal] = -rank
        database.close()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def passage_of(text: str) -> Passage:
    return Passage(
        digest=b"", text=text, headings=("Parcel",), start=0, end=1, first_line=1, last_line=1
    )


def known_file(name: str, *, first_row: int, n_rows: int) -> KnownFile:
    stamp = FileStamp(n_bytes=1, mtime_ns=1, ctime_ns=1)
    return KnownFile(
        id=0, folder=1, name=name, digest=b"", stamp=stamp, first_row=first_row, n_rows=n_rows
    )


def test_words_of_questions():
    quoted = ['"how"', '"do"', '"i"', '"open"', '"it"', '"東 京 タ ワ ー"', '"now"']
    assert phrases("How do I open_it? 東京タワー now NOW") == quoted
    assert searchable("plain words") == "plain words"
    assert searchable("parseHTMLPage") == "parseHTMLPage\nparse HTML Page"


def test_vectors_behind_the_end_are_written_over(tmp_path: Path):
    file = VectorFile(tmp_path / "v.f32", 2)
    ones, twos = np.ones((3, 2), np.float32), np.full((1, 2), 2, np.float32)
    file.append(ones, 0)
    file.append(twos, 1)
    np.testing.assert_array_equal(file.rows(2), np.concatenate([ones[:1], twos]))
    assert (tmp_path / "v.f32").stat().st_size == 24
    with pytest.raises(BadInput, match="does not hold the 9 vectors"):
        file.rows(9)


# -- near duplicates ---------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 7), st.integers(0, 2**32 - 1), st.floats(0.2, 0.99))
def test_groups_are_those_of_all_pairs(n: int, block: int, seed: int, above: float):
    vectors = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    vectors[::5] = 0
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    found = near_groups(vectors, above, block=block)
    groups = [{row} for row in range(n)]
    for a in range(n):
        for b in range(a):
            if vectors[a] @ vectors[b] >= above:
                one = next(group for group in groups if a in group)
                other = next(group for group in groups if b in group)
                if one is not other:
                    groups.remove(other)
                    one |= other
    assert sorted(map(sorted, (group for group in groups if len(group) > 1))) == found


def test_passages_that_say_the_same_are_named(handbook: Path, place: Path):
    (handbook / "copy.md").write_text(HANDBOOK["travel.md"])
    (handbook / "third.txt").write_text("flour and water make bread in the oven now\n")
    make(place, handbook)
    with Index.open(place) as index:
        groups = index.duplicates(0.85)
        names = [[hit.path.name for hit in group] for group in groups]
        assert sorted(map(sorted, names)) == [["bread.txt", "third.txt"], ["copy.md", "travel.md"]]
        assert all(group[0].score == pytest.approx(1, abs=1e-5) for group in groups)
        assert all(0.85 <= hit.score <= 1.00001 for group in groups for hit in group)
        only = index.duplicates(0.99, paths=["*.md"])
        assert [[hit.path.name for hit in group] for group in only] == [["copy.md", "travel.md"]]
        with pytest.raises(BadInput, match="matches no file"):
            index.duplicates(0.99, paths=["*.rst"])
