"""Maps and groups of an index: points, colours, names, and a page that holds all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from commands import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.index.clusters import clusters_of, names_of
from gguf_embed.index.making import Wanted, make_index
from gguf_embed.index.plane import neighbours, on_plane
from gguf_embed.testing import FakeEmbedder
from gguf_embed.vectors import Vectors

TEXTS = {
    "bread.md": "# Bread\n\nflour and water and some salt make bread\n\n"
    "# Oven\n\nbread bakes in the hot oven for an hour\n",
    "boats.md": "# Boats\n\nboats float on the river </script><b>{{TITLE}}\n",
    "deep/dogs.txt": "dogs and cats\n",
}


def groups(n: int, dim: int, k: int, seed: int) -> tuple[Vectors, np.ndarray]:
    """Rows around `k` far centres, and which each is of."""
    chance = np.random.default_rng(seed)
    numbers = chance.integers(0, k, n)
    vectors = np.eye(dim, dtype=np.float32)[numbers]
    vectors += chance.normal(0, 0.05, vectors.shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), numbers


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 99))
def test_groups_are_those_that_lie_together(n: int, k: int, seed: int):
    vectors, _ = groups(n, 8, k, seed)
    found = clusters_of(vectors, k)
    sizes = np.bincount(found.numbers, minlength=found.n)
    assert sizes.sum() == n
    assert sizes.min() > 0
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    np.testing.assert_allclose(np.linalg.norm(found.centres, axis=1), 1, atol=1e-5)
    products = vectors @ found.centres.T
    own = products[np.arange(n), found.numbers]
    np.testing.assert_allclose(own, products.max(axis=1), atol=1e-5)
    for number in range(found.n):
        middle = vectors[found.numbers == number].sum(axis=0)
        near = found.centres[number] @ middle / np.linalg.norm(middle)
        assert near == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(found.numbers, clusters_of(vectors, k).numbers)


def test_rows_that_are_all_the_same_or_nothing_are_groups():
    same = np.tile(np.eye(4, dtype=np.float32)[:1], (5, 1))
    assert clusters_of(same, 3).n == 1
    assert clusters_of(np.zeros((3, 4), np.float32), 2).numbers.tolist() == [0, 0, 0]
    assert clusters_of(np.zeros((0, 4), np.float32), 2).n == 0


def test_names_tell_groups_apart():
    texts = ["the cat sat", "the cat ran", "the boat sank", "the boat swam far"]
    first, second = names_of(texts, np.array([0, 0, 1, 1]), 2)
    assert first.split()[0] == "cat"
    assert second.split()[0] == "boat"
    assert "the" not in (first + second).split()[:2]


def test_what_is_near_is_near_on_the_plane():
    vectors, numbers = groups(150, 16, 3, 1)
    points = on_plane(vectors)
    assert points.shape == (150, 2)
    assert np.abs(points).max() == pytest.approx(1)
    np.testing.assert_array_equal(points, on_plane(vectors))
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    nearest = apart.argsort(axis=1)[:, :5]
    assert (numbers[nearest] == numbers[:, None]).mean() > 0.98
    products = vectors @ vectors.T
    np.fill_diagonal(products, -2)
    expected = np.sort(products, axis=1)[:, -4:]
    found = np.sort(np.take_along_axis(products, neighbours(vectors, 4), 1), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 14])
def test_few_points_have_a_place(n: int):
    points = on_plane(groups(n, 4, 2, 0)[0])
    assert points.shape == (n, 2)
    assert np.isfinite(points).all()
    assert np.isfinite(on_plane(np.ones((n, 4), np.float32) / 2)).all()  # all the same


@pytest.fixture
def index(tmp_path: Path) -> Path:
    folder, place = tmp_path / "texts", tmp_path / "made.index"
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with FakeEmbedder.open() as embedder:
        wanted = Wanted(folders={folder: None}, chunk_tokens=20)
        make_index(place, embedder, wanted, model="fake")
    return place


def test_a_map_is_one_page_that_holds_all_and_loads_nothing(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "a.html"
    code, _, err = run_command(capsys, "map", "--index", index, "-o", output, "--groups", 2)
    assert (code, "4 passages in 2 groups" in err) == (0, True), err
    page = output.read_text("utf-8")
    assert not re.search(r"https?:|src=|@import|url\(", page)
    assert page.count("</script>") == 2
    assert "<title>made</title>" in page
    assert "4 passages, fake" in page
    data = json.loads(re.findall(r'type="application/json">(.*?)</script>', page, re.DOTALL)[0])
    assert len(data["rows"]) == 4
    assert len(data["groups"]) == 2
    boats = next(row for row in data["rows"] if "river" in row[8])
    assert boats[8].endswith("boats float on the river </script><b>{{TITLE}}")
    assert data["files"][boats[3]].endswith("texts/boats.md")
    assert boats[4:8] == [1, 3, boats[6], "Boats"]
    code, out, _ = run_command(capsys, "show", boats[6], "--index", index)
    assert "boats float" in out
    assert run_command(capsys, "map", "--index", index, "-o", tmp_path / "a.png")[0] == 2


def test_a_map_of_some(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "a.html"
    command = ("map", "--index", index, "-o", output)
    assert (
        "2 passages of 4 in 1 group"
        in run_command(capsys, *command, "--path", "bread.md", "--groups", 1)[2]
    )
    assert "3 passages of 4 in" in run_command(capsys, *command, "--most", 3)[2]
    code, _, err = run_command(capsys, *command, "--path", "none")
    assert (code, "matches no file" in err) == (2, True)


def test_a_map_as_a_table(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "a.parquet"
    assert run_command(capsys, "map", "--index", index, "-o", output)[0] == 0
    table = pyarrow.parquet.read_table(output).to_pylist()
    assert len(table) == 4
    with FakeEmbedder.open() as embedder:
        for row in table:
            vector = embedder.encode(row["text"], prompt=embedder.prompt("document"))
            np.testing.assert_allclose(row["vector"], vector, atol=1e-6)
            assert -1 <= row["projection_x"] <= 1


@pytest.mark.parametrize(
    "command", [["map", "-o", "x.html"], ["cluster"]], ids=lambda each: each[0]
)
def test_an_index_without_passages_says_how_to_fill_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "texts").mkdir()
    place = tmp_path / "empty.index"
    with FakeEmbedder.open() as embedder:
        make_index(place, embedder, Wanted(folders={tmp_path / "texts": None}), model="fake")
    code, out, err = run_command(capsys, *command, "--index", str(place))
    assert (code, out) == (2, "")
    assert "empty.index: has no passages yet; fill it: gguf-embed index -o " in err


def test_groups_of_an_index(index: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run_command(capsys, "cluster", "--index", index, "--groups", 3)
    assert code == 0
    assert sum(int(n) for n in re.findall(r"^ *\d+  (\d+) passage", out, re.MULTILINE)) == 4
    code, out, _ = run_command(capsys, "cluster", "--index", index, "--groups", 3, "--json")
    found = json.loads(out)
    assert found["format"] == "gguf-embed-cluster/1"
    assert sum(group["n_passages"] for group in found["groups"]) == 4
    for group in found["groups"]:
        assert len(group["passages"]) == group["n_passages"]
        scores = [each["score"] for each in group["passages"]]
        assert scores == sorted(scores, reverse=True)
