"""The one seam to native code: llama.cpp through llama-cpp-python's low-level API.

llama.cpp aborts the process where a precondition does not hold (GGML_ASSERT), so each one is
checked here first. Nothing is loaded before the first call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadModelFile, NativeFailed
from gguf_embed.gguf.quants import FILE_TYPES, TYPE_NAMES
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Pooling, Vectors, output_mask, pool

Kind: TypeAlias = Literal["cpu", "gpu", "igpu", "accel", "meta"]
Tokens: TypeAlias = npt.NDArray[np.int32]

MAX_SEQS = 256  # LLAMA_MAX_SEQ
_BATCH_FIELDS = ("token", "pos", "n_seq_id", "seq_id", "logits")  # llama_batch
TAPPED_TENSOR = b"result_norm"  # the last hidden state, before the language-model head

_log = logging.getLogger("gguf_embed.llama")
# What llama.cpp said last, for our own error messages; it reports causes only in its log.
_last_lines: deque[str] = deque(maxlen=20)
_kept_alive: list[object] = []  # ctypes frees a callback that nothing refers to
_listeners: list[Callable[[str], None]] = []  # to the log as it comes, in pieces of lines


@functools.cache
def _native() -> Any:
    """The llama_cpp bindings, initialised once, with their log routed to `logging`."""
    from llama_cpp import llama_cpp

    # The bindings' annotations do not cover ctypes; Any says so once.
    native: Any = llama_cpp
    callback = native.llama_log_callback(_on_log)
    _kept_alive.append(callback)
    native.llama_log_set(callback, None)
    native.llama_backend_init()
    return native


# ggml's warnings are mostly advice to developers; its errors come back in our exceptions as well.
_GGML_WARN, _GGML_ERROR = 3, 4
_LEVELS = {_GGML_WARN: logging.INFO, _GGML_ERROR: logging.WARNING}


def _on_log(level: int, text: bytes, _data: object) -> None:
    piece = text.decode("utf-8", "replace")
    for listener in _listeners:
        listener(piece)
    line = piece.rstrip()
    if line:
        if level in _LEVELS:
            _last_lines.append(line)
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


def _reason() -> str:
    """llama.cpp's last complaints, on one line."""
    return "; ".join(list(_last_lines)[-3:]) or "llama.cpp gave no reason"


