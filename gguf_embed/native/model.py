"""A loaded GGUF model."""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadModelFile, NativeFailed
from gguf_embed.native.handle import Handle
from gguf_embed.native.library import bindings, forget_reason, reason
from gguf_embed.system.closing import Closes

Tokens: TypeAlias = npt.NDArray[np.int32]


class Model(Closes):
    """A loaded GGUF. `repack` lets ggml copy weights into a layout of its own (extra buffers).

    Methods may be called from any thread. After `close` they raise BadInput.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = 0,
        repack: bool = True,
        no_alloc: bool = False,
    ) -> None:
        """Load `path`; raises BadModelFile with llama.cpp's reason.

        `no_alloc` reads the header only, so that contexts report the memory they would take.
        """
        native = bindings()
        params = native.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = repack
        params.no_alloc = no_alloc
        if no_alloc:
            params.load_mode = native.LLAMA_LOAD_MODE_NONE
        forget_reason()
        pointer: Any = native.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            raise BadModelFile(f"{path}: llama.cpp cannot load it: {reason()}")
        self.handle = Handle(pointer, native.llama_model_free, shown=str(path))
        # Dropped without `close`, or failing below, it is freed as well.
        weakref.finalize(self, self.handle.close, wait=False).atexit = False  # all is freed then
        self.path = path
        self.n_gpu_layers = n_gpu_layers
        self.repack = repack
        self._vocab: Any = native.llama_model_get_vocab(pointer)
        self.dim = int(native.llama_model_n_embd_out(pointer))
        self.n_cls_out = int(native.llama_model_n_cls_out(pointer))
        self.n_vocab = int(native.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(native.llama_model_n_ctx_train(pointer))

    def close(self) -> None:
        """Free the weights, after the calls in flight and the last of the model's contexts."""
        self.handle.close()

    def tokenize(self, text: bytes) -> Tokens:
        """Token ids of UTF-8 text with the model's own BOS/EOS or CLS/SEP, shape (n,).

        Special tokens spelled out in the text are plain text: user input cannot forge them.
        """
        native = bindings()
        size = len(text) // 2 + 16
        while True:
            ids = np.empty(size, np.int32)
            pointer = ctypes.cast(ids.ctypes.data, ctypes.POINTER(ctypes.c_int32))
            with self.handle.in_use():
                n = native.llama_tokenize(self._vocab, text, len(text), pointer, size, True, False)
            if n >= 0:
                return ids[:n]
            if n == -(2**31):
                raise NativeFailed(f"a text of {len(text)} bytes overflows the tokenizer")
            size = -n

    def token_text(self, token: int) -> str:
        """The vocabulary's own spelling of a token."""
        with self.handle.in_use():
            spelled: bytes = bindings().llama_vocab_get_text(self._vocab, token)
            return spelled.decode("utf-8", "replace")

    def special_tokens(self) -> frozenset[int]:
        """BOS, EOS, CLS (which llama.cpp keeps as BOS) and SEP; those that the vocabulary has."""
        native = bindings()
        asked = (native.llama_vocab_bos, native.llama_vocab_eos, native.llama_vocab_sep)
        with self.handle.in_use():
            return frozenset(t for t in (int(ask(self._vocab)) for ask in asked) if t >= 0)
