"""Pool, cut, normalize."""

from __future__ import annotations

import numpy as np
import pytest

from gguf_embed.errors import BadOption
from gguf_embed.vectors import (
    Pooling,
    check_dimensions,
    finish,
    is_trained_cut,
    output_mask,
    pool,
    unusable,
)

LENGTHS = np.array([3, 1, 2], np.int32)


@pytest.mark.parametrize(
    ("pooling", "mask"),
    [
        (Pooling.LAST, [0, 0, 1, 1, 0, 1]),
        (Pooling.CLS, [1, 0, 0, 1, 1, 0]),
        (Pooling.MEAN, [1, 1, 1, 1, 1, 1]),
        (Pooling.NONE, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_which_tokens_are_read(pooling: Pooling, mask: list[int]):
    assert output_mask(LENGTHS, pooling).tolist() == mask


def test_what_is_read_of_one_token_is_its_vector_already():
    outputs = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert pool(outputs, LENGTHS, Pooling.LAST) is outputs


def test_mean_is_over_each_sequence_alone():
    outputs = np.arange(12, dtype=np.float32).reshape(6, 2)
    expected = [outputs[:3].mean(0), outputs[3], outputs[4:].mean(0)]
    pooled = pool(outputs, LENGTHS, Pooling.MEAN)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def test_mean_of_many_tokens_keeps_its_digits():
    n = 32_768
    outputs = np.full((n, 1), 1.0001, np.float32)
    pooled = pool(outputs, np.array([n], np.int32), Pooling.MEAN)
    assert pooled[0, 0] == np.float32(1.0001)


def test_cut_comes_before_normalizing():
    vectors = np.array([[3.0, 4.0, 12.0]], np.float32)
    np.testing.assert_allclose(
        finish(vectors, dimensions=2, normalize=True), [[0.6, 0.8]], rtol=1e-6
    )
    np.testing.assert_array_equal(finish(vectors, dimensions=2, normalize=False), [[3.0, 4.0]])


def test_a_zero_vector_does_not_become_nan():
    assert np.isfinite(finish(np.zeros((1, 4), np.float32), dimensions=None, normalize=True)).all()


@pytest.mark.parametrize(
    ("dimensions", "mrl_min", "mrl_dims", "allowed"),
    [
        (None, None, (), True),
        (1024, None, (), True),
        (1025, None, (), False),
        (0, None, (), False),
        (32, 32, (), True),
        (31, 32, (), False),
        (256, None, (512, 256), True),
        (300, None, (512, 256), False),
    ],
)
def test_dimensions(
    dimensions: int | None, mrl_min: int | None, mrl_dims: tuple[int, ...], allowed: bool
):
    if allowed:
        check_dimensions(dimensions, dim=1024, mrl_min=mrl_min, mrl_dims=mrl_dims)
    else:
        with pytest.raises(BadOption, match=str(dimensions)):
            check_dimensions(dimensions, dim=1024, mrl_min=mrl_min, mrl_dims=mrl_dims)


@pytest.mark.parametrize(
    ("dimensions", "mrl_min", "mrl_dims", "trained"),
    [
        (None, None, (), True),
        (64, None, (), True),  # the full length is no cut
        (63, None, (), False),
        (63, 32, (), True),
        (32, None, (32,), True),
    ],
)
def test_a_cut_is_trained_where_the_card_says_so(
    dimensions: int | None, mrl_min: int | None, mrl_dims: tuple[int, ...], trained: bool
):
    assert is_trained_cut(dimensions, dim=64, mrl_min=mrl_min, mrl_dims=mrl_dims) == trained


def test_rows_without_a_direction_are_unusable():
    """Values as small and as large as float32 has are a direction: squares are float64."""
    bad, good = (np.nan, np.inf, -np.inf, 0.0), (1e-45, -1e-45, 3.4e38, -3.4e38, 1.0)
    rows = [[value, 0.0] for value in (*bad, *good)]
    assert unusable(np.array(rows, np.float32)).tolist() == [0, 1, 2, 3]
    assert unusable(np.array([[np.inf, -np.inf], [1, np.nan]], np.float32)).tolist() == [0, 1]
    assert unusable(np.empty((0, 3), np.float32)).tolist() == []
