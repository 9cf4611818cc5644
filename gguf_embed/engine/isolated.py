"""The engine with its model in a child process: what kills native code kills the child only.

    with Embedder.open("all-minilm-l6-v2", isolated=True) as embedder: ...

Texts that llama.cpp is to tokenize go over a pipe, token ids and vectors through shared memory.
Microbatches are packed here as ever and computed there as ever, so the vectors are the same to the
bit.

When the child dies, what it was computing is computed again, one microbatch at a time, in a fresh
one. A microbatch of which it dies again is halved until the row is found. Its neighbours are then
computed with a harmless row of the same length in its place, so that their vectors are those of an
undisturbed run.
"""

from __future__ import annotations

import base64
import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import numpy as np

from gguf_embed.engine.ahead import Ahead
from gguf_embed.engine.backend import BatchLimits, Head, Outcome
from gguf_embed.engine.gate import Gate
from gguf_embed.engine.loaded import limits_of
from gguf_embed.engine.process import Died, Process
from gguf_embed.engine.proved import Proved
from gguf_embed.engine.tokenizer import KillsTokenizer
from gguf_embed.errors import BadInput, NativeFailed
from gguf_embed.native.model import Tokens
from gguf_embed.plan.settings import RunSettings
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable
from gguf_embed.vectors import Vectors

_log = logging.getLogger(__name__)

CRASHES_OF_A_ROW: Final = 2  # alone, before it is called the culprit
# A kill comes from outside, by chance while a row is alone; or for lack of memory, again and again.
KILLS_OF_A_ROW: Final = 6
MAX_STARTS: Final = 3  # in a row without one that succeeds
MAX_DEATHS: Final = 16  # in a row without anything computed between them

Status = Callable[[str], None]
_Result = TypeVar("_Result")


