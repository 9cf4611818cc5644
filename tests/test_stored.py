"""Vectors read back, and spaces that are not mixed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed import BadInput, read_vectors
from gguf_embed.io.record import Record
from gguf_embed.io.shards import LineShards, ParquetShards, Rows
from gguf_embed.io.vector_packing import pack, unpack, width
from gguf_embed.io.vector_types import VECTOR_TYPES, VectorType
from gguf_embed.io.write import RowContent

ABOUT = {"fingerprint": "a" * 16, "model": "fake", "quant": "F32", "dim": 8}
VECTORS = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
VECTORS[2] = np.nan


def rows() -> Rows:
    records = [
        Record(id=f"r{i}", text="x", source="a.txt", position=i, last_position=i) for i in range(4)
    ]
    return Rows(records=records, vectors=VECTORS, truncated=[False] * 4)


def write(path: Path, vector_type: VectorType = "float32", **about: object) -> Path:
    made = {**ABOUT, "vector_type": vector_type, **about}
    if path.suffix == ".parquet":
        form = ParquetShards(
            dim=8,
            vector_type=vector_type,
            content=RowContent(text=True),
            chunks=True,
            kept=(),
            kept_types={},
            about=made,
        )
        path.write_bytes(form.encode(rows()))
        return path
    if path.suffix == ".npy":
        np.save(path, VECTORS)
    else:
        path.write_bytes(LineShards(content=RowContent()).encode(rows()))
    path.with_name(path.name + ".meta.json").write_text(json.dumps(made))
    return path


@pytest.mark.parametrize("name", ["v.parquet", "v.jsonl", "v.npy"])
def test_vectors_come_back(tmp_path: Path, name: str):
    path = write(tmp_path / name)
    (stored,) = read_vectors([path], fingerprint="a" * 16)
    np.testing.assert_array_equal(stored.vectors, VECTORS)
    assert stored.about["model"] == "fake"
    assert [*stored.ids] == (["0", "1", "2", "3"] if name == "v.npy" else ["r0", "r1", "r2", "r3"])


def test_the_same_rows_give_the_same_bytes(tmp_path: Path):
    one, two = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("vector_type", VECTOR_TYPES)
def test_types_of_vectors(tmp_path: Path, vector_type: VectorType):
    (stored,) = read_vectors([write(tmp_path / "v.parquet", vector_type)])
    assert np.isnan(stored.vectors[2]).all()
    kept = [0, 1, 3]
    if vector_type == "binary":
        np.testing.assert_array_equal(stored.vectors[kept] > 0, VECTORS[kept] > 0)
    else:
        np.testing.assert_allclose(stored.vectors[kept], VECTORS[kept], rtol=0, atol=0.02)
    empty = pack(np.empty((0, 8), np.float32), vector_type)
    assert unpack(empty, vector_type).shape == (0, 8)


values = st.floats(-1, 1, width=32)


@given(st.lists(st.lists(values, min_size=8, max_size=8), min_size=1, max_size=5))
def test_int8_is_off_by_half_a_step_at_most(rows: list[list[float]]):
    vectors = np.array(rows, np.float32)
    back = unpack(pack(vectors, "int8"), "int8")
    step = np.abs(vectors).max(axis=1) / 127
    assert (np.abs(back - vectors) <= 0.51 * step[:, None] + 1e-30).all()


def test_binary_vectors_are_whole_bytes():
    assert [width(16, each) for each in VECTOR_TYPES] == [16, 16, 16, 2]
    with pytest.raises(BadInput, match="no whole bytes"):
        width(12, "binary")


def test_two_spaces_are_refused_with_their_names(tmp_path: Path):
    one = write(tmp_path / "a.parquet")
    two = write(tmp_path / "b.jsonl", fingerprint="b" * 16, model="other")
    said = r"b\.jsonl: is of the vector space b{16} \(other F32\), not of a{16} as .*a\.parquet"
    with pytest.raises(BadInput, match=said):
        [*read_vectors([one, two])]
    with pytest.raises(BadInput, match=r"is of the vector space a{16}"):
        [*read_vectors([one], fingerprint="c" * 16)]


def test_what_holds_no_vectors_is_named(tmp_path: Path):
    def refusal(path: Path) -> str:
        with pytest.raises(BadInput) as said:
            [*read_vectors([path])]
        return str(said.value)

    (tmp_path / "a.parquet").write_bytes(b"nothing")
    assert "not Parquet, or damaged" in refusal(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"id": ["x"]}), tmp_path / "b.parquet")
    assert "does not say what made its vectors" in refusal(tmp_path / "b.parquet")
    np.save(tmp_path / "c.npy", VECTORS)
    assert "does not say what made its vectors" in refusal(tmp_path / "c.npy")
    (tmp_path / "c.npy.meta.json").write_text("{no")
    assert "does not say what made its vectors" in refusal(tmp_path / "c.npy")
    assert "holds no vectors that are known" in refusal(tmp_path / "c.npy.meta")
    assert "no such file" in refusal(tmp_path / "d.parquet")
    lines = write(tmp_path / "e.jsonl")
    lines.write_text("{}\n")
    assert "line 1: holds no vector" in refusal(lines)
    lines.write_text("")
    assert next(read_vectors([lines])).vectors.shape == (0, 8)
    assert "no such file" in refusal(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"format": 1}\n')
    assert "is not complete" in refusal(tmp_path)
    (tmp_path / "manifest.jsonl").write_text("")
    assert "is not complete" in refusal(tmp_path)
