"""Runs of like characters, which llama.cpp's pre-tokenizers take one stack frame each."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.engine import stacks
from gguf_embed.engine.stacks import call_with_stack, stack_bytes, stack_pool
from gguf_embed.engine.tokenizer import longest_run

pytestmark = pytest.mark.native

RECURSES = ("gpt-4o", "granite-embed-multi-97m", "tekken", "exaone-moe", "default")

CHILD = """
import sys, threading
from pathlib import Path
from gguf_embed.engine.tokenizer import RunTooLong, Tokenizer
from gguf_embed.plan.mode import SpecialTokens
from gguf_embed.gguf.header import read_header
from gguf_embed.native.model import Model

path = Path(sys.argv[1])
model = Model(path)
tokenizer = Tokenizer(path, read_header(path), model, SpecialTokens())

def check():
    for unit in (".", "a", "A", " ", "7", "\\n", "\\u4e2d", "\\U0001f600", "e\\u0301", "ab "):
        n = 40_000 // len(unit)
        try:
            ids = tokenizer.encode(unit * n)
        except RunTooLong as error:
            print("refused", error)
        else:
            assert len(ids) >= n, (unit, len(ids))
    print("survived")

threading.stack_size(256 << 10)  # as on musl, or smaller than the main thread's
thread = threading.Thread(target=check)
thread.start()
thread.join()
"""


def write(path: Path, pre: str) -> Path:
    tiny.write_qwen3(path, pre=pre)
    return path


def in_child(path: Path, code: str = CHILD) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("pre", [*RECURSES, "qwen2", "llama-bpe", "never-heard-of"])
def test_a_long_run_is_tokenized_in_any_thread(tmp_path: Path, pre: str):
    done = in_child(write(tmp_path / "m.gguf", pre))
    if pre == "never-heard-of":  # llama.cpp refuses it
        assert "unknown pre-tokenizer" in done.stderr
    else:
        assert done.stdout == "survived\n", (done.returncode, done.stderr[-500:])


def test_digits_that_would_take_for_ever_are_refused(tmp_path: Path):
    done = in_child(write(tmp_path / "m.gguf", "superbpe"))
    first, last = done.stdout.splitlines()
    assert first.startswith("refused has 40,000 digits in a row")
    assert last == "survived"


def test_the_row_with_too_long_a_run_is_named(tmp_path: Path):
    code = """
import sys
from gguf_embed import BadText, Embedder, Settings
from gguf_embed.engine import tokenizer
tokenizer.MAX_RUN = 5000
with Embedder.open(sys.argv[1], settings=Settings(tune=False)) as embedder:
    try:
        embedder.encode(["a cat", "a dog", "." * 70_000])
    except BadText as error:
        print(error)
"""
    done = in_child(write(tmp_path / "m.gguf", "gpt-4o"), code)
    assert done.stdout.startswith("row 2: has 70,000 characters without a word's end"), done.stderr
    assert "split it" in done.stdout


def test_threads_of_a_pool_know_their_stack():
    before = threading.stack_size()
    with stack_pool(3, "test", 8 << 20) as pool:
        assert set(pool.map(lambda _: stack_bytes(), range(9))) == {8 << 20}
    assert threading.stack_size() == before
    assert stack_bytes() == stacks.ANY_BYTES


def test_a_call_on_a_stack_returns_and_raises():
    assert call_with_stack(32 << 20, stack_bytes) == 32 << 20
    with pytest.raises(ZeroDivisionError):
        call_with_stack(1 << 20, lambda: 1 // 0)
    with pytest.raises(MemoryError, match="no thread with"):
        call_with_stack(1 << 50, stack_bytes)
    assert threading.stack_size() == 0


@given(st.lists(st.sampled_from(["a", ".", " ", "\n", "7 ", "é", "a b"]), max_size=60))
def test_a_run_is_never_underestimated(pieces: list[str]):
    """No stretch without a letter or digit before a blank is longer than what is counted."""
    text = "".join(pieces)
    longest, n = 0, 0
    for i, character in enumerate(text):
        if i and text[i - 1] in "ab7" and character.isspace():
            longest, n = max(longest, n), 0
        n += 1
    assert max(longest, n) <= longest_run(text) <= len(text)
