"""The commands: what they print, what they write, what they answer to bad input and bad luck."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run_command

from gguf_embed import __version__, cli, errors
from gguf_embed.cli import doctor, exits, options, reference
from gguf_embed.errors import NativeFailed
from gguf_embed.plan.settings import Settings
from gguf_embed.testing import FakeEmbedder

TIMEOUT_S = 120  # a hang is one after that, also on a busy machine
DIM = 64  # of the fake engine
FAKE_COMMAND = """
import sys
from gguf_embed import cli
from gguf_embed.cli import options
from gguf_embed.testing import FakeEmbedder

def open_fake(model, settings=None, *, quiet=False, isolated=False):
    return FakeEmbedder.open(model, settings=settings)

options.open_embedder = open_fake
sys.exit(cli.main())
"""
FAKE = [sys.executable, "-c", FAKE_COMMAND]


def open_fake(
    model: str, settings: Settings | None = None, *, quiet: bool = False, isolated: bool = False
) -> FakeEmbedder:
    if model == "broken":
        raise NativeFailed("it is\nbroken")
    return FakeEmbedder.open(model, settings=settings)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """run(*arguments) -> (exit code, standard output, standard error), with the fake engine."""
    monkeypatch.setattr(options, "open_embedder", open_fake)

    return partial(run_command, capsys)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("a cat sits\n\na dog runs\n")
    return path


def vectors_of(texts: list[str], **choices: object) -> np.ndarray:
    with FakeEmbedder.open() as embedder:
        return embedder.encode(texts, **choices)


def one_line(err: str) -> str:
    """The error, which must be one line of ours."""
    assert err.startswith("gguf-embed: ")
    assert err.count("\n") == 1
    return err


# -- embed -----------------------------------------------------------------------------------


def test_embed_writes_an_array_row_by_line(run: Run, notes: Path, tmp_path: Path):
    code, out, err = run("embed", notes, "-o", tmp_path / "v.npy")
    assert (code, out) == (0, "")
    vectors = np.load(tmp_path / "v.npy")
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, DIM))
    np.testing.assert_array_equal(vectors, vectors_of(["a cat sits", "", "a dog runs"]))
    assert re.fullmatch(
        r"gguf-embed: 3 texts, 12 tokens in [\d.]+ s \([\d,]+ tokens/s\); 0 truncated; "
        r"fake F32; \S+v\.npy: float32 \(3, 64\)\n",
        err,
    )


def test_embed_says_what_made_the_vectors(run: Run, notes: Path, tmp_path: Path):
    arguments = ("--prompt-name", "query", "--dimensions", 60, "--no-normalize", "--exact")
    assert run("embed", notes, "-o", tmp_path / "v.npy", *arguments)[0] == 0
    with FakeEmbedder.open() as embedder:
        space = embedder.fingerprint(prompt="query: ", dimensions=60, normalize=False)
    assert json.loads((tmp_path / "v.npy.meta.json").read_text()) == {
        "format": "gguf-embed-vectors/1",
        "fingerprint": space.id,
        "model": "fake",
        "quant": "F32",
        "model_file": "fake.gguf",
        "sha256": space.sha256,
        "pooling": "mean",
        "prompt": "query: ",
        "dim": 60,
        "normalized": False,
        "n_ctx": 32,
        "plan": {
            "reason": "a fake, for tests",
            "where": "CPU",
            "n_gpu_layers": 0,
            "fit": "fits",
        },
        "exact": True,
        "truncate": "error",
        "n_texts": 3,
        "n_truncated": 0,
        "n_failed": 0,
        "gguf_embed": __version__,
    }
    how = {"prompt": "query: ", "dimensions": 60, "normalize": False}
    expected = vectors_of(["a cat sits", "", "a dog runs"], **how)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)


def test_embed_writes_json_lines(run: Run, tmp_path: Path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f'{{"body": "text {i}", "key": {i}}}\n' for i in range(9)))
    target = tmp_path / "v.jsonl"
    assert run("embed", source, "--field", "body", "--id-field", "key", "-o", target)[0] == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(9)]
    assert [row["position"] for row in rows] == list(range(1, 10))
    assert {row["source"] for row in rows} == {str(source)}
    expected = vectors_of([f"text {i}" for i in range(9)])
    np.testing.assert_array_equal(np.float32([row["vector"] for row in rows]), expected)


def test_json_lines_hold_texts_and_fields_that_are_asked_for(run: Run, tmp_path: Path):
    source, target = tmp_path / "rows.csv", tmp_path / "v.jsonl"
    source.write_text('text,author,year\n"two\nlines",Ann,1999\nlast,"Bo, C",2001\n')
    asked = [
        (["--with-text"], {"text": "two\nlines"}),
        (["--keep", "year"], {"fields": {"year": "1999"}}),
        (
            ["--keep", "all", "--with-text"],
            {
                "text": "two\nlines",
                "fields": {"author": "Ann", "year": "1999"},
            },
        ),
    ]
    for arguments, more in asked:
        assert run("embed", source, "-o", target, *arguments)[0] == 0
        row, last = map(json.loads, target.read_text().splitlines())
        assert row.pop("vector")
        assert row == {
            "id": f"{source}:2",
            "source": str(source),
            "position": 2,
            "last_position": 3,
            "truncated": False,
            **more,
        }
        assert last.get("fields", {}).get("author") in (None, "Bo, C")


def test_a_cut_that_the_model_may_not_be_trained_for_is_told(run: Run, tmp_path: Path):
    target = tmp_path / "v.npy"
    _, _, err = run("embed", "--text", "x", "-o", target, "--dimensions", 8, "--quiet")
    assert "fake is not known to be trained for shorter vectors: the first 8 of 64" in err
    assert "trained" not in run("embed", "--text", "x", "-o", target, "--dimensions", DIM)[2]


def test_embed_says_what_it_passes_over(run: Run, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name in ["a.md", "b.rst", "c.rst", "d.html"]:
        (tmp_path / "in" / name).write_text("words\n")
    target = tmp_path / "v.jsonl"
    passed = "3 other files passed over (.rst, .html); --include '*.rst' takes such files as text"
    for command in (["embed", "-o", target], ["search", "words"]):
        assert f"gguf-embed: {passed}\n" in run(*command, tmp_path / "in")[2]
        assert "passed over" not in run(*command, tmp_path / "in", "--quiet")[2]
    code, _, err = run("embed", tmp_path / "in", "-o", target, "--include", "*.rst")
    assert (code, "1 other file passed over (.html)" in err) == (0, True)
    sources = [Path(json.loads(line)["source"]).name for line in target.read_text().splitlines()]
    assert sources == ["a.md", "b.rst", "c.rst"]


def test_names_that_are_no_utf8_and_pipes_are_inputs_like_others(run: Run, tmp_path: Path):
    folder = os.fsencode(tmp_path)
    odd = os.fsdecode(folder + b"/\xff.txt")
    Path(odd).write_text("text\n")
    target = os.fsdecode(folder + b"/\xfe.jsonl")
    assert run("embed", odd, "-o", target)[0] == 0
    assert json.loads(Path(target).read_text())["source"] == f"{tmp_path}/\\xff.txt"
    assert "no such file" in one_line(run("embed", odd + "x")[2])
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"a\nb\n",))
    writer.start()
    code, out, _ = run("embed", tmp_path / "pipe", "--quiet")
    writer.join()
    assert (code, len(out.splitlines())) == (0, 2)


def test_embed_takes_texts_and_writes_to_standard_output_by_default(run: Run):
    code, out, err = run("embed", "--text", "one", "--text", "two")
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["--text:1", "--text:2"]
    assert "standard output: float32 (2, 64)" in err


def test_the_summary_is_json_for_programs(run: Run, notes: Path, tmp_path: Path):
    code, out, err = run("embed", notes, "-o", tmp_path / "v.npy", "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert summary["shape"] == [3, DIM]
    assert summary["n_tokens"] == 12
    assert summary["made_with"]["model"] == "fake"
    code, out, err = run("embed", notes, "--json")  # standard output holds the vectors
    assert len(out.splitlines()) == 3
    assert json.loads(err)["n_texts"] == 3


def test_quiet_says_nothing(run: Run, notes: Path, tmp_path: Path):
    assert run("embed", notes, "-o", tmp_path / "v.npy", "--quiet") == (0, "", "")


def test_empty_input_gives_an_empty_array(run: Run, tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    code, _, err = run("embed", tmp_path / "empty.txt", "-o", tmp_path / "v.npy")
    assert (code, np.load(tmp_path / "v.npy").shape) == (0, (0, DIM))
    assert "0 texts, 0 tokens" in err
    run("embed", tmp_path / "empty.txt", "-o", tmp_path / "v.npy", "--dimensions", 7)
    assert np.load(tmp_path / "v.npy").shape == (0, 7)


def test_every_text_that_is_too_long_is_named(run: Run, tmp_path: Path):
    lengths = [3, 5, 5, 5, 5, 40, 30, 31, 5, 100, 1]  # the first four come back before
    source = tmp_path / "long.txt"
    source.write_text("".join("w " * n + "\n" for n in lengths))
    code, out, err = run("embed", source, "-o", tmp_path / "v.npy")
    assert (code, out) == (2, "")
    *rows, last = err.splitlines()
    too_long = [(6, 42), (8, 33), (10, 102)]
    assert rows == [f"gguf-embed: {source}:{i}: {n} tokens" for i, n in too_long]
    assert "3 texts longer than the 32 tokens of fake; " in last
    assert f"{tmp_path}/v.npy is not written" in last
    assert "--truncate end (keeps the start)" in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.txt"]


@pytest.mark.parametrize("end", ["end", "start"])
def test_truncation_is_counted_and_told(run: Run, tmp_path: Path, end: str):
    source = tmp_path / "long.txt"
    source.write_text("".join("w " * n + "\n" for n in [1, *[40] * 7]))
    code, _, err = run("embed", source, "-o", tmp_path / "v.jsonl", "--truncate", end)
    assert code == 0
    summary, told = err.splitlines()
    assert "7 truncated" in summary
    assert told == (
        "gguf-embed: truncated to 32 tokens: "
        + ", ".join(f"{source}:{i}" for i in range(2, 7))
        + ", ..."
    )
    rows = map(json.loads, (tmp_path / "v.jsonl").read_text().splitlines())
    assert [row["truncated"] for row in rows] == [False] + [True] * 7


def test_settings_reach_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch):
    opened: list[FakeEmbedder] = []

    def open_embedder(model: str, settings: Settings, **_: object) -> FakeEmbedder:
        opened.append(open_fake(model, settings))
        return opened[-1]

    monkeypatch.setattr(options, "open_embedder", open_embedder)
    run("embed", "--text", "x", "--threads", 3, "--max-batch-tokens", 99, "--pooling", "cls")
    run("embed", "--text", "x", "--no-tune")
    first, second = (e.settings for e in opened)
    assert first is not None
    assert second is not None
    assert (first.n_threads, first.max_batch_tokens, first.pooling) == (3, 99, 2)
    assert (second.n_threads, second.max_batch_tokens, second.pooling) == (None, None, None)
    assert (first.tune, second.tune) == (True, False)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["embed"], 2, "nothing to embed: name files"),
        (["embed", "absent.txt"], 2, "absent.txt: no such file"),
        (["embed", "notes.txt", "-o", "v.txt"], 2, "-o v.txt: the ending says the format"),
        (["embed", "notes.txt", "-o", "no/v.npy"], 7, "no/v.npy: not written: .* mkdir -p no"),
        (["embed", "notes.txt", "-o", "notes.txt/v.npy"], 7, "not written: Not a directory"),
        (["embed", "empty"], 2, "empty: no .txt, .md, .jsonl, .csv, .parquet, .arrow file"),
        (["embed", "bad.txt"], 2, "bad.txt, line 2: not UTF-8: byte 0xff at offset 4"),
        (["embed", "rows.jsonl"], 2, "rows.jsonl, line 1: no field 'text'; .*'body'"),
        (["embed", "rows.jsonl", "-o", "rows.jsonl"], 2, "is also an input"),
        (["embed", "notes.txt", "--prompt", "a\udcff"], 2, "--prompt: character 1 is the lone"),
        (
            ["embed", "notes.txt", "--keep", "year"],
            2,
            "--keep: only .jsonl, .csv and tables have fields",
        ),
        (["embed", "rows.jsonl", "--field", "body", "--keep", "x"], 2, "no field 'x'.*--keep"),
        (["embed", "notes.txt", "--with-text", "-o", "v.npy"], 2, "an array has no place"),
        (["embed", "notes.txt", "--include", "*.rst"], 2, "'\\*.rst': matches no file"),
        (["embed", "/dev/null"], 2, "/dev/null: is a device or a socket"),
        (["embed", "notes.txt", "--prompt-name", "nope"], 2, "no prompt 'nope'"),
        # What a variable of the shell gives that is not set.
        (["embed", "notes.txt", "--prompt-name", ""], 2, "no prompt ''"),
        (["embed", "notes.txt", "--quant", ""], 2, "quant='': pass a name"),
        (["embed", ""], 2, "an input is empty"),
        (["embed", "a\0b"], 2, "an argument holds a NUL"),
        (["search", "x", ""], 2, "an input is empty"),
        (["pull", ""], 2, "the name of the model is empty"),
        (["plan", ""], 2, "the name of the model is empty"),
        (["pull", "notes.txt"], 3, "notes.txt: not a GGUF file"),
        (
            ["embed", "notes.txt", "--dimensions", "999"],
            2,
            "dimensions=999: .* 1 to 64 values",
        ),
        (["embed", "notes.txt", "--dimensions", "0"], 2, "'0' is not a whole number from 1"),
        (["embed", "notes.txt", "--prompt", "a", "--prompt-name", "b"], 2, "not allowed with"),
        (["embed", "notes.txt", "--model", "broken"], 8, "gguf-embed: it is broken$"),
        (["search", " ", "notes.txt"], 2, "the question is empty"),
        (["search", "w " * 50, "notes.txt"], 2, "the question has 53 tokens, fake takes 32"),
        (["search", "a\udcff", "notes.txt"], 2, "lone surrogate"),
        (["search", "x", "notes.txt", "--top", "-1"], 2, "--top"),
        (["search", "x"], 2, "required: INPUT; see gguf-embed search --help"),
        (["nope"], 2, "invalid choice: 'nope'"),
        ([], 2, "required: COMMAND; see gguf-embed --help"),
        (
            ["embed", "notes.txt", "--nope"],
            2,
            "unrecognized arguments: --nope; see gguf-embed embed --help",
        ),
        (["--nope", "embed", "notes.txt"], 2, "arguments: --nope; see gguf-embed --help"),
        (["search", "x", "notes.txt", "--debug", "--n"], 2, "--n; see gguf-embed search --help"),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    run: Run,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    complaint: str,
):
    monkeypatch.chdir(notes.parent)
    Path("empty").mkdir()
    Path("bad.txt").write_bytes(b"ok\na\xffb\n")
    Path("rows.jsonl").write_text('{"body": "x"}\n')
    before = sorted(Path.cwd().iterdir())
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert re.search(complaint, one_line(err))
    assert sorted(Path.cwd().iterdir()) == before


def test_the_output_is_tried_before_the_model_is_opened(run: Run, notes: Path):
    code, _, err = run("embed", notes, "-o", "/proc/v.npy", "--model", "broken")
    assert code == 7
    assert "/proc/v.npy: not written" in one_line(err)


def test_an_error_in_the_middle_leaves_no_file(run: Run, tmp_path: Path):
    source = tmp_path / "bad.txt"
    source.write_bytes(b"ok\n" * 20 + b"\xff")
    assert run("embed", source, "-o", tmp_path / "v.npy")[0] == 2
    assert list(tmp_path.iterdir()) == [source]


def test_the_unexpected_is_one_line_too_unless_asked(
    run: Run, notes: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(model: str, settings: object, **_: object) -> FakeEmbedder:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(options, "open_embedder", fail)
    code, _, err = run("embed", notes)
    assert code == 1
    assert "unexpected ZeroDivisionError: oh no; this is a bug: --debug" in one_line(err)
    for arguments in (["embed", notes, "--debug"], ["--debug", "embed", notes]):
        with pytest.raises(ZeroDivisionError):
            run(*arguments)
    monkeypatch.setenv("GGUF_EMBED_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("embed", notes)


# -- search ----------------------------------------------------------------------------------


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Cats\n\ncats purr\n\n# Dogs\n\ndogs bark\n")
    (tmp_path / "docs" / "b.txt").write_text("birds sing\n\n" + "fish swim " * 40 + "\n")
    return tmp_path / "docs"


def test_search_prints_the_best_first(run: Run, docs: Path):
    code, out, err = run("search", "dogs bark", docs, "--top", 2)
    assert (code, err) == (0, "")
    first, text, *_ = out.splitlines()
    assert re.fullmatch(rf" 1  0\.\d\d\d  {docs}/a\.md:5", first)
    assert text.strip() == "# Dogs dogs bark"
    assert len(re.findall(r"^ \d  ", out, re.MULTILINE)) == 2


def test_search_results_for_programs(run: Run, docs: Path):
    found = json.loads(run("search", "birds sing", docs, "--json")[1])
    assert (found["query"], found["model"]) == ("birds sing", "fake")
    scores = [result["score"] for result in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert found["results"][0] == {
        "score": pytest.approx(2 / 3, abs=1e-5),
        "id": f"{docs}/b.txt:1",
        "source": f"{docs}/b.txt",
        "position": 1,
        "last_position": 1,
        "text": "birds sing",
    }


def test_search_cuts_long_texts_and_passes_over_blank_ones(run: Run, docs: Path):
    found = json.loads(run("search", "fish", docs / "b.txt", "--json", "--top", 99)[1])
    texts = [result["text"] for result in found["results"]]
    assert "" not in texts
    assert sum(text.split().count("swim") for text in texts) == 40
    assert all(len(text.split()) + 3 <= 32 for text in texts)
    assert found["n_passages"] == len(texts) == 5


def test_search_reads_prose_as_paragraphs(run: Run, tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    lines = json.loads(run("search", "x", tmp_path / "a.txt", "--json")[1])
    prose = json.loads(run("search", "x", tmp_path / "a.txt", "--json", "--prose")[1])
    assert sorted(r["text"] for r in lines["results"]) == ["one", "three", "two"]
    assert [r["text"] for r in prose["results"]] == ["one\ntwo\n\nthree"]


def test_search_passes_over_files_of_a_folder_that_hold_no_texts(run: Run, docs: Path):
    """Such as what `embed` wrote there; a file that was named stops it as ever."""
    (docs / "vectors.jsonl").write_text('{"id": 1, "vector": [1, 2]}\n')
    (docs / "sub").mkdir()
    (docs / "sub" / "numbers.csv").write_text("a,b\n1,2\n")
    (docs / "sub" / "half.txt").write_bytes(b"mice squeak\n\xff\n")
    (docs / "sub" / "gone.md").symlink_to("nowhere")
    code, out, err = run("search", "mice squeak", docs, "--json", "--top", 99)
    assert code == 0, err
    passed_over = sorted(line for line in err.splitlines())
    assert len(passed_over) == 4
    assert all(line.startswith("gguf-embed: passed over: ") for line in passed_over)
    for what in (
        "vectors.jsonl, line 1: no field 'text'",
        "numbers.csv, line 1: no field 'text'",
        "half.txt, line 2: not UTF-8",
        "gone.md: no such file or directory, where its link leads",
    ):
        assert what in err
    texts = [result["text"] for result in json.loads(out)["results"]]
    assert texts[0] == "mice squeak"
    assert {"birds sing", "# Dogs\n\ndogs bark"} <= set(texts)
    assert run("search", "x", docs, "--quiet")[2] == ""
    assert run("search", "x", docs, docs / "vectors.jsonl")[0] == 2
    assert run("embed", docs)[0] == 2
    for i in range(9):
        (docs / f"{i}.jsonl").write_text("[]\n")
    assert "passed over: 8 other files" in run("search", "x", docs)[2]


def test_search_in_a_folder_without_any_text_says_why(run: Run, tmp_path: Path):
    (tmp_path / "gone.md").symlink_to("nowhere")
    code, _, err = run("search", "x", tmp_path)
    assert code == 2
    assert "where its link leads" in one_line(err)
    (tmp_path / "a.jsonl").write_text("[]\n")
    code, _, err = run("search", "x", tmp_path)
    assert code == 0
    assert "a.jsonl, line 1: holds a list" in err
    assert "no passage with text" in err


def test_search_among_nothing_finds_nothing(run: Run, tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n \n")
    code, out, err = run("search", "x", tmp_path / "a.txt")
    assert (code, out) == (0, "")
    assert "no passage with text" in one_line(err)


def test_equal_scores_come_in_reading_order(run: Run, tmp_path: Path):
    (tmp_path / "a.txt").write_text("same\n" * 10)
    found = json.loads(run("search", "same", tmp_path / "a.txt", "--json", "--top", 3)[1])
    assert [r["position"] for r in found["results"]] == [1, 2, 3]


# -- help and version ------------------------------------------------------------------------


def test_version(run: Run):
    assert run("--version") == (0, f"gguf-embed {__version__}\n", "")


def commands() -> list[str]:
    return sorted(cli.parser()._subparsers._group_actions[0].choices)  # type: ignore


def test_the_commands_are_there():
    assert {"doctor", "embed", "models", "probe", "search"} <= set(commands())
    folder = Path(cli.__file__).parent
    assert commands() == sorted(
        path.stem for path in folder.glob("*.py") if "\ndef add(commands" in path.read_text("utf-8")
    )


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", [None, *commands()])
def test_help_fits_the_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str | None, columns: int
):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(*filter(None, [command]), "--help")
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > min(columns, 100)] == []


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", [None, *commands()])
def test_help_breaks_no_word(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str | None, columns: int
):
    """The same words, whatever the width; a long command goes on after a backslash."""

    def words(width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        usage, _, rest = run(*filter(None, [command]), "--help")[1].partition("\n\n")
        assert usage.startswith("usage: ")
        return [word for word in rest.split() if word != "\\"]

    assert words(columns) == words(100)


@pytest.mark.parametrize("command", commands())
def test_common_options_are_short_too(command: str):
    known = reference.commands()[command]._option_string_actions
    for long, short in cli.SHORT.items():
        if long in known:
            assert known[short] is known[long]
            assert known[long].option_strings[-1] == long


def test_a_short_option_is_understood(run: Run):
    assert json.loads(run("models", "default", "-j")[1])["chosen"] is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gguf-embed comp", {"compare", "completion"}),
        ("gguf-embed pull --dr", {"--drop-source"}),
        ("gguf-embed embed -m all-mini", {"all-minilm-l6-v2"}),
        ("gguf-embed models rm bge-m", {"bge-m3"}),
    ],
)
def test_a_shell_completes(line: str, expected: set[str], tmp_path: Path):
    """As argcomplete's script asks: by variables, and answered in a file."""
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "IFS": "\n"}
    asked |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    asked |= {"_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    command = [sys.executable, "-m", "gguf_embed"]
    subprocess.run(command, env={**os.environ, **asked}, check=True, timeout=60)
    assert {word.strip() for word in answer.read_text().split("\n")} == expected


def test_what_a_shell_reads(run: Run):
    code, out, _ = run("completion", "bash")
    assert code == 0
    assert "complete " in out
    assert "gguf-embed" in out


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("arguments", [["models"], ["plan", "bge-m3"], ["probe"]])
def test_tables_fit_the_terminal(
    real: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], columns: int
):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = real(*arguments)
    assert [line for line in out.splitlines() if len(line) > columns] == []


