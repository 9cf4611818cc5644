"""The nearest passages: those of a full product, found through the coarse copy."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.errors import NativeFailed
from gguf_embed.index import coarse
from gguf_embed.index.coarse import CoarseRows, coarse_copy
from gguf_embed.index.nearness import Nearness, may_be_best
from gguf_embed.index.ranking import best_rows
from gguf_embed.index.vector_file import VectorFile, joined
from gguf_embed.vectors import Vectors

seeds = st.integers(0, 2**32 - 1)


def unit_rows(n: int, dim: int, seed: int) -> Vectors:
    """Vectors of a cone, so that many are near; some equal, some of length 0."""
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    vectors += vectors[:1] * 2
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[3::7] = vectors[0]
    vectors[5::11] = 0
    return vectors


def some_ranges(n: int, seed: int) -> list[tuple[int, int]]:
    """All rows, or some."""
    used = np.random.default_rng(seed).random(n) < (1 if seed % 3 == 0 else 0.5)
    return joined([(row, row + 1) for row in np.flatnonzero(used).tolist()])


@pytest.mark.native
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.sampled_from([32, 64, 384]), st.integers(1, 20), seeds)
def test_the_nearest_are_those_of_the_full_product(n_rows: int, dim: int, n: int, seed: int):
    vectors, ranges = unit_rows(n_rows, dim, seed), some_ranges(n_rows, seed)
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    inside = [row for start, stop in ranges for row in range(start, stop)]
    question = unit_rows(2, dim, seed + 1)[1]
    bonus = None
    if seed % 2:
        bonus = np.random.default_rng(seed).random(n_rows, np.float32) * np.float32(0.5)
    with tempfile.TemporaryDirectory() as folder:
        file = VectorFile(Path(folder) / "vectors.f32", dim)
        file.append(vectors[: n_rows // 2], 0)
        file.append(vectors[n_rows // 2 :], n_rows // 2)
        near = Nearness(file, n_rows, least_rows=1).near(question, ranges, n, bonus)
    assert np.isin(near.rows, inside).all()
    exact = vectors.astype(np.float64) @ question
    np.testing.assert_allclose(near.cosines, exact[near.rows], atol=1e-6)
    sums = near.cosines if bonus is None else near.cosines + bonus[near.rows]
    found = near.rows[best_rows(sums, n)]
    wanted = exact if bonus is None else exact + bonus
    best = sorted(wanted[inside], reverse=True)[:n]
    np.testing.assert_allclose(sorted(wanted[found], reverse=True), best, atol=1e-6)


@pytest.mark.native
def test_few_rows_are_multiplied_where_many_are_far(tmp_path: Path):
    vectors = unit_rows(4096, 384, 1)
    file = VectorFile(tmp_path / "vectors.f32", 384)
    file.append(vectors, 0)
    nearness = Nearness(file, 4096, least_rows=1)
    near = nearness.near(vectors[8], [(0, 4096)], 10)
    assert 10 <= len(near.rows) < 1024
    assert near.rows[best_rows(near.cosines, 1)].tolist() == [8]
    again = nearness.near(vectors[9], [(0, 4096)], 10)
    assert again.rows[best_rows(again.cosines, 1)].tolist() == [9]
    assert len(nearness.near(vectors[8], [(0, 4096)], 4096).rows) == 4096


@pytest.mark.native
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), seeds, st.sampled_from([1.0, 1e-6, 37.0]))
def test_cosines_are_within_their_bounds(n_rows: int, seed: int, length: float):
    vectors = unit_rows(n_rows, 96, seed)
    vectors[1::4, :64] *= 1e-7  # scales below what float16 holds
    question = (unit_rows(1, 96, seed + 5)[0] * length).astype(np.float32)
    question[:32] *= 1e-7
    raw, far = coarse_copy(vectors)
    room = np.zeros(raw.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    rows = room[start : start + raw.nbytes].reshape(raw.shape)
    rows[:] = raw
    made = CoarseRows.of(rows, far)
    assert made is not None
    cosines, off = made.bounds(question)
    apart = np.abs(cosines.astype(np.float64) - vectors.astype(np.float64) @ question)
    assert (apart <= off).all(), (apart - off).max()
    assert (off <= 0.04 * max(length, 1)).all()


def test_a_coarse_copy_that_is_missing_is_made(tmp_path: Path):
    vectors = unit_rows(9, 32, 4)
    file = VectorFile(tmp_path / "vectors.f32", 32)
    file.append(vectors[:6], 0)
    whole = [(tmp_path / name).read_bytes() for name in ("coarse.q8_0", "coarse.f32")]
    assert [len(each) for each in whole] == [6 * 34, 6 * 4]
    (tmp_path / "coarse.f32").write_bytes(whole[1][:8])
    assert file.coarse(6) is None
    (tmp_path / "coarse.q8_0").write_bytes(whole[0][:100])
    (tmp_path / "coarse.f32").unlink()
    assert file.coarse(6) is None
    near = Nearness(file, 6, least_rows=1).near(vectors[2], [(0, 6)], 1)
    assert len(near.rows) == 6
    file.append(vectors[6:], 6)
    assert (tmp_path / "coarse.q8_0").read_bytes()[: 6 * 34] == whole[0]
    assert (tmp_path / "coarse.f32").read_bytes()[: 6 * 4] == whole[1]
    assert (tmp_path / "coarse.f32").stat().st_size == 9 * 4


def test_vectors_of_other_lengths_have_none(tmp_path: Path):
    file = VectorFile(tmp_path / "vectors.f32", 3)
    file.append(np.eye(3, dtype=np.float32), 0)
    assert file.coarse(3) is None
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.f32"]


def test_without_ggml_all_rows_are_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(rows: object) -> object:
        raise NativeFailed("none here")

    monkeypatch.setattr(coarse, "Products", fail)
    vectors = unit_rows(100, 32, 4)
    file = VectorFile(tmp_path / "vectors.f32", 32)
    file.append(vectors, 0)
    assert len(Nearness(file, 100, least_rows=1).near(vectors[2], [(0, 100)], 1).rows) == 100


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(1, 9), seeds)
def test_none_of_the_best_is_left_out(values: list[int], n: int, seed: int):
    true = np.float32(values)
    off = np.random.default_rng(seed).random(len(values), np.float32) * 4
    scores = true + off * np.random.default_rng(seed + 1).uniform(-1, 1, len(values)).astype("f4")
    ranges = some_ranges(len(values), seed)
    inside = [row for start, stop in ranges for row in range(start, stop)]
    kept = may_be_best(scores, off + np.float32(1e-5), n, ranges)
    best = sorted(true[inside], reverse=True)[:n]
    assert sorted(true[kept], reverse=True)[:n] == best