@functools.cache
def _ggml(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of the ggml libraries, which llama-cpp-python ships but does not bind."""
    native = _native()
    folder = Path(native.__file__).parent / "lib"
    handles = [native._lib]
    # On Windows a symbol is found only in its own DLL; elsewhere through libllama's dependencies.
    handles += [ctypes.CDLL(str(p)) for p in sorted(folder.glob("ggml*.dll"))]
    for handle in handles:
        function = getattr(handle, name, None)
        if function is not None:
            function.restype, function.argtypes = restype, list(argtypes)
            return function
    raise NativeFailed(
        f"the installed llama.cpp has no function {name}; reinstall llama-cpp-python"
    )


def version() -> str:
    """Version of llama-cpp-python."""
    import llama_cpp

    return llama_cpp.__version__


def system_info() -> str:
    """llama.cpp's own line on what the build was compiled with."""
    return _native().llama_print_system_info().decode()


@functools.cache
def build_id() -> str:
    """A short hash of the installed native libraries: a new build gets a new self-test and tuning.

    Sizes and modification times stand for the contents; hashing 30 MB at each start costs more.
    """
    native = _native()
    digest = hashlib.sha256(version().encode())
    for path in sorted((Path(native.__file__).parent / "lib").iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeDevice:
    """A device as ggml reports it. For the CPU `free_bytes` equals `total_bytes`: do not use it."""

    name: str
    description: str
    kind: Kind
    backend: str
    free_bytes: int
    total_bytes: int
    device_id: str | None


class _Props(ctypes.Structure):
    """ggml_backend_dev_props (ggml-backend.h)."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 8),
    )


def devices() -> tuple[NativeDevice, ...]:
    """Every device of the installed build, in ggml's order."""
    pointer = ctypes.c_void_p
    get = _ggml("ggml_backend_dev_get", pointer, ctypes.c_size_t)
    get_props = _ggml("ggml_backend_dev_get_props", None, pointer, ctypes.POINTER(_Props))
    get_reg = _ggml("ggml_backend_dev_backend_reg", pointer, pointer)
    reg_name = _ggml("ggml_backend_reg_name", ctypes.c_char_p, pointer)
    kinds: tuple[Kind, ...] = ("cpu", "gpu", "igpu", "accel", "meta")
    found: list[NativeDevice] = []
    for index in range(_ggml("ggml_backend_dev_count", ctypes.c_size_t)()):
        device = get(index)
        props = _Props()
        get_props(device, ctypes.byref(props))
        found.append(
            NativeDevice(
                name=props.name.decode(),
                description=props.description.decode().strip(),
                kind=kinds[int(props.type)],
                backend=reg_name(get_reg(device)).decode(),
                free_bytes=props.memory_free,
                total_bytes=props.memory_total,
                device_id=props.device_id.decode() if props.device_id else None,
            )
        )
    return tuple(found)


def quantize_rows(values: npt.NDArray[np.float32], weight_type: str) -> tuple[int, bytes]:
    """ggml's type number and the bytes of a float32 matrix, shape (rows, row length), in that type.

    Raises NativeFailed for a type that ggml does not know or cannot write.
    """
    number = next((n for n, name in TYPE_NAMES.items() if name == weight_type), None)
    n_rows, n_row = values.shape
    if number is None or n_row % _ggml("ggml_blck_size", ctypes.c_int64, ctypes.c_int)(number):
        raise NativeFailed(f"ggml cannot write rows of {n_row} values as {weight_type}")
    if weight_type == "F32":
        return number, values.tobytes()
    row_size = _ggml("ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)(number, n_row)
    target = np.empty(n_rows * row_size, np.uint8)
    source = np.ascontiguousarray(values)
    importance = np.ones(n_row, np.float32)  # the smallest types refuse to work without
    pointer = ctypes.c_void_p
    quantize = _ggml(
        "ggml_quantize_chunk",
        ctypes.c_size_t,
        ctypes.c_int,
        pointer,
        pointer,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        pointer,
    )
    quantize(
        number, source.ctypes.data, target.ctypes.data, 0, n_rows, n_row, importance.ctypes.data
    )
    return number, target.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeParams:
    """How to quantize; `level` is one of quants.FILE_TYPES, tensor types are those of TYPE_NAMES.

    `imatrix` holds the importance of each value of a tensor's rows, float32, by tensor name;
    `metadata` is put into the new file. A `dry_run` decides and logs, and writes nothing.
    """

    level: str
    token_embedding_type: str | None
    output_type: str | None
    pure: bool  # every matrix in the level's main type
    allow_requantize: bool
    dry_run: bool
    n_threads: int
    imatrix: Mapping[str, npt.NDArray[np.float32]]
    metadata: Mapping[str, str | int]


def quantize(
    source: Path, target: Path, params: QuantizeParams, on_line: Callable[[str], None]
) -> None:
    """Write `source` as `target` in another quantization; llama.cpp's log goes to `on_line`.

    Runs to its end, whatever signal comes. Raises NativeFailed with llama.cpp's reason.
    """
    native = _native()
    level_numbers = {name: number for number, name in FILE_TYPES.items()}
    type_numbers = {name: number for number, name in TYPE_NAMES.items()}
    wanted = native.llama_model_quantize_default_params()
    wanted.nthread = params.n_threads
    wanted.ftype = level_numbers[params.level]
    if params.token_embedding_type is not None:
        wanted.token_embedding_type = type_numbers[params.token_embedding_type]
    if params.output_type is not None:
        wanted.output_tensor_type = type_numbers[params.output_type]
    wanted.pure = params.pure
    wanted.allow_requantize = params.allow_requantize
    wanted.dry_run = params.dry_run
    # Both arrays end with an empty entry; the values stay referred to until the call is over.
    values = {name: np.ascontiguousarray(v, np.float32) for name, v in params.imatrix.items()}
    imatrix = (native.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, array) in zip(imatrix, values.items(), strict=False):
        entry.name, entry.size = name.encode(), array.size
        entry.data = ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_float))
    if values:
        wanted.imatrix = imatrix
    overrides = (native.llama_model_kv_override * (len(params.metadata) + 1))()
    for override, (key, value) in zip(overrides, params.metadata.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, str):
            override.tag = native.LLAMA_KV_OVERRIDE_TYPE_STR
            # The field has 128 bytes, one for the end; a cut must not leave half a character.
            override.value.val_str = value.encode()[:127].decode(errors="ignore").encode()
        else:
            override.tag = native.LLAMA_KV_OVERRIDE_TYPE_INT
            override.value.val_i64 = value
    wanted.kv_overrides = overrides

    rest, failures = "", list[BaseException]()

    def listen(piece: str) -> None:
        nonlocal rest
        *lines, rest = (rest + piece).split("\n")
        try:
            for line in lines:
                on_line(line)
        except BaseException as error:  # an exception must not unwind through C
            failures.append(error)

    _last_lines.clear()
    _listeners.append(listen)
    try:
        status = native.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(wanted)
        )
    finally:
        _listeners.remove(listen)
    if failures:
        raise failures[0]
    if status != 0:
        reason = _reason().rpartition("failed to quantize: ")[2]
        raise NativeFailed(f"{source}: llama.cpp cannot quantize it to {params.level}: {reason}")


