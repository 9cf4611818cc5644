"""Are two sets of vectors of the same texts one vector space? Pure, but for reading .npy files.

    comparison = compare(a, b)     # a, b: (n texts, dim)
    comparison.verdict             # "yes", "close" or "no"

The thresholds were set with all-MiniLM-L6-v2, where the answers are known. Ranges over three sets
of texts (125 English sentences, the same in seven languages, 400 docstrings):

    F16 against          cosine p1      overlap@10
    F32                  1.000          1.00           yes
    Q8_0                 0.999          0.97-0.98      yes
    Q5_K_M               0.982-0.991    0.91-0.94      close
    Q4_0                 0.907-0.946    0.81-0.85      close
    "query: " in front   0.66-0.81      0.71-0.79      no
    CLS for MEAN pooling 0.22-0.30      0.28-0.48      no
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput
from gguf_embed.lab.metrics import CosineStats, cosine_stats, neighbours, overlap, spearman
from gguf_embed.vectors import Vectors, finish

Verdict: TypeAlias = Literal["yes", "close", "no"]

N_NEIGHBOURS: Final = 10
# Below this, ten neighbours are a large part of all texts and agree by themselves.
MIN_TEXTS: Final = 30
# Enough for steady figures; the cosines of all pairs are held at one time.
MAX_TEXTS: Final = 2000

# (1st percentile of the cosines, mean overlap@10): both must be reached.
SAME: Final = (0.995, 0.95)
CLOSE: Final = (0.85, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far two sets of vectors agree.

    `overlap` is the mean share of a text's ten neighbours that both find, `rank_correlation` the
    mean Spearman of a text's cosines with all others; each set is ranked by itself.
    """

    verdict: Verdict
    why: str
    n_texts: int
    dims: tuple[int, int]
    cosine: CosineStats
    overlap: float
    rank_correlation: float


def compare(a: Vectors, b: Vectors) -> Comparison:
    """The verdict on vectors of the same texts, row by row; both need at least MIN_TEXTS rows.

    Where the dimensions differ, the longer vectors are cut to the shorter, as a Matryoshka model
    would cut them.
    """
    n, dims = len(a), (a.shape[1], b.shape[1])
    if n != len(b) or n < MIN_TEXTS:
        raise BadInput(
            f"{n} and {len(b)} vectors: the same texts are needed on both sides, at least "
            f"{MIN_TEXTS} of them"
        )
    a, b = (finish(one, dimensions=min(dims), normalize=True) for one in (a, b))
    cosine = cosine_stats(a, b)
    nearest = (neighbours(one, k=N_NEIGHBOURS) for one in (a, b))
    shared = float(overlap(*nearest).mean())
    others = ~np.eye(n, dtype=np.bool_)
    to_others = ((one @ one.T)[others].reshape(n, n - 1) for one in (a, b))
    verdict, why = _judge(cosine.p1, shared, dims)
    return Comparison(
        verdict=verdict,
        why=why,
        n_texts=n,
        dims=dims,
        cosine=cosine,
        overlap=shared,
        rank_correlation=float(spearman(*to_others).mean()),
    )


def _judge(p1: float, shared: float, dims: tuple[int, int]) -> tuple[Verdict, str]:
    cut = ""
    if dims[0] != dims[1]:
        longer = "AB"[dims[1] > dims[0]]
        cut = f"once {longer} is cut to its first {min(dims)} values and normalized again, "

    def reached(limits: tuple[float, float]) -> bool:
        return p1 >= limits[0] and shared >= limits[1]

    if reached(SAME):
        return "yes", f"{cut}one vector space: A and B can stand in one index"
    others = f"of ten neighbours {10 * (1 - shared):.1f} are others"
    if reached(CLOSE):
        return "close", f"{cut}nearly one vector space, but {others}; embed again where that counts"
    if cut:
        return "no", f"{dims[0]} and {dims[1]} dimensions, and cut to {min(dims)} they differ too"
    if shared >= CLOSE[1]:
        turned = "each ranks much as the other does, but the same text gets another vector"
        return "no", f"{turned} (cosine {p1:.2f} at the 1st percentile); embed again with one"
    return "no", f"another vector space: {others}; embed again with one of the two"


def evenly(n: int, most: int = MAX_TEXTS) -> npt.NDArray[np.intp]:
    """At most `most` of the positions 0..n-1, evenly spaced; all of them where they are fewer."""
    return np.arange(n) if n <= most else np.arange(most) * n // most


# --------------------------------------------------------------------------- stored vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A .npy file: its shape, what made it (NAME.npy.meta.json; empty where that is missing)."""

    path: Path
    shape: tuple[int, int]
    about: Mapping[str, object]

    def rows(self, places: npt.NDArray[np.intp]) -> Vectors:
        """The rows at `places`, float32; raises BadInput for one that is no direction."""
        rows = np.asarray(_open(self.path)[places], np.float32)
        norms = np.linalg.norm(rows, axis=1)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            raise BadInput(
                f"{self.path}: row {places[bad[0]]} is zero or not finite; embed its text again"
            )
        return rows


def stored(path: Path) -> Stored:
    """What is in a .npy file that `gguf-embed embed` wrote; raises BadInput."""
    array = _open(path)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or not array.shape[1]:
        raise BadInput(
            f"{path}: an array of {array.dtype} of shape {array.shape}; vectors are floating-point "
            "numbers of shape (texts, dimensions)"
        )
    meta = path.with_name(path.name + ".meta.json")
    about: dict[str, object] = {}
    if meta.exists():
        try:
            about = cast("dict[str, object]", dict(json.loads(meta.read_text("utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{meta}: cannot be read: {error}; remove it or repair it") from error
        if about.get("texts", len(array)) != len(array):
            raise BadInput(
                f"{meta} describes {about['texts']} vectors, {path.name} holds {len(array)}; they "
                "do not belong together"
            )
    return Stored(path=path, shape=(array.shape[0], array.shape[1]), about=about)


def _open(path: Path) -> npt.NDArray[Any]:
    try:
        # Not np.load, which would open an archive of arrays as well.
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: no .npy file that can be read: {error}") from error
