"""Text to token ids as the model's reference tokenizer gives them.

llama.cpp's tokenizer is used where it agrees with the reference. For uncased BERT vocabularies our
own WordPiece takes its place; for Qwen2 ones the text is brought to NFC first, as the reference
does (transformers, models/qwen2/tokenization_qwen2.py) and llama.cpp does not.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np

from gguf_embed.engine import wordpiece
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.native.model import Model, Tokens

_NFC_BEFORE = frozenset({"qwen2"})  # values of tokenizer.ggml.pre


class Tokenizer:
    """Safe to use from several threads."""

    def __init__(self, path: Path, header: Header, model: Model, *, end_token: int | None) -> None:
        """`end_token` is made sure to come last, where the file may not say so itself."""
        self._model = model
        self._end_token = end_token
        self._nfc = header.metadata.get("tokenizer.ggml.pre") in _NFC_BEFORE
        self._wordpiece: wordpiece.WordPiece | None = None
        if header.tokenizer_model == "bert":
            self._wordpiece = wordpiece.from_header(read_header(path, keep_arrays=True))

    def encode(self, text: str) -> Tokens:
        """Token ids with the model's special tokens, shape (n,).

        Special tokens spelled out in the text are plain text. Raises UnicodeEncodeError for a lone
        surrogate.
        """
        raw = text.encode()  # first, so that an error's position is one in the text as given
        if self._nfc:
            raw = unicodedata.normalize("NFC", text).encode()
        if self._wordpiece is not None:
            return np.array(self._wordpiece.encode(text), np.int32)
        ids = self._model.tokenize(raw)
        if self._end_token is not None and (not len(ids) or ids[-1] != self._end_token):
            return np.append(ids, np.int32(self._end_token))
        return ids
