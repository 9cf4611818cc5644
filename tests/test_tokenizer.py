"""Token ids as the reference gives them where llama.cpp's own differ."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from gguf_embed.engine.tokenizer import Tokenizer
from gguf_embed.gguf.header import read_header
from gguf_embed.native.model import Model
from gguf_embed.plan.mode import SpecialTokens

DECOMPOSED = [
    "Cafe\u0301 cre\u0300me",
    "A\u030angstro\u0308m",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Tokenizer]]:
    path: Path = tiny.write_qwen3(tmp_path_factory.mktemp("tiny") / "qwen3.gguf").path
    header = read_header(path)
    assert header.metadata["tokenizer.ggml.pre"] == "qwen2"
    model = Model(path)
    yield model, Tokenizer(path, header, model, SpecialTokens(last=header.eos_id))
    model.close()


@pytest.mark.parametrize("text", DECOMPOSED)
def test_qwen_sees_composed_text(text: str, qwen: tuple[Model, Tokenizer]):
    model, tokenizer = qwen
    composed = unicodedata.normalize("NFC", text)
    expected = model.tokenize(composed.encode()).tolist()
    assert model.tokenize(text.encode()).tolist() != expected, "llama.cpp composes by itself now"
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.encode(composed).tolist() == expected


@pytest.mark.parametrize("text", DECOMPOSED)
def test_modernbert_sees_composed_text(text: str, tmp_path: Path):
    path = tiny.write_modernbert(tmp_path / "modernbert.gguf").path
    with Model(path) as model:
        tokenizer = Tokenizer(path, read_header(path), model, SpecialTokens())
        composed = model.tokenize(unicodedata.normalize("NFC", text).encode()).tolist()
        assert tokenizer.encode(text).tolist() == composed


def test_the_end_token_comes_last_once(qwen: tuple[Model, Tokenizer], tmp_path: Path):
    _, tokenizer = qwen
    header = read_header(tiny.write_qwen3(tmp_path / "old.gguf", add_eos=False).path)
    model = Model(tmp_path / "old.gguf")
    old = Tokenizer(tmp_path / "old.gguf", header, model, SpecialTokens(last=header.eos_id))
    assert model.tokenize(b"a cat").tolist()[-1] != header.eos_id
    assert old.encode("a cat").tolist() == tokenizer.encode("a cat").tolist()
    assert old.encode("a cat").tolist().count(header.eos_id or -1) == 1
    model.close()


def test_next_line_is_a_blank_to_xlmr(tmp_path: Path):
    """As it is to the reference; docs/accuracy.md has the rest of what differs."""
    path = tiny.write_xlmr(tmp_path / "xlmr.gguf").path
    model = Model(path)
    tokenizer = Tokenizer(path, read_header(path), model, SpecialTokens())
    expected = model.tokenize(b"a cat sat").tolist()
    assert model.tokenize("a\x85cat\x85sat".encode()).tolist() != expected
    assert tokenizer.encode("a\x85cat\x85sat").tolist() == expected
    model.close()
