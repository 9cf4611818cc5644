"""Texts to measure on: docstrings, translations, BEIR folders; what is refused and why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.lab import docstrings
from gguf_embed.lab.docstrings import Pair
from gguf_embed.lab.parallel import matching_accuracy, parallel_sentences
from gguf_embed.lab.task_files import read_folder, read_jsonl
from gguf_embed.lab.tasks import Judgement, Task, Text, join, limited

BODY = "A body of more than twelve words, which says enough to be found by someone who asks."


# -- docstrings -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standard_library() -> Task:
    return docstrings.docstring_task()


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.slow
def test_the_standard_library_gives_thousands_of_pairs(standard_library: Task):
    assert len(standard_library.queries) == len(standard_library.passages) > 1500
    assert standard_library.qrels == tuple({i: 1.0} for i in range(len(standard_library.queries)))
    assert len({words(query) for query in standard_library.queries}) == len(
        standard_library.queries
    )
    for query, passage in zip(standard_library.queries, standard_library.passages, strict=True):
        assert f" {words(query)} " not in f" {words(passage)} "
        assert 0 < len(passage) <= docstrings.MAX_BODY_CHARS
        assert "\n" not in query


@pytest.mark.slow
def test_the_same_task_whatever_the_hash_seed():
    code = (
        "import sys; sys.stdlib_module_names = frozenset({'json', 'email', 'argparse', 'http'});"
        "from gguf_embed.lab.docstrings import docstring_task;"
        "print(docstring_task(limit=40).sha256)"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_packages_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "lost_property"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""Find what was lost here.\n\n{BODY}\n"""\n1 / 0')
    (package / "tests" / "__init__.py").write_text(f'"""Tests are passed over.\n\n{BODY}\n"""')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"json"}))
    task = docstrings.docstring_task(packages=["lost_property"])
    assert (task.queries[-1], task.passages[-1]) == ("Find what was lost here.", BODY)
    assert task.queries[0].startswith("JSON ")
    assert task.name.endswith(" and lost_property")
    with pytest.raises(BadOption, match="'no_such_thing' is not installed"):
        docstrings.docstring_task(packages=["no_such_thing"])


def test_no_source_code_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"_socket"}))
    with pytest.raises(BadInput, match="no source code of the standard library"):
        docstrings.docstring_task()


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        (f"Find what was lost here.\n\n{BODY}", "Find what was lost here.", BODY),
        (f"Find what was lost here. {BODY}", "Find what was lost here.", BODY),
        (f"Find what\nwas lost here\n\n{BODY}\n", "Find what was lost here", BODY),
        (f"Find, e.g. what was lost.\n\n{BODY}", "Find, e.g. what was lost.", BODY),
    ],
)
def test_a_docstring_is_split_after_its_first_sentence(docstring: str, summary: str, body: str):
    assert docstrings.split(docstring, "here") == Pair(source="here", summary=summary, body=body)


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        "Find what was lost here.",
        f"Too short.\n\n{BODY}",
        f"{'word ' * 31}.\n\n{BODY}",
        "Find what was lost here.\n\nToo short to be found.",
        f"find(what, was, lost, here, again)\n\n{BODY}",
        f"lost things here now -> found things\n\n{BODY}",
        f"Find what was lost here.\n\n{BODY} And: find  WHAT was lost, here!",
        f"Find what was lost \ud83d here.\n\n{BODY}",
    ],
)
def test_a_docstring_unfit_for_a_pair(docstring: str):
    assert docstrings.split(docstring, "here") is None


def test_long_bodies_end_between_words():
    pair = docstrings.split(f"Find what was lost here.\n\n{'lengthy ' * 400}", "here")
    assert pair is not None
    assert docstrings.MAX_BODY_CHARS - 8 <= len(pair.body) <= docstrings.MAX_BODY_CHARS
    assert pair.body.endswith("lengthy")


def test_pairs_of_a_file_in_order_of_lines(tmp_path: Path):
    def docstring(of: str) -> str:
        return f'"""Says what the {of} does.\n\n    {BODY}\n    """'

    path = tmp_path / "package" / "module.py"
    path.parent.mkdir()
    path.write_text(
        f"{docstring('module')}\n"
        f"class A:\n    {docstring('class')}\n"
        f"    async def f(self):\n        {docstring('coroutine')}\n"
        f"def g():\n    {docstring('function')}\n"
    )
    pairs = list(docstrings.read_pairs(path, tmp_path))
    assert [pair.summary.split()[3] for pair in pairs] == [
        "module",
        "class",
        "coroutine",
        "function",
    ]
    assert pairs[2].source == "package/module.py:10"
    path.write_text("this is no Python")
    assert list(docstrings.read_pairs(path, tmp_path)) == []


def pair(summary: str, body: str) -> Pair:
    return Pair(source=summary, summary=summary, body=body)


