"""A stream of computation over a model.

llama.cpp aborts the process where a precondition does not hold (GGML_ASSERT), so each one is
checked here first.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import NativeFailed
from gguf_embed.native.batch import Batch
from gguf_embed.native.handle import Handle
from gguf_embed.native.library import accelerating, bindings, forget_reason, reason
from gguf_embed.native.model import Model, Tokens
from gguf_embed.native.tap import TAPPED_TENSOR, tap_of
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Pooling, Vectors, output_mask, pool

MAX_SEQS = 256  # LLAMA_MAX_SEQ


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParams:
    """How a context is made. Fields are llama.cpp's, except `tap`.

    `tap` reads the last hidden state from inside the graph and leaves out the language-model head;
    it needs a model with a KV cache. None leaves the choice to the model or to llama.cpp.
    `accelerator` lets our own ggml backend compute what it covers: of a model that is not repacked,
    whose layout it does not know.
    """

    n_ctx: int
    n_ubatch: int
    n_seq_max: int
    n_threads: int
    pooling: Pooling
    causal: bool | None = None
    flash_attn: bool | None = None
    tap: bool = False
    accelerator: bool = False


class Context(Closes):
    """One stream of computation over a model; used by one thread at a time."""

    def __init__(self, model: Model, params: ContextParams, encoder: bool) -> None:
        """`encoder`: the architecture runs without a KV cache and sees a batch whole."""
        if not 1 <= params.n_seq_max <= MAX_SEQS:
            raise ValueError(f"n_seq_max={params.n_seq_max} is not within 1..{MAX_SEQS}")
        for name in ("n_ctx", "n_ubatch", "n_threads"):
            if getattr(params, name) < 1:
                raise ValueError(f"{name}={getattr(params, name)} is not at least 1")
        if encoder and params.tap:
            raise ValueError("an encoder has no language-model head to leave out")
        native = bindings()
        self.model = model
        self.params = params
        self.encoder = encoder
        # llama.cpp reserves a graph for equal sequences and aborts where they do not fill it.
        n_ubatch = -(-params.n_ubatch // params.n_seq_max) * params.n_seq_max
        n_ctx = max(params.n_ctx, n_ubatch)
        # A batch is split into microbatches by llama.cpp itself, but an encoder sees it whole.
        self.n_batch = n_ubatch if encoder else n_ctx
        self._batch = Batch(params.n_seq_max)
        self._n_threads = params.n_threads
        self._n_outputs_max = self.n_batch  # tokens whose vectors one decode can give
        self._tap = tap_of(model.dim) if params.tap else None
        self._prefix: Tokens | None = None

        native_params = native.llama_context_default_params()
        native_params.n_ctx = n_ctx
        native_params.n_batch = self.n_batch
        native_params.n_ubatch = n_ubatch
        native_params.n_seq_max = params.n_seq_max
        native_params.n_threads = params.n_threads
        native_params.n_threads_batch = params.n_threads
        native_params.pooling_type = int(params.pooling)
        native_params.attention_type = -1 if params.causal is None else int(not params.causal)
        flash_attn = params.flash_attn
        if flash_attn is None and params.accelerator:
            # Left to itself llama.cpp leaves it out where attention and layer have two devices.
            flash_attn = True
        native_params.flash_attn_type = -1 if flash_attn is None else int(flash_attn)
        native_params.embeddings = not params.tap
        native_params.kv_unified = True
        native_params.no_perf = True
        if self._tap is not None:
            native_params.cb_eval = self._tap.callback
            native_params.cb_eval_user_data = self._tap.data
            native_params.pooling_type = int(Pooling.NONE)
            last_only = params.pooling in (Pooling.LAST, Pooling.CLS)
            self._n_outputs_max = params.n_seq_max if last_only else self.n_batch
            native_params.n_outputs_max = self._n_outputs_max
        forget_reason()
        with model.handle.in_use() as of_model, accelerating(whether=params.accelerator):
            pointer: Any = native.llama_init_from_model(of_model, native_params)
            if not pointer:
                raise NativeFailed(
                    f"{model.path}: no context of {params.n_ctx} tokens: {reason()}; "
                    "use a smaller n_ctx or max_batch_tokens"
                )
            shown = f"this context of {model.path}"
            self._handle = Handle(pointer, native.llama_free, shown=shown, parent=model.handle)
        weakref.finalize(self, self._handle.close, wait=False).atexit = False
        self._memory: Any = native.llama_get_memory(pointer)

    def close(self) -> None:
        """Free the buffers, after the call in flight."""
        self._handle.close()

    def use_threads(self, n_threads: int) -> None:
        """Compute with so many threads from now on."""
        if n_threads != self._n_threads:
            with self._handle.in_use() as pointer:
                bindings().llama_set_n_threads(pointer, n_threads, n_threads)
            self._n_threads = n_threads

    def forget(self) -> None:
        """Zero the KV cache: a NaN left in it would spread to every later text."""
        self._prefix = None
        if self._memory:
            with self._handle.in_use():
                bindings().llama_memory_clear(self._memory, True)

    def run(self, sequences: Sequence[Tokens], *, n_prefix: int = 0) -> Vectors:
        """Pooled vectors, shape (len(sequences), dim), float32, not normalized.

        The first `n_prefix` tokens, the same in every sequence, are computed once and kept for the
        next call with the same prefix; causal models with a tap only. With Pooling.NONE the rows
        are all token vectors end to end; with RANK they are n_cls_out scores.
        """
        with self._handle.in_use() as pointer:
            return self._run(pointer, sequences, n_prefix)

    @property
    def gives_tokens(self) -> bool:
        """Whether `token_vectors` works: in a tapped context, or one with Pooling.NONE."""
        params = self.params
        if not params.tap:
            return params.pooling is Pooling.NONE
        return params.causal is True or params.pooling in (Pooling.MEAN, Pooling.NONE)

    def token_vectors(self, sequence: Tokens) -> Vectors:
        """One vector per token, shape (len(sequence), dim), before any pooling."""
        if not self.gives_tokens:
            raise ValueError(f"{self.params} gives no token vectors")
        if not self.params.tap:
            return self.run([sequence])
        with self._handle.in_use() as pointer:
            self._prefix = None
            bindings().llama_memory_clear(self._memory, False)
            self._check([sequence], 0)
            # Where pooling needs few outputs, there is memory for so many. A causal text can be
            # decoded in pieces: each sees those before it in the cache.
            step = self._n_outputs_max if self.params.causal else len(sequence)
            pieces: list[Vectors] = []
            for start in range(0, len(sequence), step):
                piece = sequence[start : start + step]
                n = len(piece)
                self._decode(pointer, [piece], np.ones(n, np.int8), first_position=start)
                pieces.append(self._outputs(n))
            return np.concatenate(pieces)

    def _run(self, pointer: Any, sequences: Sequence[Tokens], n_prefix: int) -> Vectors:
        if n_prefix:
            self._check_sharing()
            self._hold_prefix(pointer, sequences[0][:n_prefix])
        elif self._memory:
            self._prefix = None
            bindings().llama_memory_clear(self._memory, False)
        bodies = [sequence[n_prefix:] for sequence in sequences] if n_prefix else sequences
        self._check(bodies, n_prefix)
        if not self.params.tap:
            return self._pooled(pointer, bodies)
        lengths = np.fromiter(map(len, bodies), np.int32, len(bodies))
        outputs = self._decode_tapped(pointer, bodies, lengths, n_prefix)
        return pool(outputs, lengths, self.params.pooling)

    def _check(self, bodies: Sequence[Tokens], before: int) -> None:
        """What llama.cpp would abort the process for, but for its token ids: see `_decode`."""
        lengths = list(map(len, bodies))
        n_tokens, n_seqs, params = sum(lengths), len(bodies), self.params
        limit = params.n_ctx - before if self._memory else self.n_batch
        if not params.tap:
            # llama.cpp's own pooling is wrong for a sequence that spans two microbatches.
            limit = min(limit, params.n_ubatch)
        elif params.causal is False:
            limit = min(limit, params.n_ubatch)
        n_seq_max = params.n_seq_max - (before > 0)
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        if not 1 <= n_seqs <= n_seq_max or n_tokens > limit or shortest < 1:
            raise ValueError(
                f"{n_seqs} sequences of {n_tokens} tokens (shortest {shortest}): this context "
                f"takes 1..{n_seq_max} sequences, {limit} tokens, none empty"
            )
        if self.encoder and longest > self.model.n_ctx_train:
            raise ValueError(
                f"a sequence of {longest} tokens: {self.model.path} has "
                f"{self.model.n_ctx_train} positions"
            )

    def _check_sharing(self) -> None:
        """Elsewhere a prefix computed once would silently give other vectors."""
        params = self.params
        if not (params.tap and params.causal is not False and params.pooling is Pooling.LAST):
            raise ValueError("a shared prefix needs a tap, causal attention and pooling LAST")

    def _hold_prefix(self, pointer: Any, prefix: Tokens) -> None:
        """Leave exactly `prefix` in the cache, as sequence 0."""
        native = bindings()
        if self._prefix is not None and np.array_equal(self._prefix, prefix):
            for seq in range(1, self.params.n_seq_max):
                native.llama_memory_seq_rm(self._memory, seq, -1, -1)
            return
        native.llama_memory_clear(self._memory, False)
        self._prefix = None
        self._check([prefix], 0)
        self._decode(pointer, [prefix], np.zeros(len(prefix), np.int8))
        self._prefix = prefix.copy()

    def _decode_tapped(
        self,
        pointer: Any,
        bodies: Sequence[Tokens],
        lengths: npt.NDArray[np.int32],
        n_prefix: int,
    ) -> Vectors:
        native = bindings()
        first_seq = 1 if n_prefix else 0
        if n_prefix:
            for seq in range(1, len(bodies) + 1):
                native.llama_memory_seq_cp(self._memory, 0, seq, -1, -1)
        mask = output_mask(lengths, self.params.pooling)
        self._decode(pointer, bodies, mask, first_position=n_prefix, first_seq=first_seq)
        return self._outputs(int(mask.sum()))

    def _outputs(self, n: int) -> Vectors:
        """What the tap took out of the last decode, which asked for `n` tokens."""
        assert self._tap is not None
        outputs = self._tap.take()
        if outputs.shape != (n, self.model.dim):
            raise TapUnavailable(
                f"{self.model.path}: the graph gave {outputs.shape} outputs at "
                f"{TAPPED_TENSOR.decode()}, not {(n, self.model.dim)}"
            )
        return outputs

    def _pooled(self, pointer: Any, bodies: Sequence[Tokens]) -> Vectors:
        native = bindings()
        n_tokens = sum(map(len, bodies))
        self._decode(pointer, bodies, np.ones(n_tokens, np.int8))
        if self.params.pooling is Pooling.NONE:
            rows = native.llama_get_embeddings(pointer)
            return _values(rows, n_tokens * self.model.dim).reshape(n_tokens, -1).copy()
        dim = self.model.n_cls_out if self.params.pooling is Pooling.RANK else self.model.dim
        vectors = np.empty((len(bodies), dim), np.float32)
        for seq in range(len(bodies)):
            vectors[seq] = _values(native.llama_get_embeddings_seq(pointer, seq), dim)
        return vectors

    def _decode(
        self,
        pointer: Any,
        sequences: Sequence[Tokens],
        mask: npt.NDArray[np.int8],
        *,
        first_position: int = 0,
        first_seq: int = 0,
    ) -> None:
        """One native call; the GIL is released while it computes.

        The tokens of each sequence count from `first_position`, the sequences from `first_seq`.
        """
        native = bindings()
        batch = self._batch.filled(sequences, mask, first_position, first_seq)
        if self._batch.greatest_token >= self.model.n_vocab:
            raise ValueError(f"a token id is not within 0..{self.model.n_vocab - 1}")
        if self._tap is not None:
            self._tap.begin(int(mask.sum()))
        forget_reason()
        status = native.llama_decode(pointer, batch)
        if status != 0:
            raise NativeFailed(
                f"{self.model.path}: llama_decode gave {status} for {len(mask)} tokens: {reason()}"
            )


class TapUnavailable(NativeFailed):
    """This architecture's graph has no tensor to tap; the pooled path serves instead."""


def _values(pointer: Any, n: int) -> npt.NDArray[np.float32]:
    """A copy of n floats that llama.cpp owns until the next call; read-only."""
    if not pointer:
        raise NativeFailed(f"llama.cpp returned no embedding: {reason()}")
    return np.frombuffer(ctypes.string_at(pointer, 4 * n), np.float32)
