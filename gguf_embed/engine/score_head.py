"""From the vector of a pair to its score: the last layer of a reranker, in numpy.

llama.cpp can compute it too, but only in contexts of its own kind, which share no prefix and
compute the language-model head of every token. So the layers run as an embedder's, and what is left
is a product with one row or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_embed.gguf.header import Header
from gguf_embed.native.weights import read_rows
from gguf_embed.plan.reranker import DENSE, RerankForm
from gguf_embed.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreHead:
    """The weights; float32 values, computed in float64."""

    row: npt.NDArray[np.float64]  # (dim,)
    bias: float = 0.0
    dense: npt.NDArray[np.float64] | None = None  # (dim, dim), then a tanh
    dense_bias: npt.NDArray[np.float64] | float = 0.0

    def logits(self, vectors: Vectors) -> Vectors:
        """One number per vector of shape (n, dim); its logistic is the score."""
        values = vectors.astype(np.float64)
        if self.dense is not None:
            values = np.tanh(values @ self.dense.T + self.dense_bias)
        return (values @ self.row + self.bias).astype(np.float32)


def read_head(
    path: Path, header: Header, form: RerankForm, token_of: Callable[[str], int]
) -> ScoreHead:
    """The head of a file; `token_of` gives the ids of words. Raises BadModelFile.

    Of two rows, "yes" and "no", the difference is taken: the probability of two logits is the
    logistic of it.
    """
    rows = (token_of("yes"), token_of("no")) if form.rows is None else form.rows
    output = read_rows(path, header, form.output, rows).astype(np.float64)
    if not form.dense:
        return ScoreHead(row=output[0] - output[1])

    def bias_of(name: str) -> npt.NDArray[np.float64]:
        if header.tensor(name) is None:
            return np.zeros(1)
        return read_rows(path, header, name)[0].astype(np.float64)

    return ScoreHead(
        row=output[0],
        bias=float(bias_of(form.output.replace(".weight", ".bias"))[0]),
        dense=read_rows(path, header, DENSE).astype(np.float64),
        dense_bias=bias_of(DENSE.replace(".weight", ".bias")),
    )


def logistic(logits: Vectors) -> Vectors:
    """1 / (1 + e^-x), between 0 and 1 also where e^-x is beyond all numbers."""
    values = logits.astype(np.float64)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
