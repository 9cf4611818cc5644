"""The tokens that a context decodes at once, as llama.cpp wants them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_embed.native.library import bindings
from gguf_embed.native.model import Tokens

_FEW_TOKENS = 512  # there is memory for so many from the start
_FIELDS = ("token", "pos", "n_seq_id", "seq_id", "logits")  # llama_batch


class Batch:
    """The llama_batch of a context. Its memory is kept: to hand it over takes longer than to fill
    it with a short text.
    """

    def __init__(self, n_seq_max: int) -> None:
        self._struct: Any = bindings().llama_batch()
        # llama_batch wants, per token, a pointer to its sequence ids; one table serves all.
        self._ids = np.arange(n_seq_max, dtype=np.int32)
        self._addresses = self._ids.ctypes.data + 4 * self._ids.astype(np.uintp)
        self._counting = np.arange(_FEW_TOKENS, dtype=np.int32)
        self._have(_FEW_TOKENS)

    def filled(
        self,
        sequences: Sequence[Tokens],
        mask: npt.NDArray[np.int8],
        first_position: int,
        first_seq: int,
    ) -> Any:
        """The llama_batch of sequences end to end, valid until the next is filled.

        `mask` is 1 for each token whose output is wanted, shape (all tokens,).
        """
        n, lengths = len(mask), list(map(len, sequences))
        if n > len(self._tokens):
            self._have(n)
        if first_position + n > len(self._counting):
            self._counting = np.arange(first_position + n, dtype=np.int32)
        counting = self._counting[first_position:]
        np.concatenate(sequences, out=self._tokens[:n])
        np.concatenate([counting[:length] for length in lengths], out=self._positions[:n])
        addresses = self._addresses[first_seq : first_seq + len(lengths)]
        self._seqs[:n] = addresses.repeat(lengths)
        self._mask[:n] = mask
        self._struct.n_tokens = n
        return self._struct

    @property
    def greatest_token(self) -> int:
        """Of those filled in; one below 0 counts as very large."""
        return int(self._tokens[: self._struct.n_tokens].view(np.uint32).max())

    def _have(self, n: int) -> None:
        """Memory for so many tokens."""
        self._tokens = np.zeros(n, np.int32)
        self._positions = np.zeros(n, np.int32)
        self._n_seqs = np.ones(n, np.int32)
        self._seqs = np.zeros(n, np.uintp)
        self._mask = np.zeros(n, np.int8)
        arrays = (self._tokens, self._positions, self._n_seqs, self._seqs, self._mask)
        for field, array in zip(_FIELDS, arrays, strict=True):
            current: Any = getattr(self._struct, field)
            setattr(self._struct, field, ctypes.cast(array.ctypes.data, current.__class__))
