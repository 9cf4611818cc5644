"""Work that is spread over machines: each piece once, in order, whoever goes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed import NativeFailed, cli
from gguf_embed.jobs.spread import TRIES, Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    index: int


def spread(n: int, *, ahead: int = 4) -> Spread[Piece, str]:
    return Spread((Piece(index=i) for i in range(n)), ahead=ahead)


@given(n=st.integers(0, 20), ahead=st.integers(1, 6), data=st.data())
def test_every_piece_once_and_in_order(n: int, ahead: int, data: st.DataObject):
    work = spread(n, ahead=ahead)
    out: list[Piece] = []
    seen: list[int] = []
    losses = dict.fromkeys(range(n), TRIES - 1)
    while not work.finished:
        while (piece := work.next()) is not None:
            out.append(piece)
        seen += [index for index, _ in work.in_order()]
        assert len(out) <= ahead
        if out:
            piece = out.pop(data.draw(st.integers(0, len(out) - 1)))
            if losses[piece.index] > 0 and data.draw(st.booleans()):
                losses[piece.index] -= 1
                work.lost(piece)
            else:
                work.done(piece.index, "made")
        seen += [index for index, _ in work.in_order()]
    assert seen == [*range(n)]


def test_a_slow_piece_holds_the_others_back():
    work = spread(10, ahead=3)
    pieces = [work.next() for _ in range(4)]
    assert [piece and piece.index for piece in pieces] == [0, 1, 2, None]
    work.done(2, "c")
    work.done(1, "b")
    assert [*work.in_order()] == []
    assert work.next() is None
    work.done(0, "a")
    work.done(0, "twice")
    assert [*work.in_order()] == [(0, "a"), (1, "b"), (2, "c")]
    work.done(1, "late")
    assert [*work.in_order()] == []
    assert work.next() == Piece(index=3)


def test_what_was_lost_comes_before_what_is_new():
    work = spread(3)
    first = work.next()
    assert first is not None
    work.next()
    work.lost(first)
    assert work.next() == first


def test_a_piece_that_ends_every_process_is_given_up():
    work = spread(1)
    piece = work.next()
    assert piece is not None
    for _ in range(TRIES - 1):
        work.lost(piece)
        assert work.next() == piece
    with pytest.raises(NativeFailed, match=r"shard 0: 4 processes ended .* --resume"):
        work.lost(piece)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["-o", "v.npy"], "is for a folder, -o DIR/"),
        (["-o", "v/", "--cache"], "goes without --cache"),
        (["-o", "v/", "--dry-run"], "goes without --dry-run"),
        (["-o", "v/", "--server", "http://127.0.0.1:1"], "goes without --server"),
        (["-o", "v/"], "Ray is not installed; pip install 'gguf-embed[ray]'"),
    ],
)
def test_what_the_command_refuses_before_a_cluster_is_asked(
    words: list[str],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name)
    )
    assert cli.main(["embed", "--text", "a", "--ray", "auto", *words]) == 2
    assert hint in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
