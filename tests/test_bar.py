"""The bar of a call: whom it is shown, and what it counts."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest

from gguf_embed import BadOption
from gguf_embed.engine import bar
from gguf_embed.testing import FakeEmbedder

TEXTS = ["a", "b", "b", "c d e"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def embed(progress: bool | None, stream: io.StringIO | None = None, **options: object) -> str:
    """What a call writes to standard error, which is a terminal unless another one is given."""
    stream = stream or Terminal()
    with redirect_stderr(stream), FakeEmbedder.open() as embedder:
        embedder.encode(TEXTS, progress=progress, **options)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work is long."""
    monkeypatch.setattr(bar, "DELAY_S", 0.0)


def test_a_bar_on_a_terminal():
    shown = embed(True)
    assert "4/4" in shown
    assert "tokens/s" in shown
    assert shown.endswith("\r")  # it is gone


def test_short_work_shows_nothing_by_itself():
    assert embed(None) == ""


@pytest.mark.usefixtures("impatient")
def test_long_work_shows_a_bar_by_itself():
    assert "4/4" in embed(None)


@pytest.mark.usefixtures("impatient")
def test_nobody_else_is_disturbed():
    """Not where it is refused, nor beside a bar of the caller's, nor in a thread of a server."""
    assert embed(False) == ""
    assert embed(None, on_progress=lambda _n, _tokens: None) == ""
    with ThreadPoolExecutor() as threads:
        assert threads.submit(embed, None).result() == ""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("progress", [True, None])
def test_nothing_into_a_pipe(progress: bool | None, monkeypatch: pytest.MonkeyPatch):
    assert embed(progress, io.StringIO()) == ""
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    with FakeEmbedder.open() as embedder:
        embedder.encode(TEXTS, progress=progress)


def test_a_notebook_gets_one_where_it_asks(monkeypatch: pytest.MonkeyPatch):
    def shell(**config: object) -> SimpleNamespace:
        return SimpleNamespace(get_ipython=lambda: SimpleNamespace(config=config))

    with redirect_stderr(io.StringIO()):
        monkeypatch.setitem(sys.modules, "IPython", shell(IPKernelApp={}))
        assert bar.wants_bar(True, beside=False)
        assert not bar.wants_bar(None, beside=False)
        monkeypatch.setitem(sys.modules, "IPython", shell())  # IPython in a pipe
        assert not bar.wants_bar(True, beside=False)


def test_the_callers_own_count_goes_on_beside_it():
    done: list[int] = []
    assert "4/4" in embed(True, on_progress=lambda n, _tokens: done.append(n))
    assert sum(done) == 4


def test_it_waits_and_then_holds_what_was_before():
    now = 0.0
    with redirect_stderr(Terminal()) as terminal:
        shown = bar.Bar(10, delay_s=3.0, clock=lambda: now)
        shown.advance(4, 40)
        assert terminal.getvalue() == ""
        now = 4.0
        shown.advance(2, 20)
        shown.close()
    assert "6/10" in terminal.getvalue()
    assert "15 tokens/s" in terminal.getvalue()


def test_without_tqdm_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert embed(True) == ""


def test_what_is_no_answer_is_refused():
    with pytest.raises(BadOption, match="progress='yes': pass True or False, or leave it out"):
        embed("yes")  # type: ignore[arg-type]