class Model:
    """A loaded GGUF. `repack` lets ggml copy weights into a layout of its own (extra buffers)."""

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
        native = _native()
        params = native.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = repack
        params.no_alloc = no_alloc
        if no_alloc:
            params.load_mode = native.LLAMA_LOAD_MODE_NONE
        _last_lines.clear()
        self.pointer: Any = native.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise BadModelFile(f"{path}: llama.cpp cannot load it: {_reason()}")
        self.path = path
        self.n_gpu_layers = n_gpu_layers
        self.repack = repack
        self.vocab: Any = native.llama_model_get_vocab(self.pointer)
        self.dim = int(native.llama_model_n_embd_out(self.pointer))
        self.n_cls_out = int(native.llama_model_n_cls_out(self.pointer))
        self.n_vocab = int(native.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(native.llama_model_n_ctx_train(self.pointer))

    def close(self) -> None:
        """Free the weights. Its contexts must be closed first."""
        if self.pointer:
            _native().llama_model_free(self.pointer)
            self.pointer = None

    def tokenize(self, text: bytes) -> Tokens:
        """Token ids of UTF-8 text with the model's own BOS/EOS or CLS/SEP, shape (n,).

        Special tokens spelled out in the text are plain text: user input cannot forge them.
        """
        native = _native()
        if not self.pointer:
            raise ValueError(f"{self.path} is closed")
        size = len(text) // 2 + 16
        while True:
            ids = np.empty(size, np.int32)
            pointer = ctypes.cast(ids.ctypes.data, ctypes.POINTER(ctypes.c_int32))
            n = native.llama_tokenize(self.vocab, text, len(text), pointer, size, True, False)
            if n >= 0:
                return ids[:n]
            if n == -(2**31):
                raise NativeFailed(f"a text of {len(text)} bytes overflows the tokenizer")
            size = -n

    def token_text(self, token: int) -> str:
        """The vocabulary's own spelling of a token."""
        return _native().llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def special_tokens(self) -> frozenset[int]:
        """BOS, EOS, CLS (which llama.cpp keeps as BOS) and SEP; those that the vocabulary has."""
        native = _native()
        asked = (native.llama_vocab_bos, native.llama_vocab_eos, native.llama_vocab_sep)
        return frozenset(t for t in (int(ask(self.vocab)) for ask in asked) if t >= 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParams:
    """How a context is made. Fields are llama.cpp's, except `tap`.

    `tap` reads the last hidden state from inside the graph and leaves out the language-model head;
    it needs a model with a KV cache. None leaves the choice to the model or to llama.cpp.
    """

    n_ctx: int
    n_ubatch: int
    n_seq_max: int
    n_threads: int
    pooling: Pooling
    causal: bool | None = None
    flash_attn: bool | None = None
    tap: bool = False


class Context(Closes):
    """One stream of computation over a model; used by one thread at a time."""

    def __init__(self, model: Model, params: ContextParams, encoder: bool) -> None:
        """`encoder`: the architecture runs without a KV cache and sees a batch whole."""
        if not model.pointer:
            raise ValueError(f"{model.path} is closed")
        if not 1 <= params.n_seq_max <= MAX_SEQS:
            raise ValueError(f"n_seq_max={params.n_seq_max} is not within 1..{MAX_SEQS}")
        for name in ("n_ctx", "n_ubatch", "n_threads"):
            if getattr(params, name) < 1:
                raise ValueError(f"{name}={getattr(params, name)} is not at least 1")
        if encoder and params.tap:
            raise ValueError("an encoder has no language-model head to leave out")
        native = _native()
        self.model = model
        self.params = params
        self.encoder = encoder
        # llama.cpp reserves a graph for equal sequences and aborts where they do not fill it.
        n_ubatch = -(-params.n_ubatch // params.n_seq_max) * params.n_seq_max
        n_ctx = max(params.n_ctx, n_ubatch)
        # A batch is split into microbatches by llama.cpp itself, but an encoder sees it whole.
        self.n_batch = n_ubatch if encoder else n_ctx
        self._seq_pointers = _SeqPointers(params.n_seq_max)
        self._n_outputs_max = self.n_batch  # tokens whose vectors one decode can give
        self._tapped: list[Vectors] = []
        self._tap_error: BaseException | None = None
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
        native_params.flash_attn_type = -1 if params.flash_attn is None else int(params.flash_attn)
        native_params.embeddings = not params.tap
        native_params.kv_unified = True
        native_params.no_perf = True
        # Kept on self: ctypes frees a callback that nothing refers to.
        self._callback = native.ggml_backend_sched_eval_callback(self._on_tensor)
        if params.tap:
            native_params.cb_eval = self._callback
            native_params.pooling_type = int(Pooling.NONE)
            last_only = params.pooling in (Pooling.LAST, Pooling.CLS)
            self._n_outputs_max = params.n_seq_max if last_only else self.n_batch
            native_params.n_outputs_max = self._n_outputs_max
        _last_lines.clear()
        self.pointer: Any = native.llama_init_from_model(model.pointer, native_params)
        if not self.pointer:
            raise NativeFailed(
                f"{model.path}: no context of {params.n_ctx} tokens: {_reason()}; "
                "use a smaller n_ctx or max_batch_tokens"
            )
        self._memory: Any = native.llama_get_memory(self.pointer)
        self._get_name = _ggml("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
        self._get_rows = _ggml("ggml_nrows", ctypes.c_int64, ctypes.c_void_p)
        self._get_data = _ggml(
            "ggml_backend_tensor_get",
            None,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
        )

    def close(self) -> None:
        """Free the buffers."""
        if self.pointer:
            _native().llama_free(self.pointer)
            self.pointer = None

    @contextmanager
    def threads(self, n_threads: int) -> Generator[None]:
        """Compute with so many threads for a while."""
        if n_threads == self.params.n_threads:
            yield
            return
        native = _native()
        native.llama_set_n_threads(self.pointer, n_threads, n_threads)
        try:
            yield
        finally:
            native.llama_set_n_threads(self.pointer, self.params.n_threads, self.params.n_threads)

    def forget(self) -> None:
        """Zero the KV cache: a NaN left in it would spread to every later text."""
        self._prefix = None
        if self._memory:
            _native().llama_memory_clear(self._memory, True)

    def run(self, sequences: Sequence[Tokens], *, n_prefix: int = 0) -> Vectors:
        """Pooled vectors, shape (len(sequences), dim), float32, not normalized.

        The first `n_prefix` tokens, the same in every sequence, are computed once and kept for the
        next call with the same prefix; causal models with a tap only. With Pooling.NONE the rows
        are all token vectors end to end; with RANK they are n_cls_out scores.
        """
        if not self.pointer:
            raise ValueError(f"this context of {self.model.path} is closed")
        if n_prefix:
            self._check_sharing()
            self._hold_prefix(sequences[0][:n_prefix])
        elif self._memory:
            self._prefix = None
            _native().llama_memory_clear(self._memory, False)
        bodies = [sequence[n_prefix:] for sequence in sequences]
        lengths = np.fromiter(map(len, bodies), np.int32, len(bodies))
        self._check(bodies, lengths, n_prefix)
        if not self.params.tap:
            return self._pooled(bodies, lengths)
        outputs = self._decode_tapped(bodies, lengths, n_prefix)
        return pool(outputs, lengths, self.params.pooling)

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
        if not self.pointer:
            raise ValueError(f"this context of {self.model.path} is closed")
        self._prefix = None
        _native().llama_memory_clear(self._memory, False)
        self._check([sequence], np.array([len(sequence)], np.int32), 0)
        # Where pooling needs few outputs, there is memory for so many. A causal text can be decoded
        # in pieces: each sees those before it in the cache.
        step = self._n_outputs_max if self.params.causal else len(sequence)
        pieces: list[Vectors] = []
        for start in range(0, len(sequence), step):
            piece = sequence[start : start + step]
            n = len(piece)
            positions = np.arange(start, start + n)
            self._decode(piece, positions, np.zeros(n, np.int32), np.ones(n, np.int8))
            pieces.append(self._outputs(n))
        return np.concatenate(pieces)

    def _check(self, bodies: Sequence[Tokens], lengths: npt.NDArray[np.int32], before: int) -> None:
        """What llama.cpp would abort the process for."""
        n_tokens, n_seqs, params = int(lengths.sum()), len(bodies), self.params
        limit = params.n_ctx - before if self._memory else self.n_batch
        if not params.tap:
            # llama.cpp's own pooling is wrong for a sequence that spans two microbatches.
            limit = min(limit, params.n_ubatch)
        elif params.causal is False:
            limit = min(limit, params.n_ubatch)
        n_seq_max = params.n_seq_max - (before > 0)
        shortest, longest = (int(lengths.min()), int(lengths.max())) if n_seqs else (0, 0)
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
        for body in bodies:
            if int(body.max()) >= self.model.n_vocab or int(body.min()) < 0:
                raise ValueError(f"a token id is not within 0..{self.model.n_vocab - 1}")

    def _check_sharing(self) -> None:
        """Elsewhere a prefix computed once would silently give other vectors."""
        params = self.params
        if not (params.tap and params.causal is not False and params.pooling is Pooling.LAST):
            raise ValueError("a shared prefix needs a tap, causal attention and pooling LAST")

    def _hold_prefix(self, prefix: Tokens) -> None:
        """Leave exactly `prefix` in the cache, as sequence 0."""
        native = _native()
        if self._prefix is not None and np.array_equal(self._prefix, prefix):
            for seq in range(1, self.params.n_seq_max):
                native.llama_memory_seq_rm(self._memory, seq, -1, -1)
            return
        native.llama_memory_clear(self._memory, False)
        self._prefix = None
        length = np.array([len(prefix)], np.int32)
        self._check([prefix], length, 0)
        self._decode(prefix, np.arange(len(prefix)), np.zeros(len(prefix), np.int32), None)
        self._prefix = prefix.copy()

    def _decode_tapped(
        self, bodies: Sequence[Tokens], lengths: npt.NDArray[np.int32], n_prefix: int
    ) -> Vectors:
        native = _native()
        first_seq = 1 if n_prefix else 0
        if n_prefix:
            for seq in range(1, len(bodies) + 1):
                native.llama_memory_seq_cp(self._memory, 0, seq, -1, -1)
        positions, seqs = _end_to_end(lengths)
        mask = output_mask(lengths, self.params.pooling)
        self._decode(np.concatenate(bodies), positions + n_prefix, seqs + first_seq, mask)
        return self._outputs(int(mask.sum()))

    def _outputs(self, n: int) -> Vectors:
        """What the tap gave in the last decode, which asked for `n` tokens."""
        outputs = np.concatenate(self._tapped) if self._tapped else np.empty((0, 0), np.float32)
        if outputs.shape != (n, self.model.dim):
            raise TapUnavailable(
                f"{self.model.path}: the graph gave {outputs.shape} outputs at "
                f"{TAPPED_TENSOR.decode()}, not {(n, self.model.dim)}"
            )
        return outputs

    def _pooled(self, bodies: Sequence[Tokens], lengths: npt.NDArray[np.int32]) -> Vectors:
        native = _native()
        n_tokens = int(lengths.sum())
        positions, seqs = _end_to_end(lengths)
        self._decode(np.concatenate(bodies), positions, seqs, np.ones(n_tokens, np.int8))
        if self.params.pooling is Pooling.NONE:
            pointer = native.llama_get_embeddings(self.pointer)
            return _copy(pointer, n_tokens * self.model.dim).reshape(n_tokens, self.model.dim)
        dim = self.model.n_cls_out if self.params.pooling is Pooling.RANK else self.model.dim
        vectors = np.empty((len(bodies), dim), np.float32)
        for seq in range(len(bodies)):
            vectors[seq] = _copy(native.llama_get_embeddings_seq(self.pointer, seq), dim)
        return vectors

    def _decode(
        self,
        tokens: Tokens,
        positions: npt.NDArray[np.int64],
        seqs: npt.NDArray[np.int32],
        mask: npt.NDArray[np.int8] | None,
    ) -> None:
        """One native call; the GIL is released while it computes."""
        native = _native()
        n_tokens = len(tokens)
        arrays = (
            np.ascontiguousarray(tokens, np.int32),
            positions.astype(np.int32),
            np.ones(n_tokens, np.int32),
            self._seq_pointers.of(seqs),
            np.zeros(n_tokens, np.int8) if mask is None else mask,
        )
        batch = native.llama_batch()
        batch.n_tokens = n_tokens
        for field, array in zip(_BATCH_FIELDS, arrays, strict=True):
            current: Any = getattr(batch, field)
            setattr(batch, field, ctypes.cast(array.ctypes.data, current.__class__))
        self._tapped = []
        _last_lines.clear()
        status = native.llama_decode(self.pointer, batch)
        if self._tap_error is not None:
            error, self._tap_error = self._tap_error, None
            raise error
        if status != 0:
            raise NativeFailed(
                f"{self.model.path}: llama_decode gave {status} for {n_tokens} tokens: {_reason()}"
            )

    def _on_tensor(self, tensor: int, ask: bool, _data: object) -> bool:
        """Called by ggml's scheduler for each node; True to `ask` stops after that node.

        Returning False after the tapped tensor ends the graph there: the head is not computed.
        """
        try:
            if ask:
                return self._get_name(tensor) == TAPPED_TENSOR
            rows = np.empty((self._get_rows(tensor), self.model.dim), np.float32)
            if rows.size:
                self._get_data(tensor, rows.ctypes.data, 0, rows.nbytes)
            self._tapped.append(rows)
        except BaseException as error:  # an exception must not unwind through C
            self._tap_error = error
        return False


class TapUnavailable(NativeFailed):
    """This architecture's graph has no tensor to tap; the pooled path serves instead."""


class _SeqPointers:
    """llama_batch wants, per token, a pointer to its sequence ids; one table serves all batches."""

    def __init__(self, n_seq_max: int) -> None:
        self._ids = np.arange(n_seq_max, dtype=np.int32)
        self._addresses = self._ids.ctypes.data + 4 * self._ids.astype(np.uintp)

    def of(self, seqs: npt.NDArray[np.int32]) -> npt.NDArray[np.uintp]:
        """Addresses of one-element id lists, shape (n_tokens,)."""
        return self._addresses[seqs]


def _end_to_end(
    lengths: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Position and sequence number, from 0, of each token of sequences laid end to end."""
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return positions, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def _copy(pointer: Any, n: int) -> npt.NDArray[np.float32]:
    """A copy of n floats that llama.cpp owns until the next call."""
    if not pointer:
        raise NativeFailed(f"llama.cpp returned no embedding: {_reason()}")
    return np.ctypeslib.as_array(pointer, shape=(n,)).astype(np.float32, copy=True)