def test_near_duplicates_are_left_out():
    first = pair("Open a file", "one two three four five six seven eight nine ten")
    kept = docstrings.distinct(
        [
            first,
            pair("open a FILE!", "nothing of what is said there is said here at all"),
            pair("Other case", "One, two: three four\nfive six seven eight nine ten."),
            pair("Half of it", "one two three four five six seven eight then it goes its own way"),
            pair("Little of it", "one two three four five is all that this shares with that"),
        ]
    )
    assert [one.summary for one in kept] == ["Open a file", "Little of it"]


TOKENS = st.lists(st.sampled_from("abcdef"), min_size=6, max_size=12).map(" ".join)


@given(st.lists(st.builds(pair, TOKENS, TOKENS), max_size=12))
def test_distinct_keeps_order_and_is_done_once(pairs: list[Pair]):
    kept = docstrings.distinct(pairs)
    assert kept[:1] == pairs[:1]
    positions = [pairs.index(one) for one in kept]
    assert positions == sorted(positions)
    assert docstrings.distinct(kept) == kept


# -- samples ---------------------------------------------------------------------------------


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    n_passages = draw(st.integers(1, 30))
    n_queries = draw(st.integers(0, 30))
    judged = st.dictionaries(
        st.integers(0, n_passages - 1), st.sampled_from([0.0, 1.0, 2.0]), max_size=4
    ).map(lambda row: row or {0: 1.0})
    qrels = draw(st.lists(judged, min_size=n_queries, max_size=n_queries))
    return Task(
        name="made",
        passages=tuple(f"passage {i}" for i in range(n_passages)),
        queries=tuple(f"query {i}" for i in range(n_queries)),
        qrels=tuple(qrels) if draw(st.booleans()) else None,
    )


@given(tasks(), st.integers(1, 40))
def test_a_sample_keeps_judged_passages_and_order(task: Task, limit: int):
    try:
        sample = limited(task, limit)
    except BadOption:
        assert task.qrels is not None
        assert max(map(len, task.qrels)) > limit
        return
    assert len(sample.passages) == min(limit, len(task.passages))
    assert len(sample.queries) <= min(limit, len(task.queries))
    assert list(sample.passages) == [text for text in task.passages if text in sample.passages]
    assert list(sample.queries) == [text for text in task.queries if text in sample.queries]
    if task.qrels is not None:
        assert sample.qrels is not None
        for query, row in zip(sample.queries, sample.qrels, strict=True):
            original = task.qrels[task.queries.index(query)]
            assert {sample.passages[i]: gain for i, gain in row.items()} == {
                task.passages[i]: gain for i, gain in original.items()
            }
    assert limited(task, limit) == sample
    cut = len(sample.passages) < len(task.passages) or len(sample.queries) < len(task.queries)
    assert any("a sample" in remark for remark in sample.remarks) == cut


def test_a_limit_below_one_query_is_refused():
    task = Task(name="t", passages=("a", "b", "c"), queries=("q",), qrels=({0: 1, 1: 1},))
    with pytest.raises(BadOption, match="a limit of 1 texts is too low"):
        limited(task, 1)


# -- translations ----------------------------------------------------------------------------

SCRIPTS = {
    "en": "LATIN",
    "zh": "CJK",
    "ar": "ARABIC",
    "hi": "DEVANAGARI",
    "ru": "CYRILLIC",
    "es": "LATIN",
    "de": "LATIN",
}


def test_sentences_in_seven_languages():
    sentences = parallel_sentences().sentences
    assert list(sentences) == list(SCRIPTS)
    assert {len(column) for column in sentences.values()} == {125}
    for language, column in sentences.items():
        assert len(set(column)) == 125, language
        for text in column:
            assert text == text.strip()
            assert unicodedata.is_normalized("NFC", text)
            scripts = Counter(unicodedata.name(c).split()[0] for c in text if c.isalpha())
            assert scripts.most_common(1)[0][0] == SCRIPTS[language], text
            assert text[-1] in ".!?。！？؟।", text


def test_questions_are_questions_in_every_language():
    sentences = parallel_sentences().sentences
    for row in zip(*sentences.values(), strict=True):
        assert len({text[-1] in "?？؟" for text in row}) == 1, row
        assert len({text[-1] in "!！" for text in row}) == 1, row


def test_matching_counts_the_nearest_only():
    a = np.eye(4, dtype=np.float32)
    swapped = a[[1, 0, 2, 3]]
    found = matching_accuracy(np.concatenate([a, a, swapped]), ["x", "y", "z"])
    assert found == {
        ("x", "y"): 1,
        ("y", "x"): 1,
        ("x", "z"): 0.5,
        ("z", "x"): 0.5,
        ("y", "z"): 0.5,
        ("z", "y"): 0.5,
    }


# -- the caller's files ----------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set as BEIR has it."""
    rows = [{"_id": f"d{i}", "title": f"Title {i}", "text": f"text {i}"} for i in range(4)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    write_jsonl(
        tmp_path / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)]
    )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq2\td3\t2\nq2\td0\t1\nq0\td1\t1\nq1\td1\t0\n"
    )
    return tmp_path


