"""From token vectors to one vector: pool, cut (MRL), normalize. Pure numpy."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadOption

Vectors: TypeAlias = npt.NDArray[np.float32]

_LEAST_NORM = float(np.finfo(np.float32).tiny)


class Pooling(IntEnum):
    """How token vectors become one vector; numbers as in GGUF `{arch}.pooling_type`."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4


def output_mask(lengths: npt.NDArray[np.int32], pooling: Pooling) -> npt.NDArray[np.int8]:
    """1 for each token whose vector `pool` needs, in a row of sequences laid end to end."""
    ends = np.cumsum(lengths)
    mask = np.zeros(int(ends[-1]), np.int8)
    match pooling:
        case Pooling.LAST:
            mask[ends - 1] = 1
        case Pooling.CLS:
            mask[ends - lengths] = 1
        case _:
            mask[:] = 1
    return mask


def pool(outputs: Vectors, lengths: npt.NDArray[np.int32], pooling: Pooling) -> Vectors:
    """One vector per sequence, shape (len(lengths), dim), from the outputs of `output_mask`.

    MEAN sums in float64: 32k float32 terms would lose two digits.
    """
    if pooling is not Pooling.MEAN:
        return outputs
    starts = np.cumsum(lengths) - lengths
    sums = np.add.reduceat(outputs, starts, axis=0, dtype=np.float64)
    return (sums / lengths[:, None]).astype(np.float32)


def finish(vectors: Vectors, *, dimensions: int | None, normalize: bool) -> Vectors:
    """Cut to the first `dimensions` values (MRL), then scale to length 1; float32, shape (n, dim).

    The cut comes first because a prefix of a unit vector is no unit vector.
    """
    cut = vectors if dimensions is None else vectors[:, :dimensions]
    if not normalize:
        return np.ascontiguousarray(cut)
    norms = np.sqrt(np.einsum("nd,nd->n", cut, cut, dtype=np.float64))[:, None]
    return (cut / np.maximum(norms, _LEAST_NORM)).astype(np.float32)


def unusable(vectors: Vectors) -> npt.NDArray[np.intp]:
    """The rows that have no direction: a value that is not finite, or no length."""
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return np.nonzero(~((squares > 0) & (squares < np.inf)))[0]


def least_cosine(a: Vectors, b: Vectors) -> float:
    """Of each row of `a` to the same row of `b`, the least; NaN where one has no direction.

    Compare it so that NaN fails: `not least_cosine(a, b) >= tolerance(types)`.
    """
    left, right = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        return float((np.einsum("nd,nd->n", left, right) / norms).min())


def is_trained_cut(
    dimensions: int | None, *, dim: int, mrl_min: int | None, mrl_dims: tuple[int, ...]
) -> bool:
    """Whether vectors of this length are known to be what the model was trained to give."""
    return dimensions is None or dimensions >= dim or mrl_min is not None or bool(mrl_dims)


def check_dimensions(
    dimensions: int | None, *, dim: int, mrl_min: int | None, mrl_dims: tuple[int, ...]
) -> None:
    """Refuse a cut that the model was not trained for; `mrl_min` None means unknown, so allowed."""
    if dimensions is None or dimensions == dim:
        return
    if not 1 <= dimensions <= dim:
        raise BadOption(f"dimensions={dimensions}: this model has vectors of 1 to {dim} values")
    if mrl_dims and dimensions not in mrl_dims:
        shown = ", ".join(map(str, mrl_dims))
        raise BadOption(
            f"dimensions={dimensions}: this model can be cut to {shown} or left at {dim}"
        )
    if not mrl_dims and mrl_min is not None and dimensions < mrl_min:
        raise BadOption(f"dimensions={dimensions}: this model can be cut to {mrl_min}..{dim}")
