"""Importance matrices: what is read from llama-imatrix's files, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.imatrix import read_imatrix

NAME = "blk.0.attn_q.weight"


def write_imatrix(path: Path, tensors: Mapping[str, np.ndarray], kind: str = "imatrix") -> Path:
    """A file as llama-imatrix writes it; tensors are named in full."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["some.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums_and_counts(sums: object, counts: object, name: str = NAME) -> dict[str, np.ndarray]:
    return {
        f"{name}.in_sum2": np.array(sums, np.float32),
        f"{name}.counts": np.array(counts, np.float32),
    }


def test_sums_are_divided_by_counts(tmp_path: Path):
    tensors = sums_and_counts([[2, 4, 6]], [[2.4]])  # llama.cpp rounds counts
    # Two experts, of which no token reached the second.
    tensors |= sums_and_counts([[10, 20], [30, 40]], [[10], [0]], "blk.1.ffn_up_exps.weight")
    imatrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", tensors))
    values = {name: array.tolist() for name, array in imatrix.values.items()}
    assert values == {NAME: [1, 2, 3], "blk.1.ffn_up_exps.weight": [1, 2, 1, 1]}
    assert {array.dtype for array in imatrix.values.values()} == {np.dtype(np.float32)}
    assert (imatrix.datasets, imatrix.n_chunks) == (("some.txt", "more.txt"), 7)


@given(
    sums=arrays(np.float32, (3, 4), elements=st.floats(0, 2.0**100, width=32)),
    counts=arrays(np.float32, (3, 1), elements=st.integers(0, 1 << 20).map(float)),
)
def test_as_llama_quantize_divides(
    tmp_path_factory: pytest.TempPathFactory, sums: np.ndarray, counts: np.ndarray
):
    """One float32 division each (quantize.cpp, load_imatrix)."""
    path = tmp_path_factory.getbasetemp() / "property.gguf"
    read = read_imatrix(write_imatrix(path, sums_and_counts(sums, counts)))
    expected = [
        np.float32(value) / np.float32(n) if n > 0 else np.float32(1)
        for row, (n,) in zip(sums, counts, strict=True)
        for value in row
    ]
    assert read.values[NAME].tolist() == [float(value) for value in expected]


def test_a_file_in_the_old_format_is_told_how_to_be_converted(tmp_path: Path):
    path = tmp_path / "old.dat"
    path.write_bytes((1).to_bytes(4, "little") + b"\x13\0\0\0" + NAME.encode())
    with pytest.raises(BadModelFile, match=r"llama-imatrix --in-file old\.dat -o old\.gguf"):
        read_imatrix(path)


GOOD = sums_and_counts([[1, 2]], [[1]])


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        (GOOD, "model", "no importance matrix"),
        ({"other": np.zeros(2, np.float32)}, "imatrix", "0 sums and 0 counts"),
        (
            {**GOOD, "lone.in_sum2": np.zeros(2, np.float32)},
            "imatrix",
            "2 sums and 1 counts; lone lacks",
        ),
        (sums_and_counts([[1, 2, 3]], [[1], [1]]), "imatrix", "3 sums and 2 counts"),
        (sums_and_counts([[1, np.nan]], [[1]]), "imatrix", "NaN or infinity"),
        (
            {f"{NAME}.in_sum2": np.zeros(2, np.float16), f"{NAME}.counts": GOOD[f"{NAME}.counts"]},
            "imatrix",
            "is F16, not F32",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], kind: str, message: str
):
    path = write_imatrix(tmp_path / "bad.gguf", tensors, kind)
    with pytest.raises(BadModelFile, match=message) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(BadModelFile, match=r"nothing\.gguf: cannot be read: No such file"):
        read_imatrix(tmp_path / "nothing.gguf")
