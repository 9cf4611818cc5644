"""Tokens back to text, by the spellings of the three kinds of vocabulary."""

from __future__ import annotations

import pytest

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
