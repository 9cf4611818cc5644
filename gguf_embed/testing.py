"""An Embedder and a Reranker that need no model and no native code, for tests of what is built on
them.

    from gguf_embed.testing import FakeEmbedder, FakeReranker

    with FakeEmbedder.open() as embedder:
        vectors = embedder.encode(["one text", "another"])  # always the same ones
    with FakeReranker.open() as reranker:
        best = reranker.rank("a cat", ["a dog", "the cat"])  # the more words they share

Prompts, truncation, order, progress and errors are those of `Embedder`: only the model is not
there. A text has as many tokens as words, and one at each end. Its vector counts its words, those
of the prompt included, so texts with the same words are near one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final
from zlib import crc32

import numpy as np

from gguf_embed.catalog import catalog
from gguf_embed.engine import arguments
from gguf_embed.engine.backend import BatchLimits, Head, Outcome
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import Opened
from gguf_embed.engine.pairs import Pairing
from gguf_embed.engine.reranker import Reranker
from gguf_embed.engine.score_head import ScoreHead
from gguf_embed.engine.tune_record import Target
from gguf_embed.gguf.header import Header
from gguf_embed.machine.measured import LevelFigures
from gguf_embed.machine.selftest import SafePaths
from gguf_embed.native.model import Tokens
from gguf_embed.plan.candidate import Candidate
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.plan import Plan
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.store import download
from gguf_embed.store.local import Source
from gguf_embed.vectors import Pooling

NAME: Final = "fake"
PROMPTS: Final[Mapping[str, str]] = {"query": "query: ", "document": "document: "}

_START, _END = 0, 1  # special tokens


class FakeBackend:
    """Computes vectors from the ids of tokens, which are hashes of words.

    `microbatches` are those computed so far: the tokens of each text.
    """

    def __init__(self, *, dim: int = 64, limits: BatchLimits | None = None) -> None:
        self._dim = dim
        self._limits = limits or BatchLimits(max_tokens=512, max_seqs=64)
        self.microbatches: list[list[Tokens]] = []

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def specials(self) -> frozenset[int]:
        """The tokens at the ends of a text."""
        return frozenset({_START, _END})

    @property
    def limits(self) -> BatchLimits:
        """As given."""
        return self._limits

    def tokenize(self, text: str) -> Tokens:
        """A token for each word, and one at each end."""
        words = text.lower().encode().split()
        ids = [max(crc32(word) & 0x7FFFFFFF, _END + 1) for word in words]
        return np.array([_START, *ids, _END], np.int32)

    def contexts_for(self, n_tokens: int, head: Head) -> int:
        """One, for whatever microbatch."""
        return 1

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        """A vector for each text; with Head.TOKENS for each token."""
        self.microbatches.append(list(sequences))
        if head is Head.TOKENS:
            sequences = [ids[i : i + 1] for ids in sequences for i in range(len(ids))]
        return Outcome(vectors=np.stack([self._vector(ids) for ids in sequences]))

    def close(self) -> None:
        """Nothing is held."""

    def _vector(self, ids: Tokens) -> np.ndarray:
        # The ends weigh little, but no text is without direction.
        weights = np.where(ids > _END, 1, 1e-3)
        return np.bincount(ids % self._dim, weights, self._dim).astype(np.float32)


class FakeEmbedder(Embedder):
    """An `Embedder` around a `FakeBackend`."""

    backend: FakeBackend

    @classmethod
    def open(
        cls,
        model: str | Path = NAME,
        *,
        settings: Settings | None = None,
        on_status: Callable[[str], None] | None = None,
        on_download: download.OnDownload | None = None,
        isolated: bool = False,
        dim: int = 64,
        n_ctx: int = 32,
        prompts: Mapping[str, str] = PROMPTS,
        limits: BatchLimits | None = None,
        backend: FakeBackend | None = None,
    ) -> FakeEmbedder:
        """What `Embedder.open` gives, whatever the model: of `dim` values, for `n_ctx` tokens.

        `backend` may be of a class of your own, such as one that fails.
        """
        _, settings, _ = arguments.check_opening(
            model, settings, isolated, on_status=on_status, on_download=on_download
        )
        backend = backend or FakeBackend(dim=dim, limits=limits)
        return cls(_opened(backend, n_ctx=n_ctx, prompts=prompts, settings=settings))

    def __init__(self, opened: Opened) -> None:
        """Use `FakeEmbedder.open`."""
        assert isinstance(opened.backend, FakeBackend)
        self.backend = opened.backend
        super().__init__(opened)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as what opens the same fake again."""
        how = {"dim": self.dim, "n_ctx": self.n_ctx, "prompts": dict(self.prompts)}
        how |= {"settings": self.settings, "limits": self.backend.limits}
        return partial(FakeEmbedder.open, **how), ()


