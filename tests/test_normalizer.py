"""bert_normalize and bert_words equal the reference's BertNormalizer and BertPreTokenizer.

golden/normalizer.json holds what the reference does to each code point. A text is the sum of its
characters, except that combining characters which stay may change places.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.engine.bert_text import bert_normalize, bert_words

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(__file__).parent / "golden" / "normalizer.json").read_text())
# Planes 0 to 2 and the tags; of the empty and private planes one in a hundred.
CODE_POINTS = [
    *range(0xD800),
    *range(0xE000, 0x30000),
    *range(0xE0000, 0xE0200),
    *range(0xE0200, 0x110000, 101),
]


def expand(ranges: str) -> list[int]:
    pairs = [item.split("-") for item in ranges.split()]
    return [code for pair in pairs for code in range(int(pair[0], 16), int(pair[-1], 16) + 1)]


PUNCTUATION = frozenset(map(chr, expand(GOLDEN["punctuation"])))
CHANGED = {
    **{chr(code): "" for code in expand(GOLDEN["removed"])},
    **{chr(code): " " for code in expand(GOLDEN["blank"])},
    **{chr(code): f" {chr(code)} " for code in expand(GOLDEN["isolated"])},
    **{chr(int(code, 16)): result for code, result in GOLDEN["changed"].items()},
}
LETTERS = frozenset(chr(int(code, 16)) for code in GOLDEN["changed"])
BULK = frozenset(code for block in GOLDEN["bulk"] for code in expand(block))


def known(char: str) -> bool:
    """Not in a block of which only a hash is kept, nor new to the reference or to this Python."""
    if char in LETTERS:
        new = unicodedata.category(char) == "Cn"
    else:
        new = char not in CHANGED and unicodedata.normalize("NFD", char).lower() != char
    return ord(char) not in BULK and not new


def words(text: str) -> list[str]:
    """Split a normalized text by the golden's table."""
    return "".join(f" {char} " if char in PUNCTUATION else char for char in text).split()


def test_every_code_point():
    chars = [char for code in CODE_POINTS if known(char := chr(code))]
    for start in range(0, len(chars), 4096):
        text = "\n".join(chars[start : start + 4096])
        expected = " ".join(CHANGED.get(char, char) for char in chars[start : start + 4096])
        assert bert_normalize(text) == expected, f"after U+{ord(chars[start]):04X}"
        assert bert_words(text) == words(expected), f"after U+{ord(chars[start]):04X}"


@pytest.mark.parametrize("block", GOLDEN["bulk"])
def test_blocks_that_change_as_a_whole(block: str):
    digest = hashlib.sha256()
    for code in expand(block):
        digest.update(f"{bert_normalize(chr(code))}\n".encode())
    assert digest.hexdigest() == GOLDEN["bulk"][block]


@cache
def staying_marks() -> frozenset[str]:
    marks = (chr(code) for code in CODE_POINTS if unicodedata.combining(chr(code)))
    return frozenset(marks) - CHANGED.keys()


TEXTS = st.text(
    st.one_of(
        st.characters(max_codepoint=0x24F),
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(sorted(CHANGED)),
        st.sampled_from(sorted(PUNCTUATION)),
    ).filter(lambda char: known(char) and char not in staying_marks())
)


@given(TEXTS)
def test_a_text_is_the_sum_of_its_characters(text: str):
    expected = "".join(CHANGED.get(char, char) for char in text)
    assert bert_normalize(text) == expected
    assert bert_words(text) == words(expected)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_words_of_words_are_the_same_words(text: str):
    found = bert_words(text)
    assert bert_words(" ".join(found)) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Crème Brûlée!", ["creme", "brulee", "!"]),
        ("e\u0301\u0323", ["e"]),
        ("ΣΟΦΟΣ", ["σοφοσ"]),  # no final sigma
        ("İstanbul IĞDIR ılık", ["istanbul", "igdir", "ılık"]),
        ("हिन्दी", ["हिनदी"]),  # the virama goes, vowel signs stay
        ("한국", [unicodedata.normalize("NFD", "한국")]),
        ("我买iPhone", ["我", "买", "iphone"]),
        ("a\x00b\x0bc\td", ["abc", "d"]),  # vertical tab is a control, tab a blank
        ("x\u200by\u00adz", ["xyz"]),
        ("old\u2e43dash", ["old\u2e43dash"]),  # punctuation since Unicode 9
        ("", []),
    ],
)
def test_examples(text: str, expected: list[str]):
    assert bert_words(text) == expected
