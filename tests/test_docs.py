"""What the pages say is so: code runs, commands parse, files exist, lists are complete."""

from __future__ import annotations

import argparse
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from test_layers import FILES, ROOMS, room_of

import gguf_embed
from gguf_embed import Embedder, Reranker, cli, errors
from gguf_embed.cli import exits, reference
from gguf_embed.testing import FakeEmbedder, FakeReranker

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- code ------------------------------------------------------------------------------------


def python_blocks() -> list[pytest.param]:  # type: ignore[valid-type]
    """Each page's blocks, as one program: a later block uses what an earlier one imported."""
    found = []
    for page in PAGES:
        blocks = [
            code
            for language, code in BLOCK.findall(page.read_text("utf-8"))
            if language == "python"
        ]
        own = [code for code in blocks if not partner_of(code)]
        if own:
            found.append(pytest.param("\n".join(own), id=named(page)))
    return found


PARTNERS = re.compile(
    r"^(?:from|import) "
    r"(mteb|sentence_transformers|langchain_core|llama_index|haystack|chromadb|txtai|ray|lancedb)\b",
    re.MULTILINE,
)


def partner_of(code: str) -> str | None:
    """The library that a block is for, and that may not be installed."""
    found = PARTNERS.search(code)
    return found and found[1]


@pytest.mark.parametrize("code", python_blocks())
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With an engine that has every model: what is shown is the interface."""
    monkeypatch.chdir(tmp_path)
    Path("huge.txt").write_text("a text\n" * 5)

    def open_fake(model: str = "", *, isolated: bool = False, **options: object) -> FakeEmbedder:
        return FakeEmbedder.open(model or "fake", dim=1024, n_ctx=512, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Embedder, "open", open_fake)
    monkeypatch.setattr(Embedder, "connect", lambda url, model="": open_fake(model))
    monkeypatch.setattr(Reranker, "open", FakeReranker.open)
    code = code.replace('open("huge.txt")', 'Path("huge.txt").read_text().splitlines()')
    exec(compile(code, "<docs>", "exec"), {"texts": ["one", "two"], "Path": Path})


# What a page may import of the package: its face, its fake, and the faces to other projects.
PUBLIC = re.compile(r"gguf_embed(\.testing|\.integrations\.\w+)?")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_pages_import_from_the_face_alone(page: Path):
    text = page.read_text("utf-8")
    imported = re.findall(r"^(?:from|import) (gguf_embed[\w.]*)", text, re.MULTILINE)
    assert [name for name in imported if not PUBLIC.fullmatch(name)] == []


def shell_lines() -> list[tuple[str, str]]:
    """(page, command line) of each `gguf-embed ...` in a block, without its remark."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text("utf-8"))
        if page.name == "cli.md":
            continue  # made from the parsers; test_cli parses their examples
        for line in re.findall(
            r"^(?:    |.*?\| |\$ )?((?:\.venv/bin/)?gguf-embed .*)$", text, re.MULTILINE
        ):
            found.append((named(page), line))
    return found


@pytest.mark.parametrize(("page", "line"), shell_lines())
def test_commands_parse(page: str, line: str):
    words = shlex.split(line, comments=True)[1:]
    for stop in (">", "|", "&&"):
        if stop in words:
            words = words[: words.index(stop)]
    all_commands().parse_args(words)


@cache
def all_commands() -> argparse.ArgumentParser:
    """It takes ten milliseconds to make."""
    return cli.parser()


def test_there_are_commands_to_parse():
    assert len(shell_lines()) > 20
    assert {page for page, _ in shell_lines()} >= {"README.md", "docs/offline.md"}


# -- the command line --------------------------------------------------------------------------


def test_the_page_of_the_command_line_is_current():
    made, kept = reference.reference(), (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert made == kept, "run: python -m gguf_embed.cli.reference > docs/cli.md"
    assert "None" not in made, "an argument without a name, or a default that is none"


def test_every_command_option_exit_code_and_error_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for name, parser in reference.commands().items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for option in parser._option_string_actions:
            assert option in ("-h", "--help") or re.search(rf"[`, ]{option}[`, ]", section), option
    for code in exits.EXITS:
        assert f"| {code} |" in page
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.GgufEmbedError):
            assert f"| `{name}` | {error.exit_code} |" in page


def test_every_error_is_in_the_drawing():
    drawn = set(re.findall(r"\b[A-Z]\w+(?= {2,}|$)", errors.__doc__ or "", re.MULTILINE))
    classes = {
        n for n, e in vars(errors).items() if isinstance(e, type) and hasattr(e, "exit_code")
    }
    assert classes <= drawn


# -- pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_the_newest_change_is_of_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    (newest, *_) = re.findall(r"^## (\S+)", changes, re.MULTILINE)
    assert newest == gguf_embed.__version__


def test_the_architecture_is_that_of_the_package():
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    table, *journeys = page.split("\n## ")
    rows = re.findall(r"^\| `(\w+)` \|(.*)$", table, re.MULTILINE)
    there = {room_of(path) for path in FILES}
    assert [room for room, _ in rows] == [room for room in ROOMS if room in there]
    for room, row in rows:
        folder = "" if room == "ground" else f"{room}/"
        for file in re.findall(r"`(\w+\.py)`", row):
            assert folder + file in FILES
    assert len(journeys) == 3
    for journey in journeys:
        files = re.findall(r"[\w/]+\.py", journey)
        assert len(files) > 5
        assert [file for file in files if file not in FILES] == []
