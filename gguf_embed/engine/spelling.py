"""Tokens back to text: how a vocabulary spells them. Pure.

What a tokenizer takes away (case, blanks, accents of uncased models) does not come back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from gguf_embed.errors import BadInput
from gguf_embed.gguf.header import Header, read_header

_CONTROL: Final = 3  # of tokenizer.ggml.token_type
_UNKNOWN: Final = {"bert": 100, "llama": 0, "t5": 2}  # as llama.cpp has it where a file says none
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """The vocabulary of one model."""

    BLANK: Final = "\u2581"  # stands for a blank in all vocabularies but byte-level ones

    def __init__(
        self,
        tokens: Sequence[str],
        special: frozenset[int],
        *,
        byte_level: bool,
        kind: str = "",
        unknown: int | None = None,
    ) -> None:
        """`byte_level`: each character stands for a byte, as GPT-2's vocabulary has it.

        `kind` is the tokenizer's, as a GGUF file names it: bert, gpt2, llama, t5. `unknown`
        stands for what the vocabulary cannot spell.
        """
        self._tokens = tokens
        self._special = special
        self._byte_level = byte_level
        self.kind = kind
        self.unknown = unknown

    def is_special(self, token: int) -> bool:
        """Whether it stands for no text."""
        return token in self._special

    def is_text(self, token: int) -> bool:
        """Whether it stands for a part of the text, if only an unknown one."""
        return token == self.unknown or token not in self._special

    def text(self, token: int) -> str:
        """One token, as the vocabulary spells it. Raises BadInput."""
        if not 0 <= token < len(self._tokens):
            raise BadInput(
                f"there is no token {token}; this model's are 0 to {len(self._tokens) - 1}"
            )
        return self._tokens[token]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text that they stand for."""
        spelled = [
            (self.text(token), self.is_special(token))
            for token in ids
            if not (skip_special and self.is_special(token))
        ]
        raw = b"".join(text.encode() if special else self._bytes(text) for text, special in spelled)
        decoded = raw.decode("utf-8", "replace")
        return decoded if self._byte_level else decoded.removeprefix(" ")

    def raw(self, token: int) -> bytes:
        """What it stands for, as UTF-8; it may be a part of a character. Raises BadInput."""
        return self._bytes(self.text(token))

    def _bytes(self, text: str) -> bytes:
        if self._byte_level:
            table = _byte_of()
            return b"".join(
                bytes([table[char]]) if char in table else char.encode() for char in text
            )
        if one_byte := _BYTE.fullmatch(text):
            return bytes([int(one_byte[1], 16)])
        return text.replace(self.BLANK, " ").encode()


def spelling_of(path: Path) -> Spelling:
    """That of a model file, which is read for it."""
    return spelling_in(read_header(path, keep_arrays=True))


def spelling_in(header: Header) -> Spelling:
    """That of a header whose arrays were kept. Raises BadInput where there is none."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    types = header.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, tuple):
        raise BadInput(f"{header.source} holds no vocabulary")
    kinds = types if isinstance(types, tuple) else ()
    special = frozenset(token for token, kind in enumerate(kinds) if kind == _CONTROL)
    kind = header.tokenizer_model or ""
    byte_level = kind in ("gpt2", "hybriddna", "whitespace")
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id")
    return Spelling(
        tuple(map(str, tokens)),
        special,
        byte_level=byte_level,
        kind=kind,
        unknown=unknown if isinstance(unknown, int) else _UNKNOWN.get(kind),
    )


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: those that print stand for themselves, others are shifted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}
