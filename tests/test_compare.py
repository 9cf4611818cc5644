"""One vector space or not: the measures' own laws, levels of a real model, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed import cli
from gguf_embed.cli import options
from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadInput
from gguf_embed.lab.compare import MAX_TEXTS, MIN_TEXTS, compare, evenly
from gguf_embed.lab.forecast import forecast
from gguf_embed.lab.parallel import parallel_sentences
from gguf_embed.lab.quantize import make
from gguf_embed.lab.quantize_child import Recipe
from gguf_embed.lab.stored import stored
from gguf_embed.plan.settings import Settings
from gguf_embed.testing import FakeEmbedder
from gguf_embed.vectors import Pooling, Vectors


def cloud(n: int = 60, dim: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).normal(size=(n, dim)).astype(np.float32)


# ---------------------------------------------------------------------------------- measures


@given(st.integers(0, 99), st.integers(MIN_TEXTS, 80))
def test_length_is_no_difference(seed: int, n: int):
    a = cloud(n, seed=seed)
    lengths = np.exp2(np.random.RandomState(seed).randint(-5, 5, (n, 1)), dtype=np.float32)
    result = compare(a, a * lengths)
    assert (result.likeness, result.overlap, result.n_texts) == ("yes", 1, n)
    assert result.cosine.min == pytest.approx(1)
    assert result.rank_correlation == pytest.approx(1)


@given(st.integers(0, 99), st.floats(0, 2))
def test_a_and_b_are_equals(seed: int, noise: float):
    a = cloud(seed=seed)
    b = a + np.float32(noise) * cloud(seed=seed + 100)
    one, other = compare(a, b), compare(b, a)
    assert (one.likeness, one.overlap) == (other.likeness, other.overlap)
    assert one.cosine.p1 == pytest.approx(other.cosine.p1)
    assert one.rank_correlation == pytest.approx(other.rank_correlation)


def test_the_verdict_falls_with_noise():
    a = cloud(100, 32)
    levels = [compare(a, a + np.float32(noise) * cloud(100, 32, 1)) for noise in (0.01, 0.15, 1)]
    assert [level.likeness for level in levels] == ["yes", "close", "no"]
    assert levels[0].overlap > levels[1].overlap > levels[2].overlap
    changed = 10 * (1 - levels[1].overlap)
    assert f"of ten neighbours {changed:.1f} are others" in levels[1].why
    assert levels[2].why.startswith("another vector space: of ten neighbours")


def test_a_turned_space_ranks_alike_and_is_another():
    a = cloud()
    turn, _ = np.linalg.qr(cloud(16, 16, seed=1))
    result = compare(a, a @ turn)
    assert (result.likeness, result.overlap) == ("no", 1)
    assert result.rank_correlation == pytest.approx(1)
    assert "each ranks much as the other does" in result.why


def test_alike_in_cosine_is_not_enough():
    """Vectors of a narrow cone: every pair is alike, so cosines alone say nothing."""
    common = np.full((1, 16), 20, np.float32)
    result = compare(cloud() + common, cloud(seed=1) + common)
    assert result.cosine.p1 > 0.99
    assert result.likeness == "no"


def test_longer_vectors_are_cut():
    a = cloud()
    result = compare(a[:, :8], a)
    assert (result.likeness, result.dims) == ("yes", (8, 16))
    assert result.why.startswith("once B is cut to its first 8 values and normalized again, one")
    assert compare(a, a[:, :8]).why.startswith("once A is cut")
    result = compare(a[:, 8:], a)
    assert (result.likeness, result.why) == (
        "no",
        "8 and 16 dimensions, and cut to 8 they differ too",
    )


def test_too_few_or_uneven():
    with pytest.raises(BadInput, match=r"29 and 29 vectors: .* at least 30"):
        compare(cloud(29), cloud(29))
    with pytest.raises(BadInput, match="40 and 41 vectors"):
        compare(cloud(40), cloud(41))


@given(st.integers(0, 5000), st.integers(1, 300))
def test_evenly_spaced(n: int, most: int):
    places = evenly(n, most)
    assert len(places) == min(n, most)
    gaps = np.diff(places)
    assert len(gaps) == 0 or gaps.min() >= 1
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert n == 0 or (places[0] == 0 and n - 1 - places[-1] <= n / min(n, most))


# ------------------------------------------------------------------------------- a real model


def test_the_thresholds_on_a_model_whose_answers_are_known(minilm_f16: Path, tmp_path: Path):
    """The table in compare.py, on its English sentences."""
    texts = parallel_sentences().sentences["en"]

    def vectors(model: str | Path, *prompts: str, pooling: Pooling | None = None) -> list[Vectors]:
        settings = Settings(tune=False, pooling=pooling)
        with Embedder.open(model, settings=settings) as embedder:
            return [embedder.encode(texts, prompt=prompt) for prompt in prompts or ("",)]

    q4_0 = make(forecast(minilm_f16, Recipe(level="Q4_0")), tmp_path / "Q4_0.gguf").path
    f16, prompted = vectors(minilm_f16, "", "query: ")
    results = {
        "Q8_0": compare(f16, *vectors("all-minilm-l6-v2")),
        "Q4_0": compare(f16, *vectors(q4_0)),
        "prompt": compare(f16, prompted),
        "pooling": compare(f16, *vectors(minilm_f16, pooling=Pooling.CLS)),
    }
    verdicts = {name: result.likeness for name, result in results.items()}
    assert verdicts == {"Q8_0": "yes", "Q4_0": "close", "prompt": "no", "pooling": "no"}
    # Far enough from the thresholds that another CPU's kernels do not decide.
    assert results["Q8_0"].cosine.p1 > 0.998
    assert results["Q8_0"].overlap > 0.96
    assert results["Q4_0"].cosine.p1 == pytest.approx(0.907, abs=0.02)
    assert results["Q4_0"].overlap == pytest.approx(0.85, abs=0.03)
    assert results["prompt"].cosine.p1 < 0.75


# ----------------------------------------------------------------------------- stored vectors


def save(path: Path, vectors: np.ndarray, **about: object) -> Path:
    np.save(path, vectors)
    if about:
        path.with_name(path.name + ".meta.json").write_text(json.dumps(about))
    return path


def test_stored_vectors_and_what_made_them(tmp_path: Path):
    vectors = cloud()
    file = stored(save(tmp_path / "v.npy", vectors, n_texts=60, model="m"))
    assert (file.shape, dict(file.about)) == ((60, 16), {"n_texts": 60, "model": "m"})
    np.testing.assert_array_equal(file.rows(np.array([3, 1])), vectors[[3, 1]])
    assert stored(save(tmp_path / "alone.npy", vectors)).about == {}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"an array of float64 of shape \(4,\)"),
        (np.zeros((4, 2), np.int32), r"an array of int32 of shape \(4, 2\)"),
        (np.zeros((4, 0)), r"an array of float64 of shape \(4, 0\)"),
        (np.array([{}]), r"no \.npy file that can be read"),
    ],
)
def test_arrays_that_hold_no_vectors(tmp_path: Path, array: np.ndarray, message: str):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(BadInput, match=message):
        stored(tmp_path / "v.npy")


def test_files_that_are_no_arrays(tmp_path: Path):
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.npy").write_bytes(save(tmp_path / "v.npy", cloud()).read_bytes()[:-9])
    (tmp_path / "empty.npy").write_bytes(b"")
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, a=cloud())
    for name in ("text", "cut", "empty", "archive", "missing"):
        with pytest.raises(BadInput, match=rf"{name}\.npy: no \.npy file that can be read"):
            stored(tmp_path / f"{name}.npy")


def test_another_files_description(tmp_path: Path):
    with pytest.raises(BadInput, match=r"describes 59 vectors, v\.npy holds 60"):
        stored(save(tmp_path / "v.npy", cloud(), n_texts=59))
    path = save(tmp_path / "w.npy", cloud(), n_texts=60)
    for text in ("[1", "[]", "null", "5", '"x"', "[" * 100_000, '{"a": 1'):
        (tmp_path / "w.npy.meta.json").write_text(text)
        with pytest.raises(BadInput, match=r"w\.npy\.meta\.json: cannot be read"):
            stored(path)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_a_row_without_direction(tmp_path: Path, value: float):
    vectors = cloud()
    vectors[7] = value
    with pytest.raises(BadInput, match=r"v\.npy: row 7 is zero or not finite"):
        stored(save(tmp_path / "v.npy", vectors)).rows(np.arange(2, 60))


def lines(path: Path, vectors: np.ndarray) -> Path:
    rows = (json.dumps({"id": i, "vector": row}) for i, row in enumerate(vectors.tolist()))
    path.write_text("\n".join(rows) + "\n\n")
    return path


def test_lines_hold_what_an_array_holds(tmp_path: Path):
    vectors = cloud()
    file = stored(lines(tmp_path / "v.jsonl", vectors))
    assert (file.shape, dict(file.about)) == ((60, 16), {})
    places = np.array([1, 3, 59])
    array = stored(save(tmp_path / "v.npy", vectors))
    np.testing.assert_array_equal(file.rows(places), array.rows(places))
    (tmp_path / "v.jsonl.meta.json").write_text('{"n_texts": 59}')
    with pytest.raises(BadInput, match=r"describes 59 vectors, v\.jsonl holds 60"):
        stored(tmp_path / "v.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2: holds no object with fields"),
        ('{"vector": [true, false]}', "line 2: no field 'vector' with a list of numbers"),
        ('{"vector": ["1", "2"]}', "line 2: no field 'vector' with a list of numbers"),
        ("{", "line 2: not JSON"),
        ('{"text": "a"}', "line 2: no field 'vector' with a list of numbers"),
        ('{"vector": []}', "line 2: no field 'vector' with"),
        ('{"vector": [1, "a"]}', "line 2: no field 'vector' with"),
        ('{"vector": [[1, 2]]}', "line 2: no field 'vector' with"),
        ('{"vector": [1, 2, 3]}', "line 2: a vector of 3 values, the first has 2"),
        ('{"vector": [1e300, 2]}', "row 1 is zero or not finite"),
        ('{"vector": [NaN, 2]}', "row 1 is zero or not finite"),
    ],
)
def test_lines_that_hold_no_vectors(tmp_path: Path, line: str, message: str):
    path = tmp_path / "v.jsonl"
    path.write_text(f'{{"vector": [1, 2]}}\n{line}\n')
    with pytest.raises(BadInput, match=message):
        stored(path).rows(np.arange(2))


@pytest.mark.native
def test_what_embed_wrote_is_compared_in_either_form(tmp_path: Path):
    """`embed` itself, with the built-in model: the two forms hold the same vectors."""
    texts = tmp_path / "t.txt"
    texts.write_text(words(MIN_TEXTS))
    for name in ("v.npy", "v.jsonl"):
        assert cli.main(["embed", str(texts), "-o", str(tmp_path / name), "--no-tune"]) == 0
    assert cli.main(["compare", str(tmp_path / "v.npy"), str(tmp_path / "v.jsonl")]) == 0


# -------------------------------------------------------------------------------- the command

Run = Callable[..., tuple[int, str, str]]
DIM = 64  # of the fake engine


def open_fake(model: str, settings: Settings | None = None, *, quiet: bool = False) -> FakeEmbedder:
    return FakeEmbedder.open(model, settings=settings)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments) -> (exit code, standard output, standard error), with the fake engine."""
    monkeypatch.setattr(options, "open_embedder", open_fake)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["compare", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command_on_one_model(run: Run):
    code, out, err = run("one", "other", "--json")
    report = json.loads(out)
    side = {"file": "fake.gguf", "model": "fake", "quant": "F32"}
    side |= {"pooling": "mean", "prompt": "", "dim": DIM}
    assert (code, err) == (0, "")
    assert report.pop("cosine") == {"mean": 1, "p1": 1, "min": 1}
    assert report == {
        "format": "gguf-embed-compare/1",
        "verdict": "yes",
        "why": "one vector space: A and B can stand in one index",
        "a": side,
        "b": side,
        "n_texts": 125,
        "overlap_at_10": 1,
        "rank_correlation": 1,
    }


def test_the_command_says_what_differs_and_no_is_exit_code_1(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    def open_embedder(model: str, settings: Settings, *, quiet: bool) -> FakeEmbedder:
        prompts = {"query": "query: " * 8}
        return FakeEmbedder.open(model, settings=settings, n_ctx=64, prompts=prompts)

    monkeypatch.setattr(options, "open_embedder", open_embedder)
    code, out, _ = run("one", "other", "--prompt-name-b", "query", "--dimensions-b", 60)
    assert code == 1
    lines = [line.split() for line in out.splitlines()]
    assert ["prompt", "''", *["query:"] * 8, "differs"] in lines
    assert ["dim", str(DIM), "60", "differs"] in lines
    assert ["quant", "F32", "F32"] in lines
    assert lines[-1][0] == "no:"


def test_choices_reach_their_own_side(run: Run, monkeypatch: pytest.MonkeyPatch):
    opened: list[tuple[str, Settings]] = []

    def open_embedder(model: str, settings: Settings, *, quiet: bool) -> FakeEmbedder:
        opened.append((model, settings))
        return open_fake(model, settings)

    monkeypatch.setattr(options, "open_embedder", open_embedder)
    run("one", "other", "--pooling-a", "cls", "--dimensions-a", 5, "--prompt-name-b", "document")
    assert opened == [
        ("one", Settings(pooling=Pooling.CLS, tune=False)),
        ("other", Settings(tune=False)),
    ]


def words(n: int) -> str:
    return "".join(f"w{i} w{i + 1} w{i // 3}\n" for i in range(n))


@pytest.mark.slow
def test_texts_of_ones_own(run: Run, tmp_path: Path):
    (tmp_path / "own.txt").write_text(words(50) + "\n" + words(50))
    code, out, _ = run("a", "b", "--texts", tmp_path / "own.txt", "--json")
    assert (code, json.loads(out)["n_texts"]) == (0, 50)  # each once, without the blank one
    (tmp_path / "many.txt").write_text(words(MAX_TEXTS + 500))
    _, out, _ = run("a", "b", "--texts", tmp_path / "many.txt", "--json")
    assert json.loads(out)["n_texts"] == MAX_TEXTS


def test_texts_that_do_not_do(run: Run, tmp_path: Path):
    few, long = tmp_path / "few.txt", tmp_path / "long.txt"
    few.write_text(words(MIN_TEXTS - 1))
    long.write_text(words(40) + "word " * 40 + "\n")
    assert run("a", "b", "--texts", few) == (
        2,
        "",
        f"gguf-embed: {few}: 29 different texts; at least 30 are needed for a verdict\n",
    )
    code, _, err = run("a", "b", "--texts", long)
    assert code == 2
    assert f"{long}:41: 42 tokens, a takes 32 (1 texts are too long)" in err


@pytest.mark.slow
def test_stored_vectors_are_compared_as_they_are(run: Run, tmp_path: Path):
    vectors = cloud(MAX_TEXTS + 100, 8)
    vectors[1] = 0  # of more than MAX_TEXTS rows not all are looked at; this one is
    a = save(tmp_path / "a.npy", vectors, n_texts=len(vectors), model="m", quant="F16", n_ctx=9)
    b = save(tmp_path / "b.npy", 2 * vectors, n_texts=len(vectors), model="m", quant="Q8_0")
    assert run(a, b)[0] == 2
    vectors[1] = 1
    np.save(a, vectors)
    np.save(b, 2 * vectors)
    code, out, _ = run(a, b, "--json")
    report = json.loads(out)
    assert (code, report["verdict"], report["n_texts"]) == (0, "yes", MAX_TEXTS)
    assert report["a"] == {"file": "a.npy", "model": "m", "quant": "F16", "dim": 8}
    assert report["b"] == {"file": "b.npy", "model": "m", "quant": "Q8_0", "dim": 8}


def test_what_cannot_be_compared(run: Run, tmp_path: Path):
    a, b = save(tmp_path / "a.npy", cloud()), save(tmp_path / "b.npy", cloud(61))
    other = tmp_path / "vectors.parquet"
    other.write_bytes(b"PAR1")
    for arguments, message in (
        (("x.txt", "minilm"), "x.txt: is no model and no file of vectors (.npy, .jsonl); to"),
        (("minilm", "ROWS.CSV"), "name them and pass --texts ROWS.CSV"),
        ((a, "x.md"), "x.md: is no model"),
        ((a, other), "vectors.parquet: is no model"),
        ((a, "minilm"), "one holds vectors, the other is a model; embed the same texts with it"),
        ((a, b), "has 60 rows, "),
        ((a, a, "--texts", "x.txt"), "--texts says how to embed; "),
        ((a, a, "--pooling-b", "cls"), "--pooling-b says how to embed; "),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert message in err