class FakePairBackend(FakeBackend):
    """Its vectors tell in their first value how many words of the query are in the document."""

    def _vector(self, ids: Tokens) -> np.ndarray:
        vector = np.zeros(self.dim, np.float32)
        between = np.flatnonzero((ids[:-1] == _END) & (ids[1:] == _END))
        if len(between):  # else it is no pair
            query = {*ids[1 : between[0]].tolist()}
            shared = query & {*ids[between[0] + 2 : -1].tolist()}
            vector[0] = len(shared) / max(len(query), 1)
        vector[1] = 1  # none is without length
        return vector


class FakeReranker(Reranker):
    """A `Reranker` around a `FakePairBackend`.

    A document with none of the query's words has the score 0.12, with half of them 0.5, with all of
    them 0.88. As in XLM-RoBERTa four tokens are around and between the two.
    """

    backend: FakeBackend

    @classmethod
    def open(
        cls,
        model: str | Path = NAME,
        *,
        settings: Settings | None = None,
        on_status: Callable[[str], None] | None = None,
        on_download: download.OnDownload | None = None,
        isolated: bool = False,
        n_ctx: int = 64,
        limits: BatchLimits | None = None,
        backend: FakeBackend | None = None,
    ) -> FakeReranker:
        """What `Reranker.open` gives, whatever the model, for pairs of `n_ctx` tokens.

        `backend` may be of a class of your own, such as one that fails.
        """
        _, settings, _ = arguments.check_opening(
            model, settings, isolated, on_status=on_status, on_download=on_download
        )
        backend = backend or FakePairBackend(limits=limits)
        opened = _opened(backend, n_ctx=n_ctx, prompts={}, settings=settings)
        row = np.zeros(backend.dim)
        row[:2] = 4, -2
        pairing = Pairing(template=None, controls={}, first=_START, last=_END)
        return cls(opened, pairing, ScoreHead(row=row))

    def __init__(self, opened: Opened, pairing: Pairing, head: ScoreHead) -> None:
        """Use `FakeReranker.open`."""
        assert isinstance(opened.backend, FakeBackend)
        self.backend = opened.backend
        super().__init__(opened, pairing, head)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as what opens the same fake again."""
        how = {"n_ctx": self.n_ctx, "settings": self.settings, "limits": self.backend.limits}
        return partial(FakeReranker.open, **how), ()


def _opened(
    backend: FakeBackend, *, n_ctx: int, prompts: Mapping[str, str], settings: Settings
) -> Opened:
    """A model in F32 that pools the mean, on a CPU."""
    builtin = next(card for card in catalog.cards() if card.id == catalog.BUILTIN)
    card = replace(builtin, id=NAME, aliases=(), files=(), prompts=prompts, dim=backend.dim)
    header = Header(
        source=f"{NAME}.gguf",
        version=3,
        metadata={
            "general.architecture": card.architecture,
            "general.file_type": 0,
            f"{card.architecture}.vocab_size": 2**31 - 1,
        },
        tensors=(),
        header_bytes=0,
        file_bytes=0,
    )
    run = RunSettings(n_ctx=n_ctx, n_contexts=backend.limits.n_contexts)
    row = Candidate(
        quant="F32",
        tier="cpu",
        where="CPU",
        fit="fits",
        needed_bytes=0,
        free_bytes=0,
        reason="takes no memory",
        run=run,
        memory={},
        measured=LevelFigures(),
    )
    made = Plan(
        model=NAME,
        quant="F32",
        reason="a fake, for tests",
        file=None,
        tier="cpu",
        fit="fits",
        devices=("CPU",),
        run=run,
        memory={},
        considered=(row,),
        why=("a fake, for tests",),
    )
    path = Path(header.source)
    mode = EmbedMode(pooling=settings.pooling or Pooling.MEAN, causal=False, encoder=True)
    safe = SafePaths(flash=True, repack=True, remark=None)
    return Opened(
        source=Source(
            name=NAME,
            card=card,
            file=header.source,
            sha256=sha256(f"{NAME} {backend.dim}".encode()).hexdigest(),
        ),
        path=path,
        header=header,
        card=card,
        plan=made,
        settings=settings,
        run=run,
        mode=mode,
        remarks=(),
        target=Target(path=path, header=header, mode=mode, safe=safe, n_cores=1, start=run),
        backend=backend,
        reopen=lambda: backend,
    )