def test_a_folder_as_beir_has_it(folder: Path):
    task = read_folder(folder)
    assert task.passages == tuple(f"Title {i} text {i}" for i in range(4))
    assert task.queries == ("query 0", "query 2")
    assert task.qrels == ({1: 1.0}, {3: 2.0, 0: 1.0})
    assert task.remarks == ("queries without a relevant passage, left out: 1",)


def test_qrels_beside_the_corpus_without_a_header(folder: Path):
    (folder / "qrels" / "test.tsv").rename(folder / "qrels.tsv")
    (folder / "qrels.tsv").write_text("q0\td1\t1\n\nq2\td3\t1.0\n")
    task = read_folder(folder)
    assert task.qrels == ({1: 1.0}, {3: 1.0})
    (folder / "qrels.tsv").unlink()
    with pytest.raises(BadInput, match=r"neither qrels/test\.tsv nor qrels\.tsv"):
        read_folder(folder)


def test_missing_ids_are_named_and_counted(folder: Path):
    lines = [f"q0\tgone{i}\t1" for i in range(7)] + ["q0\td1\t1"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))
    with pytest.raises(BadInput) as error:
        read_folder(folder)
    assert str(error.value) == (
        f"{folder}: 7 of 8 qrels name passages that do not exist: 'gone0' (line 1), 'gone1' "
        "(line 2), 'gone2' (line 3), 'gone3' (line 4), 'gone4' (line 5) and 2 more; the ids of "
        "the 4 passages are like 'd0', 'd1', 'd2'"
    )
    (folder / "qrels" / "test.tsv").write_text("q0\td1\t1\nq9\td1\t1\n")
    with pytest.raises(BadInput, match=r"1 of 2 qrels name queries .* 'q9' \(line 2\);"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", "{no json", r"corpus\.jsonl, line 1: not JSON"),
        ("corpus.jsonl", '{"_id": "a", "body": "b"}', r"line 1: no field 'text'.*: '_id', 'body'"),
        ("corpus.jsonl", '["a"]', "line 1: holds no object with fields"),
        ("corpus.jsonl", '{"_id": "a", "text": 3}', "line 1: no field 'text'"),
        ("corpus.jsonl", '{"_id": [1], "text": "b"}', r"line 1: the id \[1\] is neither"),
        ("corpus.jsonl", '{"_id": "a", "text": "b"}\n' * 2, "two passages have the id 'a'"),
        ("corpus.jsonl", "", "no text to measure on"),
        ("corpus.jsonl", '{"_id": "a", "text": " "}', "no text to measure on"),
        ("queries.jsonl", '{"_id": "q0", "text": ""}', "qrels without queries"),
        ("qrels/test.tsv", "q0 d1 1\n", r"test\.tsv, line 1: 'q0 d1 1' is not query id"),
        ("qrels/test.tsv", "a\tb\tc\nq0\td1\tone\n", r"test\.tsv, line 2: "),
        ("qrels/test.tsv", "q0\td1\tnan\n", "no query has a relevant passage"),
        ("qrels/test.tsv", "", "no query has a relevant passage"),
        ("qrels/test.tsv", "q0\td1\t0\n", "no query has a relevant passage"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, name: str, content: str, message: str):
    (folder / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        read_folder(folder)


def test_files_that_cannot_be_read(folder: Path):
    (folder / "queries.jsonl").write_bytes(b'{"_id": "q0", "text": "\xff"}')
    with pytest.raises(BadInput, match=r"queries\.jsonl, line 1: not UTF-8: byte 0xff"):
        read_folder(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(BadInput, match=r"queries\.jsonl: no such file or directory"):
        read_folder(folder)


def test_ids_are_id_or_the_line(tmp_path: Path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"id": 7, "text": "b"}])
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert read_jsonl(path) == [Text(id="1", text="a"), Text(id="7", text="b")]


def test_blank_texts_are_left_out_and_told():
    passages = [Text(id="a", text="one"), Text(id="b", text="\n"), Text(id="c", text="two")]
    qrels = [
        Judgement(query_id="q", passage_id="b", relevance=1, line=1),
        Judgement(query_id="q", passage_id="c", relevance=1, line=2),
    ]
    task = join("t", passages=passages, queries=[Text(id="q", text="?")], qrels=qrels)
    assert task.passages == ("one", "two")
    assert task.qrels == ({1: 1.0},)
    assert task.remarks == ("blank passages, left out: 1",)


def test_the_fingerprint_sees_every_part():
    task = Task(name="t", passages=("a", "b"), queries=("q",), qrels=({0: 1.0},))
    others = [
        Task(name="t", passages=("b", "a"), queries=("q",), qrels=({0: 1.0},)),
        Task(name="t", passages=("a", "b"), queries=("Q",), qrels=({0: 1.0},)),
        Task(name="t", passages=("a", "b"), queries=("q",), qrels=({1: 1.0},)),
        Task(name="t", passages=("a", "b"), queries=("q",), qrels=None),
    ]
    assert len({one.sha256 for one in (task, *others)}) == 5