class IsolatedModel(Closes):
    """The `Backend` whose model is in a child. Safe to use from several threads."""

    def __init__(self, proved: Proved) -> None:
        """Start the child and load the model there. Raises what loading raises."""
        self._gate = Gate()
        self._starting = threading.Lock()
        self._process: Process | None = None
        self._closed = False
        self.n_deaths = 0
        self._n_deaths_in_a_row = 0
        self.proved = proved
        self._run: RunSettings | None = None
        self._ready: dict[str, Any] = {}
        with Ahead() as ahead:
            ahead.read_words(proved.path, proved.header)
            self._started()
            ready = self._ready
            self._words = ahead.words()
        self._dim: int = ready["dim"]
        self._n_scores: int = ready["n_scores"]
        self._specials = frozenset[int](ready["specials"])
        self._ordinary_tokens: int = ready["ordinary_tokens"]
        self._tokens_alone: bool = ready["tokens_alone"]
        run = self.run_settings
        self._n_contexts = run.n_contexts
        self._limits = limits_of(run, self.proved.mode, exact=proved.settings.exact)

    @property
    def run_settings(self) -> RunSettings:
        """How the model runs there."""
        assert self._run, "the child said them"
        return self._run

    @property
    def pid(self) -> int:
        """Of the child that computes now."""
        return self._started().pid

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def specials(self) -> frozenset[int]:
        """The model's special tokens."""
        return self._specials

    @property
    def limits(self) -> BatchLimits:
        """As the run settings of the child say."""
        return self._limits

    @property
    def tokenizes_here(self) -> bool:
        """Whether `tokenize` asks no child."""
        return self._words is not None

    def contexts_for(self, n_tokens: int, head: Head) -> int:
        """See `Runner.contexts_for`."""
        own = n_tokens > self._ordinary_tokens or (head is Head.TOKENS and self._tokens_alone)
        return self._n_contexts if own else 1

    def tokenize(self, text: str) -> Tokens:
        """Token ids as the model's reference tokenizer gives them. Raises KillsTokenizer."""
        text.encode()  # UnicodeEncodeError here rather than there
        if self._words is not None:  # Python alone, of which nothing dies
            return np.array(self._words.encode(text), np.int32)
        request: dict[str, object] = {"do": "tokenize", "text": text}
        with suppress(Died), self._gate.shared():
            return np.array(self._ask(request)["ids"], np.int32)
        with self._gate.alone():
            with suppress(Died):
                return np.array(_tried(lambda: self._ask(request))["ids"], np.int32)
            self._still_works()
        raise KillsTokenizer(
            f"llama.cpp dies when it tokenizes this text of {len(text):,} characters, also alone; "
            "leave it out or split it"
        )

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        """See `Backend.run`; rows that kill the child are among `bad`, and in `died`."""

        def compute(rows: Sequence[Tokens]) -> Outcome:
            return self._computed(rows, head, n_prefix, n_contexts)

        with suppress(Died), self._gate.shared():
            return compute(sequences)
        with self._gate.alone():
            for _ in range(MAX_DEATHS):
                with suppress(Died):
                    return compute(sequences)
                culprits = self._culprits(sequences, compute)
                if culprits:
                    with suppress(Died):
                        return _without(sequences, culprits, n_prefix, compute, self._zeros)
        raise NativeFailed(
            f"{printable(self.proved.path)}: the child process that computes dies again and again, "
            "and not of one text; run `gguf-embed doctor`"
        )

    def close(self) -> None:
        """End the child."""
        with self._starting:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def _culprits(
        self, sequences: Sequence[Tokens], compute: Callable[[Sequence[Tokens]], Outcome]
    ) -> list[int]:
        """Rows of which the child dies when they are alone, found by halving."""

        def search(rows: range) -> list[int]:
            part = [sequences[row] for row in rows]
            with suppress(Died):
                _tried(lambda: compute(part)) if len(rows) == 1 else compute(part)
                return []
            if len(rows) == 1:
                self._still_works(compute)
                return [rows[0]]
            half = len(rows) // 2
            return search(rows[:half]) + search(rows[half:])

        rows = range(len(sequences))
        half = len(rows) // 2
        return search(rows[:half]) + search(rows[half:]) if half else search(rows)

    def _still_works(self, compute: Callable[[Sequence[Tokens]], Outcome] | None = None) -> None:
        """Try an ordinary text after a culprit: deaths count in a row where it dies as well."""
        with suppress(Died):
            ids = np.array(self._ask({"do": "tokenize", "text": "a"})["ids"], np.int32)
            if compute is not None and len(ids):
                compute([ids])

    def _computed(
        self, sequences: Sequence[Tokens], head: Head, n_prefix: int, n_contexts: int
    ) -> Outcome:
        """One microbatch in the child. Raises Died."""
        process = self._started()
        lengths = [len(sequence) for sequence in sequences]
        width = self._n_scores if head is Head.RANK else self._dim
        n_rows = sum(lengths) if head is Head.TOKENS else len(lengths)
        with process.segments.taken(4 * max(sum(lengths), n_rows * width)) as segment:
            np.concatenate(sequences, out=segment.tokens(sum(lengths)))
            answer = self._ask(
                {
                    "do": "run",
                    "segment": str(segment.path),
                    "lengths": lengths,
                    "head": head.value,
                    "n_prefix": n_prefix,
                    "n_contexts": n_contexts,
                },
                process,
            )
            segment.unname()  # both have mapped it
            vectors = segment.vectors(tuple(answer["shape"])).copy()
        return Outcome(vectors=vectors, bad=tuple(answer["bad"]))

    def _zeros(self, n_rows: int) -> Vectors:
        return np.zeros((n_rows, self._dim), np.float32)

    def _ask(self, request: dict[str, object], process: Process | None = None) -> dict[str, Any]:
        answer = (process or self._started()).ask(request)
        self._n_deaths_in_a_row = 0
        return answer

    def _started(self) -> Process:
        """The child that lives, or a fresh one. Raises NativeFailed where none stays alive."""
        with self._starting:
            if self._closed:
                raise BadInput("the engine is closed; open the model again")
            if self._process is not None:
                if (death := self._process.death) is None:
                    return self._process
                self.n_deaths += 1
                self._n_deaths_in_a_row += 1
                _log.warning("the child process that computes died: %s", death)
                self._process.close()
                self._process = None
            if self._n_deaths_in_a_row > MAX_DEATHS:
                raise NativeFailed(
                    f"{printable(self.proved.path)}: the child process that computes died "
                    f"{self._n_deaths_in_a_row} times in a row; run `gguf-embed doctor`"
                )
            self._process = self._start()
            return self._process

    def _start(self) -> Process:
        """A child with the model loaded."""
        opened = pickle.dumps((self.proved, self._run))
        job = {"opened": base64.b64encode(opened).decode()}
        reason = ""
        for _ in range(MAX_STARTS):
            process = Process(job)
            try:
                answer = process.ready()
            except Died as death:
                process.close()
                reason = death.reason
                continue
            except BaseException:
                process.close()
                raise
            if "failed" in answer:
                process.close()
                raise pickle.loads(base64.b64decode(answer["failed"]))  # from our own child
            self.proved, self._run = pickle.loads(base64.b64decode(answer["ready"]))
            self._ready = answer
            return process
        raise NativeFailed(
            f"{printable(self.proved.path)}: the child process that computes died {MAX_STARTS} "
            f"times while it loaded the model ({reason}); run `gguf-embed doctor`"
        )


def _tried(compute: Callable[[], _Result]) -> _Result:
    """What it returns, with a row that is alone. Raises Died where the row is the culprit."""
    n_crashes = n_kills = 0
    while True:
        try:
            return compute()
        except Died as death:
            n_crashes += death.crashed
            n_kills += not death.crashed
            if n_crashes == CRASHES_OF_A_ROW or n_kills == KILLS_OF_A_ROW:
                raise


def _without(
    sequences: Sequence[Tokens],
    culprits: Sequence[int],
    n_prefix: int,
    compute: Callable[[Sequence[Tokens]], Outcome],
    zeros: Callable[[int], Vectors],
) -> Outcome:
    """The outcome with a harmless row of the same length in place of each culprit."""
    dead = tuple(culprits)
    harmless = [each for row, each in enumerate(sequences) if row not in dead]
    if not harmless:
        return Outcome(vectors=zeros(len(sequences)), bad=dead, died=dead)
    source = harmless[0]
    rows = list(sequences)
    for row in dead:
        body = np.resize(source[n_prefix:], len(rows[row]) - n_prefix)
        rows[row] = np.concatenate([source[:n_prefix], body])
    outcome = compute(rows)
    bad = tuple(sorted({*outcome.bad, *dead}))
    return Outcome(vectors=outcome.vectors, bad=bad, died=dead)
