"""BM25 of all passages for a question, as SQLite's FTS5 computes it, from what it has stored.

FTS5 looks every passage up anew for every question: 70 ms for 100,000 of them, where this takes 3
(benchmarks/LOG.md). What a word gives to each passage is kept between questions.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.index.facts import KnownFile
from gguf_embed.index.word_tables import WordTables
from gguf_embed.index.words import phrases

K1: Final = 1.2
B: Final = 0.75
LEAST_IDF: Final = 1e-6  # of a word that more than half of the passages have
# A word of more than this share of the passages tells none of them from the others.
COMMON_SHARE: Final = 5
COMMON_LEAST: Final = 50
MOST_KEPT: Final = 4 << 20  # numbers, of all words together: 8 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corpus:
    """Passages in the order of their ids."""

    ids: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]  # of their vectors; -1: none
    norms: npt.NDArray[np.float32]  # BM25's k1 times a passage's length in mean ones


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What a word gives to the passages that hold it."""

    rows: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


class WordScores:
    """Of one moment of an index; one thread at a time."""

    def __init__(self, tables: WordTables, files: Sequence[KnownFile], n_rows: int) -> None:
        """`files` are all that have passages, `n_rows` how many vectors there are."""
        self._tables = tables
        self._files = files
        self._n_rows = n_rows
        self._corpus: _Corpus | None = None
        self._common: dict[str, bool] = {}
        self._kept: OrderedDict[tuple[str, ...], _Weights] = OrderedDict()
        self._n_kept = 0

    def scores(self, question: str, ranges: Sequence[tuple[int, int]]) -> npt.NDArray[np.float32]:
        """BM25 by row, shape (n_rows,): 0 of rows without the words, and outside the ranges."""
        scores = np.zeros(self._n_rows, np.float32)
        asked = phrases(question)
        rare = [phrase for phrase in asked if not self._is_common(phrase)]
        for stems in self._tables.stems(rare or asked):
            if stems:
                found = self._weights(stems)
                scores[found.rows] += found.weights
        chosen = np.zeros(self._n_rows, np.bool_)
        for start, stop in ranges:
            chosen[start:stop] = True
        scores[~chosen] = 0
        return scores

    def _is_common(self, phrase: str) -> bool:
        if phrase not in self._common:
            n_passages = sum(file.n_rows for file in self._files)
            limit = max(n_passages // COMMON_SHARE, COMMON_LEAST)
            self._common[phrase] = self._tables.has_more(phrase, limit)
        return self._common[phrase]

    def _weights(self, stems: tuple[str, ...]) -> _Weights:
        if stems in self._kept:
            self._kept.move_to_end(stems)
            return self._kept[stems]
        made = self._weighed(self._tables.holders(stems))
        self._kept[stems] = made
        self._n_kept += len(made.rows)
        while self._n_kept > MOST_KEPT and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._n_kept -= len(oldest.rows)
        return made

    def _weighed(self, holders: npt.NDArray[np.int64]) -> _Weights:
        if self._corpus is None:
            self._corpus = self._read()
        corpus = self._corpus
        ids, counts = np.unique(holders, return_counts=True)
        at = np.searchsorted(corpus.ids, ids)
        n, n_all = len(ids), len(corpus.ids)
        idf = max(math.log((n_all - n + 0.5) / (n + 0.5)), LEAST_IDF) if n else 0.0
        weights = idf * counts * (K1 + 1) / (counts + corpus.norms[at])
        rows = corpus.rows[at]
        return _Weights(rows=rows[rows >= 0], weights=weights[rows >= 0].astype(np.float32))

    def _read(self) -> _Corpus:
        lengths = self._tables.lengths()
        ids, files, ordinals = self._tables.places()
        first_rows = {file.id: file.first_row for file in self._files}
        known, inverse = np.unique(files, return_inverse=True)
        firsts = np.array([first_rows.get(int(file), -1) for file in known], np.int64)[inverse]
        rows = np.full(len(lengths.ids), -1, np.int32)
        rows[np.searchsorted(lengths.ids, ids)] = np.where(firsts < 0, -1, firsts + ordinals)
        mean = max(float(lengths.n_words.mean()), 1.0) if len(lengths.ids) else 1.0
        norms = K1 * (1 - B + B * lengths.n_words / mean)
        return _Corpus(ids=lengths.ids, rows=rows, norms=norms.astype(np.float32))
