"""An engine that needs no model: vectors from word hashes. Run as a script it is the command line.

A text has as many tokens as words, and one at each end; its vector counts hashed words, those
of the prompt included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np

from gguf_embed import cli
from gguf_embed.catalog import catalog
from gguf_embed.cli import options
from gguf_embed.engine.embedder import Block, Progress
from gguf_embed.engine.opening import Settings
from gguf_embed.errors import BadOption, NativeFailed, TextTooLong
from gguf_embed.machine.machine import machine_from_json
from gguf_embed.plan.plan import plan_for
from gguf_embed.vectors import Pooling

DIM = 64
LAPTOP = Path(__file__).parent / "machines" / "laptop-16gb-no-gpu.json"
WINDOW = 4


class FakeEmbedder:
    """What the command line uses of `Embedder`, with the same promises."""

    dim = DIM
    n_ctx = 32
    model_id = "fake"
    quant = "F32"
    pooling = Pooling.MEAN
    path = Path("fake.gguf")
    plan = plan_for(catalog.cards()[0], machine_from_json(LAPTOP.read_text()))

    def __init__(
        self, model: str, settings: Settings | None = None, *, quiet: bool = False
    ) -> None:
        if model == "broken":
            raise NativeFailed("it is\nbroken")
        self.settings = settings

    def __enter__(self) -> FakeEmbedder:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def prompt(self, name: str) -> str:
        if name not in ("query", "document"):
            raise BadOption(f"fake has no prompt {name!r}")
        return f"{name}: "

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 2 for text in texts]

    def encode(self, texts: str | Sequence[str], **choices: object) -> np.ndarray:
        single = isinstance(texts, str)
        blocks = [b.vectors for b in self.stream([texts] if single else texts, **choices)]
        dimensions = choices.get("dimensions") or DIM
        vectors = np.concatenate([np.empty((0, dimensions), np.float32), *blocks])
        return vectors[0] if single else vectors

    def encode_query(self, text: str) -> np.ndarray:
        return self.encode(text, prompt=self.prompt("query"))

    def stream(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: str = "error",
        on_progress: Progress | None = None,
    ) -> Iterator[Block]:
        if dimensions is not None and dimensions > DIM:
            raise BadOption(f"dimensions={dimensions}: fake has {DIM}")
        iterator, start = iter(texts), 0
        too_long: list[tuple[int, int]] = []
        while chunk := list(islice(iterator, WINDOW)):
            chunk = [(prompt or "") + text for text in chunk]
            counts = self.count_tokens(chunk)
            too_long += [(start + i, n) for i, n in enumerate(counts) if n > self.n_ctx]
            if not too_long or truncate != "error":
                vectors = np.stack([_vector(text) for text in chunk])[:, :dimensions]
                if normalize:
                    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
                if on_progress:
                    on_progress(len(chunk), sum(counts))
                yield Block(
                    start=start,
                    vectors=vectors,
                    token_counts=np.minimum(counts, self.n_ctx).astype(np.int32),
                    truncated=np.array(counts) > self.n_ctx,
                )
            start += len(chunk)
        if too_long and truncate == "error":
            raise TextTooLong(too_long, self.n_ctx)


def _vector(text: str) -> np.ndarray:
    vector = np.zeros(DIM, np.float32)
    for word in text.lower().split():
        vector[crc32(word.encode()) % DIM] += 1
    return vector


if __name__ == "__main__":
    options.open_embedder = FakeEmbedder  # type: ignore[assignment]
    sys.exit(cli.main())