@pytest.mark.parametrize("command", [None, *commands()])
def test_every_help_tells_the_exit_codes(run: Run, command: str | None):
    out = " ".join(run(*filter(None, [command]), "--help")[1].split())
    assert " ".join(exits.exits_line().split()) in out


def test_the_exit_codes_are_those_of_the_errors():
    classes = [value for value in vars(errors).values() if hasattr(value, "exit_code")]
    codes = {cls.exit_code for cls in classes}
    assert codes <= set(exits.EXITS)
    assert set(exits.EXITS) - codes == {0, 75, 130, 141, 143}


@pytest.mark.parametrize("command", commands())
def test_help_teaches_by_example(run: Run, command: str):
    code, out, _ = run(command, "--help")
    assert code == 0
    examples = re.sub(r" \\\n +", " ", out.split("examples:\n")[1])
    assert f"gguf-embed {command}" in examples
    parser = cli.parser()
    for line in examples.splitlines():
        _, ours, rest = line.partition("gguf-embed ")
        command_line, _, _ = rest.partition("   ")  # a remark follows
        if ours and not line.startswith(" " * 8):  # there a remark stands alone
            parser.parse_args(shlex.split(command_line.split(">")[0]))


def test_nothing_that_a_terminal_obeys_is_printed(run: Run, tmp_path: Path):
    name = "\x1b[2Ja.txt"
    (tmp_path / name).write_text("\x1b]0;title\x07 text\u202e\n")
    _, out, _ = run("search", "text", tmp_path / name)
    assert "\\x1b[2Ja.txt:1" in out
    assert "\\x1b]0;title\\x07 text\\u202e" in out
    _, _, err = run("embed", tmp_path / f"{name}x")
    assert "no such file" in one_line(err)
    assert not {"\x1b", "\x07", "\u202e"} & {*out, *err}


