"""The child process in which a model file is tried before any other process loads it.

    {"stage": "load"} {"stage": "tokenize"} {"stage": "decode"} {"stage": "tap"} {"verdict": ""}
    {"stage": "accelerator"} {"accelerator": ""}

A verdict says what is wrong, "" for nothing. `engine/proof.py` reads it, and explains a death.
The accelerator is tried where it is asked for, after the verdict on the file itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_embed.engine import canaries
from gguf_embed.engine.tokenizer import RunTooLong, Tokenizer
from gguf_embed.errors import BadModelFile, GgufEmbedError, NativeFailed
from gguf_embed.gguf.header import read_header
from gguf_embed.gguf.quants import tolerance
from gguf_embed.gguf.vocabulary import check_vocabulary
from gguf_embed.machine import selftest_child
from gguf_embed.native.context import Context, ContextParams, TapUnavailable
from gguf_embed.native.library import accelerated, bindings
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.mode import SpecialTokens
from gguf_embed.system.child import DONE, take_job, tell
from gguf_embed.system.files import printable
from gguf_embed.vectors import Pooling, Vectors, least_cosine

# Tests kill the child on purpose: "decode:SIGSEGV".
FAULT_VARIABLE = "GGUF_EMBED_PROOF_FAULT"

RUN = 2000  # characters of each class
SAME = 1 - 1e-6  # cosine of what is one vector
# Tokens of the longer batch, for a small file and for a large one. A small one is computed by one
# thread: on a busy machine several wait for each other at every step, which takes seconds.
SMALL_BYTES, N_LONG_SMALL, N_LONG_LARGE = 256 << 20, 128, 64

_UNITS = (
    *("a", "A", "aB", "é", "ж", ".", "$", "7", " ", "\t", "\n", "\r\n", "\u00a0", " .", ".\n"),
    *("/\n", "'s", "中", "か", "한", "😀", "\u0301", "a\u0301", "क्", "\x01", "\ue000", "\ufffd"),
)
HARD = (
    "",
    "\x00",
    "".join(map(chr, range(256))),
    "<s> </s> <unk> [CLS] [SEP] <|endoftext|> <|im_start|>",
    "👩‍👩‍👧‍👦 \u202eright to left\u202c \U000e0041 \U0010ffff \ufdd0",
    *(unit * (RUN // len(unit)) for unit in _UNITS),
    "The quick brown fox jumps over the lazy dog. " * 400,
)


class TriedFile:
    """One file, loaded as it will run."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.path = Path(job["path"])
        self.header = read_header(self.path, keep_arrays=True)
        check_vocabulary(self.header)
        self.small = self.path.stat().st_size < SMALL_BYTES
        self.n_threads: int = 1 if self.small else job["n_threads"]
        self.pooling = Pooling(job["pooling"])
        self.encoder: bool = job["encoder"]
        self.job = job
        self.model = Model(self.path, n_gpu_layers=job["n_gpu_layers"], repack=job["repack"])
        self.decoded: tuple[Sequence[Tokens], Vectors] | None = None  # what is right
        self.n_long: int = min(
            job["n_ctx"],
            N_LONG_SMALL if self.small else N_LONG_LARGE,
            self.model.n_ctx_train if self.encoder else sys.maxsize,
        )

    def tokenize(self) -> list[Tokens] | str:
        """Ids of ordinary texts that differ; what is wrong with them."""
        specials = SpecialTokens(first=self.job["first_token"], last=self.job["end_token"])
        tokenizer = Tokenizer(self.path, self.header, self.model, specials)
        ids: dict[str, Tokens] = {}
        for text in (*HARD, *canaries.ALL):
            try:
                ids[text] = tokenizer.encode(text)
            except RunTooLong:
                continue
            last = self.model.n_vocab - 1
            if len(ids[text]) and not 0 <= ids[text].min() <= ids[text].max() <= last:
                return f"its vocabulary gives token ids that are not within 0..{last}; {_NEXT}"
        ordinary = {ids[text].tobytes(): ids[text] for text in canaries.ALL if len(ids[text])}
        if len(ordinary) < 2:
            return f"its vocabulary gives different texts the same token ids; {_NEXT}"
        return list(ordinary.values())

    def decode(self, ids: Sequence[Tokens]) -> str:
        """What is wrong with the vectors of a short batch and of a longer one, "" for nothing."""
        n_short = min(3, self.n_long, len(ids))  # all of them fit into one batch, be it of 1 token
        short = [sequence[: self.n_long // n_short] for sequence in ids[:n_short]]
        if n_short > 1:  # positions alone must not be what tells texts apart
            twins = (_of_equal_length(short[0], other) for other in ids[1:])
            short[1] = next((t for t in twins if not np.array_equal(t, short[0])), short[1])
        long = np.resize(np.concatenate(ids), self.n_long)
        flash: bool = self.job["flash_attn"]
        vectors = np.concatenate([self._run(short, flash=flash), self._run([long], flash=flash)])
        plain = self._run([*short[:1]], flash=False)  # the way out where the fast one gives NaN
        self._run(short[:1], pooling=Pooling.NONE, flash=flash)  # token vectors
        if not np.isfinite(plain).all():
            return f"it gives NaN, or numbers too large, for ordinary text; {_NEXT}"
        sequences = [*short, long]
        self.decoded = sequences, vectors
        if self.pooling is Pooling.RANK:
            differ = len({sequence.tobytes() for sequence in sequences}) > 1
            same = differ and bool((vectors == vectors[0]).all())
            return f"it gives different texts the same score; {_NEXT}" if same else ""
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if not np.isfinite(vectors).all():
            return "" if np.linalg.norm(plain) > 0 else _ZERO
        if not (norms > 0).all() or not np.linalg.norm(plain) > 0:
            return _ZERO
        pairs = [(0, 1), *((a, b) for b in range(len(sequences)) for a in range(b))]
        directions = vectors / norms[:, None]
        # Of equal length, and of any length.
        for compared in (pairs[:1], pairs):
            different = [
                float(directions[a] @ directions[b])
                for a, b in compared
                if sequences[a].tobytes() != sequences[b].tobytes()
            ]
            if different and not min(different) < SAME:
                return f"it gives different texts the same vector; {_NEXT}"
        return ""

    def tap(self, ids: Sequence[Tokens]) -> None:
        """Decode with the tap, which need not be there but must not crash."""
        if self._has_tap:
            try:
                self._run([ids[0][: self.n_long]], flash=self.job["flash_attn"], tap=True)
            except TapUnavailable:
                return

    def accelerate(self, loaded: Model | None = None) -> str:
        """Why this file is not to run with the accelerator, "" for nothing.

        Its vectors must be those of llama.cpp, as near as two kernels can be, and the same to the
        bit alone and in company. `loaded` is the file as it will run with it, where it is loaded.
        """
        if self.decoded is None:
            return "the file gave no vectors to compare with"
        if (remark := accelerated().remark) != "":
            return remark
        sequences, expected = self.decoded
        self.model.close()
        params = self._params(flash=True, accelerator=True)
        with loaded or self.load_plain() as model:
            batch: list[Vectors] = []
            alone: list[Vectors] = []
            with _context(model, params, encoder=self.encoder, tap=self._has_tap) as context:
                batch.append(context.run(sequences[:-1]))
                batch.append(context.run(sequences[-1:]))
                alone += [context.run([sequence]) for sequence in sequences[:-1]]
        alone.append(batch[1])  # the long one fills a microbatch
        ours = np.concatenate(batch)
        if not np.array_equal(ours, np.concatenate(alone)):
            return "a text alone gives other bits than in company"
        return difference(ours, expected, self.pooling, tolerance(self.header.matrix_types))

    def load_plain(self) -> Model:
        """The weights as they lie in the file, which is how the accelerator takes them."""
        return Model(self.path, repack=False)

    def _run(
        self,
        sequences: Sequence[Tokens],
        *,
        flash: bool,
        tap: bool = False,
        pooling: Pooling | None = None,
    ) -> Vectors:
        params = replace(self._params(flash=flash), tap=tap)
        if pooling is not None:
            params = replace(params, pooling=pooling)
        with Context(self.model, params, self.encoder) as context:
            return context.run(sequences)

    def _params(self, *, flash: bool, accelerator: bool = False) -> ContextParams:
        return ContextParams(
            n_ctx=self.n_long,
            n_ubatch=self.n_long,
            n_seq_max=min(4, self.n_long),
            n_threads=self.n_threads,
            pooling=self.pooling,
            causal=self.job["causal"],
            flash_attn=flash,
            accelerator=accelerator,
        )

    @property
    def _has_tap(self) -> bool:
        """Whether the file will be run with the tap, as far as is known."""
        return self.job["tap"] and not self.encoder and self.pooling is not Pooling.RANK


def difference(ours: Vectors, expected: Vectors, pooling: Pooling, least: float) -> str:
    """What tells the accelerator's vectors from llama.cpp's, "" for nothing that counts."""
    if pooling is Pooling.RANK:
        bound = (1 - least) * np.maximum(1, np.abs(expected)).max()
        most = float(np.abs(ours - expected).max())
        return "" if most <= bound else f"its scores differ from llama.cpp's by {most:.3g}"
    cosine = least_cosine(ours, expected)
    return "" if cosine >= least else f"its vectors differ from llama.cpp's (cosine {cosine:.4f})"


@contextmanager
def _context(
    model: Model, params: ContextParams, *, encoder: bool, tap: bool
) -> Generator[Context]:
    """With the tap where there is one: a graph without it says so at the first text."""
    with Context(model, replace(params, tap=tap), encoder) as context:
        if tap:
            try:
                context.run([np.zeros(1, np.int32)])
            except TapUnavailable:
                with Context(model, params, encoder) as untapped:
                    yield untapped
                return
        yield context


def _of_equal_length(text: Tokens, other: Tokens) -> Tokens:
    """The text with the middle of another: as many tokens, and the same at both ends."""
    if len(text) < 3:
        return other[: len(text)]
    middle = other[1:-1] if len(other) > 2 else other
    return np.concatenate([text[:1], np.resize(middle, len(text) - 2), text[-1:]])


_NEXT = (
    "fetch the file again or take another quantization of the model; if neither helps, report it "
    "to those who made the file"
)
_ZERO = f"it gives vectors of length 0 for ordinary text; {_NEXT}"


def _enter(stage: str) -> None:
    tell({"stage": stage})
    where, _, name = os.environ.get(FAULT_VARIABLE, "").partition(":")
    if where == stage:
        os.kill(os.getpid(), signal.Signals[name])


def _verdict(job: dict[str, Any]) -> str:
    _enter("load")
    try:
        tried = TriedFile(job)
    except BadModelFile as error:
        return _reason(error, job)
    with closing(tried.model):
        return _verdict_of(tried, job)


def _verdict_of(tried: TriedFile, job: dict[str, Any]) -> str:
    _enter("tokenize")
    ids = tried.tokenize()
    if isinstance(ids, str):
        return ids
    if not job["accelerator"]:
        return _decoded(tried, ids)
    with ExitStack() as held:
        plain: Future[Model] | None = None
        if tried.small:  # two of it have room: the second one is loaded while the first computes
            side = held.enter_context(ThreadPoolExecutor(1))
            plain = side.submit(tried.load_plain)
            held.callback(_close, plain)
        if fault := _decoded(tried, ids):
            return fault
        tell({"verdict": ""})
        _enter("accelerator")
        try:
            tell({"accelerator": tried.accelerate(plain and plain.result())})
        except GgufEmbedError as error:
            tell({"accelerator": _reason(error, job)})
    return ""


def _decoded(tried: TriedFile, ids: Sequence[Tokens]) -> str:
    """What is wrong with what llama.cpp alone computes, "" for nothing."""
    _enter("decode")
    if fault := tried.decode(ids):
        return fault
    _enter("tap")
    tried.tap(ids)
    return ""


def _close(loading: Future[Model]) -> None:
    if loading.exception() is None:
        loading.result().close()


def _reason(error: GgufEmbedError, job: dict[str, Any]) -> str:
    """What it says of the file, whose name the parent puts in front."""
    path: str = job["path"]
    shown = printable(Path(path))
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{shown}: ")


def _try_file(job: dict[str, Any]) -> None:
    try:
        tell({"verdict": _verdict(job)})
    except NativeFailed as error:
        tell({"verdict": _reason(error, job)})
    except GgufEmbedError as error:
        tell({"error": type(error).__name__, "message": str(error)})


def _main() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a death here is an answer
    with suppress(NativeFailed):  # which a job will meet again, and tell
        bindings()  # read while there is no job yet
    while True:
        job = take_job()
        if "stages" in job:
            selftest_child.answer(job)
        else:
            _try_file(job)
        tell(DONE)


if __name__ == "__main__":
    _main()
