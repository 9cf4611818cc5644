"""tests/FAULTS.md names tests that exist; and instances of its rows that have no other place."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import hypothesis
import numpy as np
import pytest
import sources
import tiny

from gguf_embed import Embedder, ModelNotFound, TextTooLong, cli
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
    assert named
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
    assert str(TextTooLong([(3, 1)], 0)).startswith("1 text longer than 0 tokens (row 3: 1 token);")


def strings(source: str) -> Iterator[str]:
    """All strings of a source but its docstrings; "…" stands for what is put in."""
    nodes = sources.nodes(source)
    docs = {
        id(node.body[0].value)
        for node in nodes
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inner: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
            yield "".join(
                getattr(part, "value", "…") if isinstance(part, ast.Constant) else "…"
                for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs | inner
        ):
            yield node.value


WORDINGS = {
    r"\w\(s\)": "text(s): counted() knows how many",
    r"\w[?!]\.( |$)": "a question, then a full stop",
    r"\(reading\)": "what is this?",
    r"\btap (off|on)\b": "a word of ours, not the reader's",
    r"\b1 (contexts|threads|texts|tokens|files|rows|models)\b": "one is no plural",
}


ANY_WORDING = re.compile("|".join(f"(?:{wording})" for wording in WORDINGS))


def joined(source: str) -> str:
    """The source without the places where a string goes on in the next line."""
    return re.sub(r'"\s*\n\s*f?"', "", source)


def test_wordings_on_which_a_reader_stumbled():
    found = [
        f"{path}: {text!r}: {why}"
        for path, source in sources.files().items()
        if ANY_WORDING.search(joined(source))
        for text in filter(ANY_WORDING.search, strings(source))
        for wording, why in WORDINGS.items()
        if re.search(wording, text)
    ]
    assert found == []
    assert ANY_WORDING.search(joined('say("Right?"\n    f". {n}")'))
    planted = 'def f():\n    """1 texts"""\n    say(f"{n} text(s)", "Right?. On")'
    assert len([1 for s in strings(planted) for w in WORDINGS if re.search(w, s)]) == 2


# One thing has one key in all that a command prints for programs.
KEYS = {
    "path": "file",
    "filename": "file",
    "output": "file",
    "bytes": "n_bytes",
    "size": "n_bytes",
    "texts": "n_texts",
    "tokens": "n_tokens",
    "rows": "n_texts",
    "quantization": "quant",
    "name_of_model": "model",
    "dims": "dim",
}


def keys(source: str) -> Iterator[str]:
    """The names in the dictionaries that a source writes down."""
    for node in sources.nodes(source):
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value


def test_one_thing_has_one_key_and_every_document_a_version():
    commands = {path: s for path, s in sources.files().items() if path.startswith("cli/")}
    for path, source in commands.items():
        wrong = {key: KEYS[key] for key in keys(source) if key in KEYS}
        assert wrong == {}, f"{path}: {wrong}"
        called = {
            ast.unparse(node.func) for node in sources.nodes(source) if isinstance(node, ast.Call)
        }
        prints = "json.dumps" in called
        assert prints == (path == "cli/console.py"), f"{path} prints JSON without a format"
    assert len(commands) > 10
    assert list(keys("f({'path': 1, 'n': {'output': 2}})")) == ["path", "n", "output"]


@pytest.mark.native
def test_a_document_says_what_it_is(capsys: pytest.CaptureFixture[str]):
    for command in ("models", "probe"):
        assert cli.main([command, "--json"]) == 0
        read = json.loads(capsys.readouterr().out)
        assert re.fullmatch(r"gguf-embed-[a-z]+/\d+", read["format"])


@pytest.mark.native
def test_token_vectors_have_passed_the_dense_layers(tmp_path: Path):
    """As the docstring says: llama.cpp gives no others of a model that has such layers."""
    assert "dense layers" in (Embedder.token_vectors.__doc__ or "")
    path = tiny.write_embeddinggemma(tmp_path / "gemma.gguf").path
    text, settings = "the cat and the river", Settings(tune=False)
    with Embedder.open(path, settings=settings) as embedder:
        tokens = embedder.token_vectors(text)
        assert tokens.shape == (len(embedder.tokenize(text)), embedder.dim)
        # They are linear and without a bias: the mean may be taken after them as well as before.
        mean = tokens.mean(axis=0, dtype=np.float64)
        assert mean / np.linalg.norm(mean) @ embedder.encode(text) > 1 - 1e-5
    reader = gguf.GGUFReader(path, "r+")
    dense = [each for each in reader.tensors if each.name.startswith("dense_")]
    assert len(dense) == 2
    dense[-1].data[:] *= 2
    reader.data.flush()
    del reader, dense
    with Embedder.open(path, settings=settings) as embedder:
        np.testing.assert_allclose(embedder.token_vectors(text), 2 * tokens, rtol=1e-4, atol=1e-5)


def test_no_example_is_too_slow():
    settings = hypothesis.settings.default
    assert settings is not None
    assert settings.deadline is None
    assert hypothesis.HealthCheck.too_slow in settings.suppress_health_check


def test_no_test_brings_the_limits_back():
    """What a test says of its own examples replaces what conftest.py says."""
    for path in TESTS.glob("test_*.py"):
        source = path.read_text("utf-8")
        if "settings(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "settings":
                continue
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("deadline", "None") == "None", f"{path.name}: {said}"
            health = said.get("suppress_health_check", "too_slow")
            assert "too_slow" in health or health == "list(HealthCheck)", f"{path.name}: {said}"
