"""What scripts take from `sentence_transformers.util`, on arrays: the same names, the same answers.

Arrays come out where arrays go in, PyTorch's tensors where tensors go in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from gguf_embed.errors import BadInput, BadOption, shown
from gguf_embed.vectors import Vectors

Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
Compare: TypeAlias = Callable[[Any, Any], Any]

_OTHERS: Final = (
    "gguf_embed has no util.{name}; install sentence-transformers and use its own util with these "
    "vectors"
)


def __getattr__(name: str) -> object:
    raise AttributeError(_OTHERS.format(name=name))


def is_tensor(value: object) -> bool:
    """Whether it is one of PyTorch's; asks nothing where PyTorch is not imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_tensor(array: npt.NDArray[Any]) -> Any:
    """PyTorch's tensor of an array. Raises BadOption without PyTorch."""
    try:
        torch = import_module("torch")
    except ImportError:
        raise BadOption(
            "convert_to_tensor needs PyTorch, which is not installed; leave it out for an array"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(array))


def matrix(vectors: Any) -> Vectors:
    """Vectors as they come, as float32 of shape (n, dim)."""
    if isinstance(vectors, (list, tuple)):
        given = cast("Sequence[Any]", vectors)
        vectors = [_array(each) for each in given]
    array = np.atleast_2d(np.asarray(_array(vectors), np.float32))
    if array.ndim != 2:
        raise BadInput(f"vectors are an array of shape {array.shape}; pass (n, dim) or (dim,)")
    return array


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if is_tensor(value) else value


def _like(result: Vectors, *given: Any) -> Any:
    return as_tensor(result) if any(map(is_tensor, given)) else result


def _unit(vectors: Any) -> Vectors:
    rows = matrix(vectors)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, 1e-12)


def normalize_embeddings(embeddings: Any) -> Any:
    """Each vector scaled to length 1."""
    return _like(_unit(embeddings), embeddings)


def cos_sim(a: Any, b: Any) -> Any:
    """Cosine of each row with each row, shape (n, m)."""
    return _like(_unit(a) @ _unit(b).T, a, b)


def dot_score(a: Any, b: Any) -> Any:
    """Dot product of each row with each row, shape (n, m)."""
    return _like(matrix(a) @ matrix(b).T, a, b)


def euclidean_sim(a: Any, b: Any) -> Any:
    """Distance of each row to each row, negative, shape (n, m)."""
    left, right = matrix(a), matrix(b)
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    return _like(-np.sqrt(np.maximum(squares, 0)), a, b)


def manhattan_sim(a: Any, b: Any) -> Any:
    """Sum of the differences of each row and each row, negative, shape (n, m)."""
    left, right = matrix(a), matrix(b)
    rows = [-np.abs(right - row).sum(1) for row in left]
    return _like(np.array(rows, np.float32).reshape(len(left), len(right)), a, b)


def pairwise_cos_sim(a: Any, b: Any) -> Any:
    """Cosine of each row with the same row, shape (n,)."""
    return _like(np.einsum("nd,nd->n", _unit(a), _unit(b)), a, b)


def pairwise_dot_score(a: Any, b: Any) -> Any:
    """Dot product of each row with the same row, shape (n,)."""
    return _like(np.einsum("nd,nd->n", matrix(a), matrix(b)), a, b)


def pairwise_euclidean_sim(a: Any, b: Any) -> Any:
    """Distance of each row to the same row, negative, shape (n,)."""
    return _like(-np.linalg.norm(matrix(a) - matrix(b), axis=1), a, b)


def pairwise_manhattan_sim(a: Any, b: Any) -> Any:
    """Sum of the differences of each row and the same row, negative, shape (n,)."""
    return _like(-np.abs(matrix(a) - matrix(b)).sum(1), a, b)


SIMILARITIES: Final[dict[str, tuple[Compare, Compare]]] = {
    "cosine": (cos_sim, pairwise_cos_sim),
    "dot": (dot_score, pairwise_dot_score),
    "euclidean": (euclidean_sim, pairwise_euclidean_sim),
    "manhattan": (manhattan_sim, pairwise_manhattan_sim),
}


