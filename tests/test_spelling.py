"""Tokens back to text, by the spellings of the three kinds of vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.engine.offsets import token_places
from gguf_embed.engine.spelling import Spelling
from gguf_embed.errors import BadInput


def test_byte_level():
    tokens = ("<|end|>", "h\u00c3\u00a9", "\u0120w", "\u00e6", "\u013a")
    spelling = Spelling(tokens, frozenset({0}), byte_level=True)
    assert spelling.decode([1, 2, 0]) == "hé w"
    assert spelling.decode([1, 0], skip_special=False) == "hé<|end|>"
    assert spelling.decode([3]) == "\ufffd", "half a character"


def test_blanks_and_single_bytes():
    tokens = ("<s>", "\u2581one", "\u2581t", "wo", "<0xC3>", "<0xA9>")
    spelling = Spelling(tokens, frozenset({0}), byte_level=False)
    assert spelling.decode([0, 1, 2, 3, 4, 5]) == "one twoé"
    assert spelling.is_special(0)
    assert spelling.text(3) == "wo"
    with pytest.raises(BadInput, match="no token 6"):
        spelling.decode([6])


# -- where tokens are in their text ----------------------------------------------------------------

# In bytes, as Hugging Face's tokenizers tell them, checked with these by hand.
CAFE = "\u00c9 caf\u00e9\u0301s \u65e5x\u2603"


def spelling(*tokens: str, kind: str, special: int = 1) -> Spelling:
    return Spelling(
        tokens, frozenset(range(special)), byte_level=kind == "gpt2", kind=kind, unknown=special
    )


def test_places_in_words():
    made = spelling("[CLS]", "[UNK]", "▁e", "▁cafe", "s", "▁日", kind="bert")
    places = token_places(CAFE, [0, 2, 3, 4, 5, 1], made)
    assert places == [None, (0, 2), (3, 8), (10, 11), (12, 15), (15, 19)]
    assert token_places("", [0], made) == [None]
    assert token_places("e e", [2], made) == [None], "another text than these tokens are of"


def test_places_of_pieces():
    made = spelling("<s>", "<unk>", "▁É", "▁caf", "é́", "s", "▁", "日", "x", kind="t5")
    places = token_places(CAFE, [0, 2, 3, 4, 5, 6, 7, 8, 1], made)
    assert places == [
        None,
        (0, 2),
        (3, 6),
        (6, 10),
        (10, 11),
        (12, 15),
        (12, 15),
        (15, 16),
        (16, 19),
    ]


def test_places_of_bytes_are_those_of_their_characters():
    made = spelling("<|end|>", "Ġcaf", "Ã", "©", "Ġx", kind="gpt2", special=1)
    assert token_places(" café x", [1, 2, 3, 4, 0], made) == [
        *((0, 4), (4, 6), (4, 6), (6, 8)),
        None,
    ]
    made = spelling("<s>", "<unk>", "▁a", "<0xC3>", "<0xA9>", "▁b", kind="llama")
    assert token_places("aé b", [2, 3, 4, 5], made) == [(0, 1), (1, 3), (1, 3), (3, 5)]


@given(st.text(alphabet="ab .É\u0301\u00fc日ﬁ☃\u200b\n", max_size=30))
def test_places_are_those_of_the_reference(text: str):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "a", "b", "ab", ".", "e", "u", "日", "##a", "##b", "##ab", "##u", "##e"]
    reference = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    )
    reference.normalizer = tokenizers.normalizers.BertNormalizer()
    reference.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    expected = reference.encode(text)
    spelled = [w.removeprefix("##") if w[:2] in ("##", "[U") else f"▁{w}" for w in words]
    made = Spelling(spelled, frozenset({0}), byte_level=False, kind="bert", unknown=0)
    in_bytes = [len(text[:n].encode()) for n in range(len(text) + 1)]
    assert token_places(text, expected.ids, made) == [
        (in_bytes[start], in_bytes[stop]) for start, stop in expected.offsets
    ]
