"""BERT's WordPiece tokenizer over a GGUF vocabulary, with the token ids of the reference.

llama.cpp's own differs for Hangul, for the vowel signs of Indic scripts, for words of more than 100
characters and in rarer cases; tests/golden/README.md has the list and the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Final

from gguf_embed.engine.bert_text import bert_words
from gguf_embed.gguf.header import Header

MAX_WORD: Final = 100  # characters; the reference calls anything longer unknown
_CACHED_WORDS: Final = 1 << 16
_WORD_START: Final = "\u2581"
_USER_DEFINED: Final = 4  # token type; llama.cpp finds these in the raw text, before WordPiece


class WordPiece:
    """Text to token ids for an uncased BERT vocabulary. Safe to use from several threads."""

    def __init__(self, tokens: Sequence[str], *, cls_id: int, sep_id: int, unk_id: int) -> None:
        """`tokens` as in a GGUF: U+2581 in front of a word's first piece, nothing before others."""
        # One table for both: two take longer to make than a short text takes to tokenize.
        self._ids = dict(zip(tokens, range(len(tokens)), strict=True))
        self._max_piece = max(map(len, tokens))
        self._cls, self._sep, self._unknown = cls_id, sep_id, (unk_id,)
        self._pieces = lru_cache(_CACHED_WORDS)(self._match)

    def encode(self, text: str) -> list[int]:
        """Token ids from [CLS] to [SEP]; names of special tokens in the text are plain text."""
        pieces = map(self._pieces, bert_words(text))
        return [self._cls, *chain.from_iterable(pieces), self._sep]

    def _match(self, word: str) -> tuple[int, ...]:
        """Ids of a word, longest piece first from the left; unknown if any part of it is."""
        if len(word) > MAX_WORD:
            return self._unknown
        ids: list[int] = []
        start = 0
        while start < len(word):
            mark = "" if start else _WORD_START
            if start and word[start] == _WORD_START:
                return self._unknown  # inside a text it cannot pass for the start of a word
            for end in range(min(len(word), start + self._max_piece), start, -1):
                if (piece := self._ids.get(mark + word[start:end])) is not None:
                    ids.append(piece)
                    start = end
                    break
            else:
                return self._unknown
        return tuple(ids)


def from_header(header: Header) -> WordPiece | None:
    """The tokenizer of an uncased BERT file, from a header read with `keep_arrays`.

    None where the file wants another one: not WordPiece, case or accents kept, or tokens of its
    own to be found in the raw text. Missing keys mean what they mean to llama.cpp.
    """
    get = header.metadata.get
    tokens = get("tokenizer.ggml.tokens")
    types = get("tokenizer.ggml.token_type")
    lowercase = get("tokenizer.ggml.normalizer.lowercase", True)
    strip_accents = get("tokenizer.ggml.normalizer.strip_accents", lowercase)
    if header.tokenizer_model != "bert" or not (lowercase and strip_accents):
        return None
    assert isinstance(tokens, tuple), "read_header(path, keep_arrays=True)"
    if isinstance(types, tuple) and _USER_DEFINED in types:
        return None

    def token_id(name: str, default: int) -> int:
        value = get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) else default

    return WordPiece(
        tuple(map(str, tokens)),
        cls_id=token_id("bos", 101),
        sep_id=token_id("seperator", 102),
        unk_id=token_id("unknown", 100),
    )
