"""Sentences in seven languages, written for this project: does a model find translations?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from gguf_embed.lab.metrics import rank
from gguf_embed.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Sentences with their translations: `sentences[language][i]` all say the same."""

    sentences: Mapping[str, tuple[str, ...]]  # by language code: en, zh, ar, hi, ru, es, de

    @property
    def texts(self) -> tuple[str, ...]:
        """All sentences, language after language."""
        return tuple(text for column in self.sentences.values() for text in column)


def parallel_sentences() -> Parallel:
    """The sentences that ship with this package (data/parallel.tsv)."""
    lines = (files("gguf_embed") / "data" / "parallel.tsv").read_text("utf-8").splitlines()
    languages, *rows = (line.split("\t") for line in lines)
    columns = zip(*rows, strict=True)
    return Parallel(sentences=dict(zip(languages, columns, strict=True)))


def matching_accuracy(vectors: Vectors, languages: Sequence[str]) -> dict[tuple[str, str], float]:
    """Accuracy@1 from each language to each other: how often the nearest sentence is the right one.

    `vectors` has shape (languages x sentences, dim), in the order of `Parallel.texts`.
    """
    of = dict(zip(languages, np.split(vectors, len(languages)), strict=True))
    right = np.arange(len(vectors) // len(languages))
    return {
        (a, b): float((rank(of[a], of[b], k=1)[:, 0] == right).mean())
        for a in languages
        for b in languages
        if a != b
    }