# -- what happens to a process ---------------------------------------------------------------


def spawn(arguments: list[object], **kwargs: object) -> subprocess.Popen[bytes]:
    command = [*FAKE, *map(str, arguments)]
    # Unbuffered output would hide what happens to buffers at the end of a process.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    usual = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{**usual, "env": environment, **kwargs})  # type: ignore[arg-type]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, b"gguf-embed: interrupted\n"),
        (signal.SIGTERM, 143, b"gguf-embed: terminated\n"),
        (signal.SIGHUP, 143, b"gguf-embed: terminated\n"),
        (signal.SIGKILL, -9, b""),
    ],
)
def test_stopped_half_way_the_older_file_stays(
    tmp_path: Path, number: signal.Signals, code: int, said: bytes
):
    target = tmp_path / "v.npy"
    np.save(target, np.ones((2, 3), np.float32))
    before = target.read_bytes()
    with spawn(["embed", "-", "-o", target]) as process:
        assert process.stdin
        process.stdin.write(b"text\n" * 10_000)
        process.stdin.flush()
        wait_for(lambda: len(list(tmp_path.iterdir())) > 1)  # it is at work, and waits for more
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (code, b"", said)
    assert target.read_bytes() == before
    if number == signal.SIGKILL:  # which leaves no time to clean up: the next run does it
        assert len(list(tmp_path.iterdir())) > 1
        with spawn(["embed", "-", "-o", target]) as process:
            out, err = process.communicate(b"text\n", timeout=TIMEOUT_S)
        assert process.returncode == 0, err
        assert np.load(target).shape == (1, DIM)
        described = target.with_name("v.npy.meta.json")
        assert sorted(tmp_path.iterdir()) == [target, described]
    else:
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_a_full_disk_keeps_the_older_file_and_tells_the_numbers(tmp_path: Path):
    target = tmp_path / "v.npy"
    np.save(target, np.ones((2, 3), np.float32))
    before = target.read_bytes()

    def limit() -> None:  # the kernel refuses to let any file grow beyond this, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = spawn(["embed", "-", "-o", target], preexec_fn=limit)
    out, err = process.communicate(b"text\n" * 2000, timeout=TIMEOUT_S)
    assert (process.returncode, out) == (7, b"")
    assert re.search(
        r"v\.npy: not written: File too large after \d+ bytes, \d+ bytes free on that disk; "
        r"make room, or choose another disk; the older file of that name is unchanged",
        one_line(err.decode()),
    )
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["embed", "-"], ["search", "x", "-"]])
def test_standard_output_on_a_full_disk(command: list[object]):
    with Path("/dev/full").open("wb") as full:
        process = spawn(command, stdout=full)
        _, err = process.communicate(b"text\n" * 10, timeout=TIMEOUT_S)
    assert process.returncode == 7
    said = "standard output: not written: No space left on device"
    assert said in one_line(err.decode())


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error_to_talk_about():
    process = spawn(["embed", "-"])
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"text\n" * 1000)
    process.stdin.close()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=TIMEOUT_S) == 141
    assert process.stderr
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.slow
def test_a_reader_that_never_reads_is_none_either():
    process = spawn(["search", "x", "-"])
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"text\n", timeout=TIMEOUT_S)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.slow
def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path):
    (tmp_path / "a.txt").write_text("日本\n", "utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = spawn(["search", "x", tmp_path / "a.txt"], env=environment)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, b"")
    assert b"\\u65e5\\u672c" in out


def on_terminal(command: list[str], text: bytes) -> bytes:
    """Standard error of a command that has a terminal there."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=secondary
    )
    os.close(secondary)
    assert process.stdin
    process.stdin.write(text)
    process.stdin.close()
    seen = b""
    while select.select([primary], [], [], TIMEOUT_S)[0]:
        try:
            seen += os.read(primary, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
    os.close(primary)
    assert process.wait(timeout=TIMEOUT_S) == 0
    return seen


@pytest.mark.slow
def test_a_terminal_gets_a_progress_bar():
    seen = on_terminal([*FAKE, "embed", "-"], b"text\n" * 100)
    assert re.search(rb"100 texts, [\d,]+ texts/s, [\d,]+ tokens/s", seen)
    quiet = on_terminal([*FAKE, "embed", "-", "--quiet"], b"text\n" * 100)
    assert quiet == b""


@pytest.mark.slow
def test_without_rich_there_is_no_bar_but_all_else():
    blocked = f"import sys; sys.modules['rich'] = None\n{FAKE_COMMAND}"
    seen = on_terminal([sys.executable, "-c", blocked, "embed", "-"], b"text\n" * 100)
    assert seen.count(b"\n") == 1
    assert b"100 texts, 300 tokens" in seen


# -- a process that lacks what others have ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_change_no_file(tmp_path: Path, closed: tuple[int, ...]):
    (tmp_path / "a.txt").write_text("text\n")
    target = tmp_path / "v.npy"
    arguments = ["embed", tmp_path / "a.txt", "-o", target]
    process = spawn(arguments, preexec_fn=lambda: [os.close(number) for number in closed])
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (0, b"")
    assert (err == b"") == (2 in closed)
    np.testing.assert_array_equal(np.load(target), vectors_of(["text"]))
    assert json.loads(target.with_name("v.npy.meta.json").read_text())["n_texts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "number", "code", "said"),
    [
        (["embed", "-"], 0, 2, "- (standard input) is closed; name a file"),
        (["embed", "--text", "x"], 1, 7, "standard output: is closed; name a file with -o"),
        (["models"], 1, 7, "standard output: is closed; leave it open"),
    ],
)
def test_a_closed_stream_that_is_needed_is_told(
    arguments: list[object], number: int, code: int, said: str
):
    process = spawn(arguments, preexec_fn=lambda: os.close(number))
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert said in one_line(err.decode())


NOBODY = """
import pwd, runpy, sys
def unknown(number): raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = unknown
sys.argv = sys.argv[1:]
from gguf_embed.cli import main
sys.exit(main())
"""


@pytest.mark.native
@pytest.mark.parametrize("command", [["models"], ["probe"], ["embed", "--text", "x", "--no-tune"]])
def test_a_user_without_entry_and_home(tmp_path: Path, command: list[str]):
    kept = {key: value for key, value in os.environ.items() if "HOME" not in key}
    environment = {**kept, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, "gguf-embed", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]  # no folder called ~


# -- the real engine -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's own folder: empty at first, so that the self-test runs once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def real(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run() without the fake."""
    monkeypatch.undo()
    monkeypatch.setenv("GGUF_EMBED_HOME", str(home))
    return run


@pytest.mark.native
def test_the_built_in_model_from_file_to_answer(tmp_path: Path, home: Path):
    texts = tmp_path / "a.txt"
    texts.write_text("The kitten naps on the sofa.\n\nShares fell sharply in Tokyo.\n")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gguf_embed", *map(str, arguments)],
            env={**os.environ, "GGUF_EMBED_HOME": str(home)},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("embed", texts, "-o", tmp_path / "v.npy", "--no-tune")
    assert done.returncode == 0, done.stderr
    proved, summary = done.stderr.splitlines()  # at first use the file is proved in a child
    assert proved.startswith("gguf-embed: proved all-minilm-l6-v2")
    assert "3 texts" in summary
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    made_with = json.loads((tmp_path / "v.npy.meta.json").read_text())
    assert (made_with["model"], made_with["quant"]) == ("all-minilm-l6-v2", "Q8_0")
    assert len(made_with["sha256"]) == 64
    done = run("search", "a sleeping cat", texts, "--json", "--no-tune")
    best, other = json.loads(done.stdout)["results"]
    assert best["position"] == 1
    assert best["score"] > other["score"] + 0.3


def test_the_real_engine_names_long_texts(real: Run, tmp_path: Path):
    texts = tmp_path / "a.txt"
    texts.write_text("fine\n" + "word " * 600 + "\n" + "word " * 700 + "\n")
    code, _, err = real("embed", texts, "-o", tmp_path / "v.npy", "--no-tune")
    assert code == 2
    assert f"{texts}:2: 602 tokens\n" in err
    assert f"{texts}:3: 702 tokens\n" in err
    assert not (tmp_path / "v.npy").exists()
    code, _, err = real("embed", texts, "--truncate", "end", "--no-tune")
    assert code == 0
    assert "2 truncated" in err


def test_models_are_known_and_here(real: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    listed = json.loads(real("models", "--json")[1])
    known = {card["id"]: card for card in listed["known"]}
    assert known["all-minilm-l6-v2"]["here"][0]["quant"] == "Q8_0"
    assert known["qwen3-embedding-8b"]["dim"] == 4096
    row = next(r for r in real("models")[1].splitlines() if r.startswith("all-minilm-l6-v2"))
    assert row.split()[-1] == "Q8_0"


def test_probe_tells_about_this_machine(real: Run):
    machine = json.loads(real("probe", "--json")[1])
    assert machine["source"] == "reading"
    assert machine["cpu_model"] in real("probe")[1]


def test_doctor_finds_this_machine_well(real: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "WEIGHT_TYPES", ("Q8_0",))
    code, out, _ = real("doctor", "--json")
    report = json.loads(out)
    assert (code, report["works"]) == (0, True)
    assert report["self_test"]["Q8_0"]["plain"] == "ok"
    assert report["versions"]["gguf-embed"] == __version__
    gain = report["accelerator"]
    assert gain["ratio"] > 0 if gain["kernel"] else gain["remark"]


@pytest.mark.parametrize(
    ("stage", "code", "said"),
    [("repack", 0, "embedding works here"), ("plain", 1, "embedding does not work here")],
)
def test_doctor_tells_of_a_crash_and_how_to_mend_it(
    real: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: str,
    code: int,
    said: str,
):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))  # keep the verdict from other tests
    monkeypatch.setenv("GGUF_EMBED_SELFTEST_FAULT", f"{stage}:SIGILL")
    monkeypatch.setattr(doctor, "WEIGHT_TYPES", ("F32", "Q8_0"))
    got, out, _ = real("doctor")
    assert got == code
    assert f"{stage} SIGILL" in out
    assert "CMAKE_ARGS" in out
    assert out.endswith(f"{said}\n")
