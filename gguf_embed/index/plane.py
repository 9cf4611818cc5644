"""Vectors on a plane, so that what is near stays near: for maps. Pure, the same for the same input.

Rows begin at their two principal components. Then neighbours draw one another near and others push
apart, as UMAP has it. Distances on the map between far groups mean little.
"""

from __future__ import annotations

from typing import Final, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.vectors import Vectors

NEIGHBOURS: Final = 12
EPOCHS: Final = 200
OTHERS: Final = 4  # that push, for each neighbour that draws
_BLOCK: Final = 1024  # rows whose products are held at a time
# UMAP's curve for points that may lie 0.1 apart.
_A: Final = 1.577
_B: Final = 0.895
_STEP: Final = 4.0  # that a row may be moved at one time

Points = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]


def on_plane(vectors: Vectors, *, seed: int = 0) -> Points:
    """A point for each row, shape (n, 2), from -1 to 1."""
    points = principal(vectors)
    if len(vectors) > NEIGHBOURS + 1:
        points = _drawn(points * 10, neighbours(vectors, NEIGHBOURS), np.random.default_rng(seed))
    if len(points):
        points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    return (points / max(float(np.abs(points).max(initial=0)), 1e-9)).astype(np.float32)


def principal(vectors: Vectors) -> Points:
    """The two principal components, from about -1 to 1."""
    if len(vectors) < 2:
        return np.zeros((len(vectors), 2), np.float32)
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    axes = axes[:, ::-1][:, :2]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # else the sign is by chance
    points = centred @ axes.astype(np.float32)
    return points / max(float(np.abs(points).max()), 1e-9)


def neighbours(vectors: Vectors, k: int) -> Rows:
    """The nearest rows of each but itself, shape (n, k), in no order."""
    found = np.empty((len(vectors), k), np.intp)
    for first in range(0, len(vectors), _BLOCK):
        products = vectors[first : first + _BLOCK] @ vectors.T
        rows = np.arange(len(products))
        products[rows, rows + first] = -2
        found[first : first + _BLOCK] = np.argpartition(-products, k - 1, axis=1)[:, :k]
    return found


def _drawn(points: Points, near: Rows, chance: np.random.Generator) -> Points:
    n, k = cast("tuple[int, int]", near.shape)
    heads: Rows = np.arange(n * k, dtype=np.intp) // k
    tails: Rows = near.ravel()
    points = points + chance.normal(0, 1e-3, points.shape).astype(np.float32)  # equal rows part
    for epoch in range(EPOCHS):
        step = np.float32(1 - epoch / EPOCHS)
        apart = points[heads] - points[tails]
        square = (apart**2).sum(axis=1) + 1e-6
        pull = -2 * _A * _B * square ** (_B - 1) / (1 + _A * square**_B)
        moved = np.clip(apart * pull[:, None], -_STEP, _STEP)
        change = _summed(heads, moved, n) - _summed(tails, moved, n)
        for _ in range(OTHERS):
            others = cast("Rows", chance.integers(0, n, n))
            apart = points - points[others]
            square = (apart**2).sum(axis=1) + 1e-6
            push = 2 * _B / ((0.001 + square) * (1 + _A * square**_B))
            change += k * np.clip(apart * push[:, None], -_STEP, _STEP)
        points = (points + step * np.clip(change / k, -_STEP, _STEP)).astype(np.float32)
    return points


def _summed(rows: Rows, values: Points, n: int) -> npt.NDArray[np.float64]:
    """The sum of the values of each row, shape (n, 2)."""
    sums: npt.NDArray[np.float64] = np.empty((n, 2))
    for axis in (0, 1):
        sums[:, axis] = np.bincount(rows, weights=values[:, axis], minlength=n)
    return sums