def semantic_search(
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500_000,
    top_k: int = 10,
    score_function: Compare = cos_sim,
) -> list[list[dict[str, int | float]]]:
    """For each query the `top_k` rows of the corpus, the best first: corpus_id and score."""
    queries, corpus = matrix(query_embeddings), matrix(corpus_embeddings)
    found: list[list[dict[str, int | float]]] = []
    for at in range(0, len(queries), query_chunk_size):
        some = queries[at : at + query_chunk_size]
        best_ids = np.empty((len(some), 0), np.int64)
        best = np.empty((len(some), 0), np.float32)
        for start in range(0, len(corpus), corpus_chunk_size):
            part = corpus[start : start + corpus_chunk_size]
            scores = np.asarray(score_function(some, part), np.float32)
            ids = np.broadcast_to(np.arange(start, start + len(part)), scores.shape)
            best = np.concatenate([best, scores], axis=1)
            best_ids = np.concatenate([best_ids, ids], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :top_k]
            best = np.take_along_axis(best, order, axis=1)
            best_ids = np.take_along_axis(best_ids, order, axis=1)
        found += [
            [{"corpus_id": int(i), "score": float(s)} for i, s in zip(ids, scores, strict=True)]
            for ids, scores in zip(best_ids, best, strict=True)
        ]
    return found


def community_detection(
    embeddings: Any,
    threshold: float = 0.75,
    min_community_size: int = 10,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[list[int]]:
    """Groups of rows that are near one of them, the largest first; a row is in one at most.

    The first row of a group is its centre.
    """
    rows = _unit(embeddings)
    least = min(min_community_size, len(rows))
    groups: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        for near in rows[start : start + batch_size] @ rows.T:
            if int((near >= threshold).sum()) >= least:
                order = np.argsort(-near, kind="stable")
                groups.append([int(row) for row in order if near[row] >= threshold])
    taken: set[int] = set()
    found: list[list[int]] = []
    for group in sorted(groups, key=len, reverse=True):
        free = [row for row in group if row not in taken]
        if len(free) >= least:
            found.append(free)
            taken.update(free)
    return sorted(found, key=len, reverse=True)


def paraphrase_mining(
    model: Any,
    sentences: Sequence[str],
    show_progress_bar: bool = False,
    batch_size: int = 32,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100_000,
    max_pairs: int = 500_000,
    top_k: int = 100,
    score_function: Compare = cos_sim,
) -> list[list[float | int]]:
    """Pairs of like sentences, the likest first: [score, row, row]."""
    vectors = model.encode(sentences, show_progress_bar=show_progress_bar, batch_size=batch_size)
    return paraphrase_mining_embeddings(
        vectors, query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function
    )


def paraphrase_mining_embeddings(
    embeddings: Any,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100_000,
    max_pairs: int = 500_000,
    top_k: int = 100,
    score_function: Compare = cos_sim,
) -> list[list[float | int]]:
    """The same of vectors."""
    found = semantic_search(
        embeddings, embeddings, query_chunk_size, corpus_chunk_size, top_k + 1, score_function
    )
    pairs: dict[tuple[int, int], float] = {}
    for row, hits in enumerate(found):
        for hit in hits:
            other = int(hit["corpus_id"])
            if other != row:
                pairs.setdefault((min(row, other), max(row, other)), float(hit["score"]))
    best = sorted(pairs.items(), key=lambda pair: -pair[1])[:max_pairs]
    return [[score, *rows] for rows, score in best]


def quantize_embeddings(
    embeddings: Any,
    precision: Precision,
    ranges: npt.ArrayLike | None = None,
    calibration_embeddings: Any = None,
) -> npt.NDArray[Any]:
    """Vectors in less: of `sentence_transformers.quantization`, by its rule.

    int8 and uint8 share out the range of each dimension: `ranges` of shape (2, dim), else that of
    `calibration_embeddings`, else of these vectors. binary and ubinary keep a bit for each value.
    """
    if precision not in PRECISIONS:
        raise BadOption(f"precision={shown(precision)}: choose {', '.join(PRECISIONS)}")
    vectors = matrix(embeddings)
    if precision == "float32":
        return vectors
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        rows = vectors if calibration_embeddings is None else matrix(calibration_embeddings)
        if len(vectors) == 1 and calibration_embeddings is None:
            raise BadOption(
                f"precision={precision!r}: one vector has no range to share out; embed several "
                "together, or call quantize_embeddings with ranges"
            )
        ranges = np.vstack([rows.min(axis=0, initial=np.inf), rows.max(axis=0, initial=-np.inf)])
    least, most = np.asarray(ranges, np.float32)
    if not len(vectors):
        return np.empty(vectors.shape, np.uint8 if precision == "uint8" else np.int8)
    steps = (most - least) / np.float32(255)
    codes = np.clip(np.floor((vectors - least) / np.where(steps == 0, 1, steps)), 0, 255)
    return codes.astype(np.uint8) if precision == "uint8" else (codes - 128).astype(np.int8)
