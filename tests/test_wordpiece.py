"""WordPiece on a small vocabulary, and on the built-in one against the reference's ids."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from golden.compare import load
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.catalog.catalog import builtin_path
from gguf_embed.engine.wordpiece import MAX_WORD, WordPiece, from_header
from gguf_embed.gguf.header import Header, read_header

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁un", "▁u", "able", "a", "b", "l", "e", "▁a", "▁["]
SMALL = WordPiece(TOKENS, cls_id=2, sep_id=3, unk_id=1)


def pieces(text: str) -> list[str]:
    ids = SMALL.encode(text)
    assert (ids[0], ids[-1]) == (2, 3)
    return [TOKENS[i] for i in ids[1:-1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n", []),
        ("unable", ["▁un", "able"]),
        ("ua able", ["▁u", "a", "▁a", "b", "l", "e"]),  # longest first, no way back
        ("unx", ["[UNK]"]),  # the whole word, not only its end
        ("able un", ["▁a", "b", "l", "e", "▁un"]),
        ("[SEP]", ["▁[", "[UNK]", "[UNK]"]),  # plain text
        ("un▁a", ["[UNK]"]),  # not the beginning of a word
        ("a" * MAX_WORD, ["▁a", *["a"] * (MAX_WORD - 1)]),
        ("a" * (MAX_WORD + 1), ["[UNK]"]),
        ("á" * MAX_WORD, ["▁a", *["a"] * (MAX_WORD - 1)]),  # counted without accents
    ],
)
def test_pieces(text: str, expected: list[str]):
    assert pieces(text) == expected


@cache
def builtin_header() -> Header:
    return read_header(builtin_path(), keep_arrays=True)


@given(st.lists(st.text("unable", min_size=1, max_size=6)))
def test_words_do_not_touch_each_other(words: list[str]):
    assert pieces(" ".join(words)) == [piece for word in words for piece in pieces(word)]


def test_built_in_vocabulary_gives_the_reference_ids():
    wordpiece = from_header(builtin_header())
    assert wordpiece is not None
    golden = load()
    different = [
        row
        for row, (text, ids) in enumerate(zip(golden.texts, golden.ids, strict=True))
        if golden.cut(wordpiece.encode(text)) != ids
    ]
    assert different == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "gpt2"),
        ("normalizer.lowercase", False),
        ("normalizer.strip_accents", False),
        ("token_type", (1, 4)),
    ],
)
def test_other_tokenizers_are_left_to_llama_cpp(key: str, value: object):
    header = builtin_header()
    assert from_header(header) is not None
    other = replace(header, metadata={**header.metadata, f"tokenizer.ggml.{key}": value})
    assert from_header(other) is None
