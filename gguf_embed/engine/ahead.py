"""What is loaded of a model while something else goes on, in threads that end.

Its vocabulary is read while llama.cpp loads. The weights are loaded while a child still tries the
accelerator: the file itself is proved by then.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gguf_embed.engine.tokenizer import read_words
from gguf_embed.engine.wordpiece import WordPiece
from gguf_embed.gguf.header import Header
from gguf_embed.native.model import Model
from gguf_embed.system.closing import Closes


class Ahead(Closes):
    """Of one file; closing frees what nobody has taken."""

    def __init__(self) -> None:
        """Nothing is begun yet."""
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="gguf-embed-ahead")
        self._words: Future[WordPiece | None] | None = None
        self._weights: Future[Model] | None = None

    def begin(self, path: Path, header: Header) -> None:
        """Load the weights as they lie in the file, and the words. Only of a file that is proved.

        That is how the accelerator takes them: what needs them otherwise loads them again.
        """
        self.read_words(path, header)
        self._weights = self._threads.submit(Model, path, repack=False)

    def read_words(self, path: Path, header: Header) -> None:
        """Begin to read what `words` gives."""
        if self._words is None:
            self._words = self._threads.submit(read_words, path, header)

    def words(self) -> WordPiece | None:
        """See `read_words` of engine/tokenizer.py."""
        assert self._words, "begun"
        return self._words.result()

    def take(self, *, n_gpu_layers: int, repack: bool) -> Model | None:
        """The model, which is then the caller's to close; None where it is not loaded so."""
        weights = self._weights
        if weights is None or n_gpu_layers or repack or weights.exception() is not None:
            return None
        self._weights = None
        return weights.result()

    def close(self) -> None:
        """Wait for what was begun."""
        self._threads.shutdown()
        if self._weights is not None and self._weights.exception() is None:
            self._weights.result().close()
        self._weights = None
