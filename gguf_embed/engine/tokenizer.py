"""Text to token ids as the model's reference tokenizer gives them.

llama.cpp's tokenizer is used where it agrees with the reference. For uncased BERT vocabularies our
own WordPiece takes its place; for Qwen2 and ModernBERT ones the text is brought to NFC first, as
their references do (tokenizer.json; transformers, models/qwen2/tokenization_qwen2.py) and llama.cpp
does not. U+0085 is a blank to the reference of XLM-R and T5, and an unknown character to llama.cpp.

Some pre-tokenizers of llama.cpp recurse once for each character of a run, such as 30,000 dots. Such
a run is tokenized on a stack that is large enough; see benchmarks/pretokenizers.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from gguf_embed.engine import wordpiece
from gguf_embed.engine.stacks import call_with_stack, stack_bytes
from gguf_embed.engine.wordpiece import WordPiece
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.mode import SpecialTokens

_NFC_BEFORE = frozenset({"modern-bert", "qwen2", "qwen35"})  # values of tokenizer.ggml.pre

# Measured: 320 bytes of stack for each character of a run (GCC 12, x86-64). Other compilers' frames
# are larger.
BYTES_PER_CHARACTER: Final = 1024
MAX_RUN: Final = 1 << 20  # characters; takes 320 MiB while it is tokenized

# The kinds of tokenizer in which a pattern is matched at all.
_NOT_BPE = frozenset({"llama", "bert", "t5", "rwkv", "plamo2"})  # tokenizer.ggml.model
# Pre-tokenizers that llama.cpp runs in loops of its own, or whose matches are short.
_LOOPING = """
a.x-4.0 chameleon chatglm-bpe codeshell command-r dbrx deepseek-r1-qwen exaone exaone4 f2llmv2
falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 granite-docling granite-embed-multi-311m grok-2
hunyuan jais jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano kimi-k2
kormo laguna lfm2 llama-bpe llama-v3 llama3 megrez mellum mellum2 midm-2.0 minerva-7b modern-bert
mpt olmo phi-2 pixtral qwen2 qwen35 refact roberta-bpe sarvam-moe smaug-bpe smollm solar-open
stablelm2 starcoder trillion
"""
_LOOPS = frozenset(_LOOPING.split())
# No match of any pattern goes on after a letter or a digit that a blank follows, ...
_ENDS: Final = re.compile(r"[0-9A-Za-z]\s")
# ... but for one whose words are separated by blanks.
_ENDS_OF: Mapping[str, re.Pattern[str]] = {
    "exaone-moe": re.compile(r"[0-9.,;:!?] |[0-9A-Za-z][\r\n\t]")
}
# It groups digits by threes from the right, and counts the rest again for each: quadratic.
_DIGITS_OF: Mapping[str, int] = {"superbpe": 4096}
_DIGITS: Final = re.compile(r"\d+")


class KillsTokenizer(Exception):
    """A text of which llama.cpp's tokenizer dies; it did so in a child process."""


class RunTooLong(ValueError):
    """A text with a run of characters that llama.cpp's pre-tokenizer cannot take safely."""


class Tokenizer:
    """Safe to use from several threads."""

    def __init__(
        self,
        path: Path,
        header: Header,
        model: Model,
        specials: SpecialTokens,
        *,
        words: Callable[[], WordPiece | None] | None = None,
    ) -> None:
        """`specials` are made sure to stand at the ends, where the file may not say so itself.

        `words` gives what `read_words` does, where that was begun before.
        """
        self._model = model
        self._first, self._last = specials.first, specials.last
        pre = str(header.metadata.get("tokenizer.ggml.pre", ""))
        self._nfc = pre in _NFC_BEFORE
        self._recurses = header.tokenizer_model not in _NOT_BPE and pre not in _LOOPS
        self._ends = _ENDS_OF.get(pre, _ENDS)
        self._max_digits = _DIGITS_OF.get(pre) if header.tokenizer_model not in _NOT_BPE else None
        self._unigram = header.tokenizer_model == "t5"
        self._wordpiece = words() if words is not None else read_words(path, header)

    def encode(self, text: str) -> Tokens:
        """Token ids with the model's special tokens, shape (n,).

        Special tokens spelled out in the text are plain text. Raises UnicodeEncodeError for a lone
        surrogate and RunTooLong.
        """
        raw = text.encode()  # first, so that an error's position is one in the text as given
        if self._nfc:
            raw = unicodedata.normalize("NFC", text).encode()
        if self._wordpiece is not None:
            return np.array(self._wordpiece.encode(text), np.int32)
        if self._unigram and "\x85" in text:
            raw = text.replace("\x85", " ").encode()
        ids = self._on_a_stack(text, raw)
        if self._first is not None and (not len(ids) or ids[0] != self._first):
            ids = np.concatenate([np.array([self._first], np.int32), ids])
        if self._last is not None and (not len(ids) or ids[-1] != self._last):
            ids = np.append(ids, np.int32(self._last))
        return ids

    @property
    def added(self) -> frozenset[int]:
        """The tokens that are made sure to stand at the ends."""
        return frozenset(token for token in (self._first, self._last) if token is not None)

    def _on_a_stack(self, text: str, raw: bytes) -> Tokens:
        """llama.cpp's ids, computed in a thread whose stack holds the longest run."""
        if self._max_digits is not None and len(text) > self._max_digits:
            n_digits = max((len(run) for run in _DIGITS.findall(text)), default=0)
            if n_digits > self._max_digits:
                raise RunTooLong(
                    f"has {n_digits:,} digits in a row, and this model's tokenizer takes up to "
                    f"{self._max_digits:,}; put blanks between them"
                )
        if not self._recurses or len(text) * BYTES_PER_CHARACTER <= stack_bytes():
            return self._model.tokenize(raw)
        n_characters = longest_run(text, self._ends)
        if n_characters > MAX_RUN:
            raise RunTooLong(
                f"has {n_characters:,} characters without a word's end, and this model's tokenizer "
                f"takes up to {MAX_RUN:,}; split it"
            )
        n_bytes = n_characters * BYTES_PER_CHARACTER
        if n_bytes <= stack_bytes():
            return self._model.tokenize(raw)
        try:
            return call_with_stack(n_bytes, lambda: self._model.tokenize(raw))
        except MemoryError as error:
            raise RunTooLong(
                f"has {n_characters:,} characters without a word's end, for which this model's "
                f"tokenizer needs a large stack: {error}; split it"
            ) from None


def read_words(path: Path, header: Header) -> WordPiece | None:
    """Our own tokenizer of an uncased BERT file; None where llama.cpp's is used."""
    if header.tokenizer_model != "bert":
        return None
    if not isinstance(header.metadata.get("tokenizer.ggml.tokens"), tuple):
        header = read_header(path, keep_arrays=True)
    return wordpiece.from_header(header)


def longest_run(text: str, ends: re.Pattern[str] = _ENDS) -> int:
    """Characters between two places where every match of a pre-tokenizer ends, at most."""
    longest, start = 0, 0
    for end in ends.finditer(text):
        longest = max(longest, end.end() - start)
        start = end.start() + 1
    return max(longest, len(text) - start)
