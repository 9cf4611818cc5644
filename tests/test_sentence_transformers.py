"""The shape of sentence-transformers, without it: what a script calls, and what is refused."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gguf_embed import BadInput, BadOption, Embedder, ModelNotFound, Reranker, Settings
from gguf_embed.integrations.sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    quantize_embeddings,
    util,
)
from gguf_embed.testing import FakeEmbedder, FakeReranker

TEXTS = ["a cat sits", "the cat", "a dog runs", "", "a cat sits"]


@pytest.fixture
def fake() -> Iterator[FakeEmbedder]:
    with FakeEmbedder.open() as fake:
        yield fake


@pytest.fixture
def model(fake: FakeEmbedder) -> SentenceTransformer:
    return SentenceTransformer(fake)


# -- opening ---------------------------------------------------------------------------------------


def test_the_device_is_where_the_layers_are(monkeypatch: pytest.MonkeyPatch):
    said: list[Settings] = []

    def open_fake(_name: str, *, settings: Settings) -> Embedder:
        said.append(settings)
        return FakeEmbedder.open()

    monkeypatch.setattr(Embedder, "open", open_fake)
    for device in (None, "cpu", "cuda", "mps", "cuda:0"):
        with SentenceTransformer("all-MiniLM-L6-v2", device=device) as model:
            assert model.device == "cpu"
    assert [settings.n_gpu_layers for settings in said] == [None, 0, -1, -1, -1]
    for device, hint in (("cuda:1", "CUDA_VISIBLE_DEVICES"), ("tpu", "choose 'cpu'")):
        with pytest.raises(BadOption, match=hint):
            SentenceTransformer("minilm", device=device)
    with pytest.raises(BadOption, match="say the same"):
        SentenceTransformer("minilm", device="cpu", settings=Settings(n_gpu_layers=0))


def test_what_it_opened_it_closes(monkeypatch: pytest.MonkeyPatch, fake: FakeEmbedder):
    with SentenceTransformer(fake):
        pass
    fake.encode("still open")
    monkeypatch.setattr(Embedder, "open", lambda *_, **__: fake)
    with SentenceTransformer("minilm") as model:
        assert model.encode("a").shape == (64,)
    with pytest.raises(BadInput, match="is closed"):
        fake.encode("a")


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"backend": "onnx"}, "llama.cpp is the backend"),
        ({"model_kwargs": {"torch_dtype": "float16"}}, "settings=Settings"),
        ({"cache_folder": "/tmp"}, "set HF_HOME"),
        ({"revision": "abc"}, "hf:owner/repo/file.gguf@revision"),
        ({"token": "secret"}, "set HF_TOKEN"),
        ({"modules": [1]}, "sentence_transformers_module.py"),
        ({"colour": "red"}, "no 'colour' here"),
        ({"settings": Settings()}, "is open already"),
        ({"similarity_fn_name": "near"}, "choose cosine, dot"),
        ({"default_prompt_name": "poem"}, "no prompt 'poem'; its prompts: 'query', 'document'"),
    ],
)
def test_what_has_another_way_is_refused_with_it(
    option: dict[str, Any], hint: str, fake: FakeEmbedder
):
    with pytest.raises(BadOption, match=hint):
        SentenceTransformer(fake, **option)


def test_what_asks_for_nothing_is_taken(fake: FakeEmbedder):
    SentenceTransformer(
        fake, trust_remote_code=True, backend="torch", model_kwargs={}, local_files_only=False
    )


# -- encoding --------------------------------------------------------------------------------------


def test_shapes(model: SentenceTransformer, fake: FakeEmbedder):
    np.testing.assert_array_equal(model.encode(TEXTS), fake.encode(TEXTS))
    np.testing.assert_array_equal(model.encode(tuple(TEXTS)), fake.encode(TEXTS))
    assert model.encode("a cat").shape == (64,)
    assert model.encode([]).shape == (0, 64)
    rows = model.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(rows, list)
    assert len(rows) == 5
    assert model.get_sentence_embedding_dimension() == model.get_embedding_dimension() == 64


def test_length(model: SentenceTransformer):
    unit, as_pooled = (
        model.encode(TEXTS[:3], normalize_embeddings=choice) for choice in (None, False)
    )
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    assert np.linalg.norm(as_pooled, axis=1).min() > 1.4
    short = model.encode(TEXTS[:3], truncate_dim=16)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, rtol=1e-6)
    model.truncate_dim = 16
    np.testing.assert_array_equal(model.encode(TEXTS[:3]), short)
    assert model.get_sentence_embedding_dimension() == 16


def test_prompts(model: SentenceTransformer, fake: FakeEmbedder):
    np.testing.assert_array_equal(model.encode_query("x"), fake.encode("query: x"))
    np.testing.assert_array_equal(model.encode_document("x"), fake.encode("document: x"))
    np.testing.assert_array_equal(model.encode("x", prompt="p "), fake.encode("p x"))
    np.testing.assert_array_equal(model.encode("x", prompt_name="query"), model.encode_query("x"))
    other = SentenceTransformer(fake, prompts={"passage": "P "}, default_prompt_name="passage")
    np.testing.assert_array_equal(other.encode("x"), fake.encode("P x"))
    np.testing.assert_array_equal(other.encode("x", prompt=""), fake.encode("x"))
    with pytest.raises(BadOption, match="no prompt 'poem'"):
        model.encode("x", prompt_name="poem")


def test_a_model_without_prompts_embeds_all_alike():
    with FakeEmbedder.open(prompts={}) as fake:
        model = SentenceTransformer(fake)
        np.testing.assert_array_equal(model.encode_query("x"), model.encode("x"))
        np.testing.assert_array_equal(model.encode_document("x"), model.encode("x"))


def test_max_seq_length_cuts_there_and_says_so(
    model: SentenceTransformer, fake: FakeEmbedder, caplog: pytest.LogCaptureFixture
):
    assert model.max_seq_length == model.get_max_seq_length() == 32
    model.max_seq_length = 5
    cut = model.encode(["a b c d e f", "a"])
    np.testing.assert_array_equal(cut[0], fake.encode("a b c"))
    assert "1 of 2 texts cut to 5 tokens (first: row 0)" in caplog.text
    assert model.tokenize(["a b c d e f"])["input_ids"].shape == (1, 5)
    with pytest.raises(BadOption, match=r"Settings\(n_ctx=99\)"):
        model.max_seq_length = 99
    with pytest.raises(BadOption, match="a whole number from 3"):
        model.max_seq_length = 2


def test_what_a_model_was_trained_for_is_the_first_limit():
    """MiniLM takes 512 tokens, and sentence-transformers cuts at 256."""
    with FakeEmbedder.open(n_ctx=400) as fake:
        assert fake.card is not None
        assert SentenceTransformer(fake).max_seq_length == fake.card.max_seq_length == 256


def test_tokens(model: SentenceTransformer, fake: FakeEmbedder):
    tokens = model.tokenize(["a cat", "a"])
    assert tokens["input_ids"][0].tolist() == fake.tokenize("a cat")
    assert tokens["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert model.tokenize([])["input_ids"].shape == (0, 0)
    rows = model.encode(["a cat", "a"], output_value="token_embeddings")
    assert [row.shape for row in rows] == [(4, 64), (3, 64)]
    with pytest.raises(BadOption, match="choose 'sentence_embedding'"):
        model.encode("a", output_value=None)


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [
        ("float32", np.float32, 64),
        ("int8", np.int8, 64),
        ("uint8", np.uint8, 64),
        ("binary", np.int8, 8),
        ("ubinary", np.uint8, 8),
    ],
)
def test_precisions(precision: Any, dtype: type, width: int, model: SentenceTransformer):
    vectors = model.encode(TEXTS, precision=precision)
    assert (vectors.dtype, vectors.shape) == (dtype, (5, width))
    empty = model.encode([], precision=precision)
    assert (empty.dtype, empty.shape) == (dtype, (0, width))
    np.testing.assert_array_equal(vectors, quantize_embeddings(model.encode(TEXTS), precision))


def test_ranges_of_int8():
    vectors = np.array([[0, 5], [1, 5], [0.5, 5]], np.float32)
    codes = quantize_embeddings(vectors, "uint8")[:, 0].tolist()
    assert codes in ([0, 254, 127], [0, 255, 127])  # as there, the last code is a matter of luck
    assert quantize_embeddings(vectors, "int8")[:, 1].tolist() == [-128] * 3
    ranges = [[0, 0], [2, 10]]
    assert quantize_embeddings(vectors[:1], "uint8", ranges=ranges).tolist() == [[0, 127]]
    assert quantize_embeddings([[9, 1]], "uint8", calibration_embeddings=vectors)[0, 0] == 255
    with pytest.raises(BadOption, match="one vector has no range"):
        quantize_embeddings(vectors[:1], "int8")
    with pytest.raises(BadOption, match="choose float32, int8"):
        quantize_embeddings(vectors, "int4")  # type: ignore[arg-type]


def test_what_encode_has_not(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BadOption, match="encode has no 'colour' here"):
        model.encode("a", colour="red")
    assert model.encode("a", device="cpu", batch_size=7, chunk_size=3, pool={}).shape == (64,)
    with pytest.raises(BadOption, match="say the device when it is opened"):
        model.encode("a", device="cuda")
    with pytest.raises(BadOption, match="One call uses all cores"):
        model.encode("a", device=["cpu", "cpu"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadOption, match="needs PyTorch"):
        model.encode("a", convert_to_tensor=True)


def test_several_processes_are_not_needed(
    model: SentenceTransformer, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        pool = model.start_multi_process_pool()
    assert "is not needed" in caplog.text
    np.testing.assert_array_equal(model.encode_multi_process(TEXTS, pool), model.encode(TEXTS))
    np.testing.assert_array_equal(model.encode(TEXTS, pool=pool), model.encode(TEXTS))
    model.stop_multi_process_pool(pool)


@pytest.mark.parametrize("name", ["fit", "tokenizer", "save_pretrained", "half", "evaluate"])
def test_what_is_not_there_says_the_way_out(name: str, model: SentenceTransformer):
    with pytest.raises(BadOption, match=f"has no {name} here: "):
        getattr(model, name)
    assert not hasattr(model, name)
    assert model.eval().to("cpu") is model
    with pytest.raises(BadOption, match="has no modules here"):
        model[0]
    with pytest.raises(TypeError):
        iter(model)
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        model.colour  # noqa: B018


# -- what is near ----------------------------------------------------------------------------------


def test_similarities():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    with FakeEmbedder.open() as fake:
        model = SentenceTransformer(fake)
        assert model.similarity_fn_name == "cosine"
        for name, one in (
            ("cosine", lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)),
            ("dot", lambda x, y: x @ y),
            ("euclidean", lambda x, y: -np.linalg.norm(x - y)),
            ("manhattan", lambda x, y: -np.abs(x - y).sum()),
        ):
            model.similarity_fn_name = name
            expected = [[one(x, y) for y in b] for x in a]
            np.testing.assert_allclose(model.similarity(a, b), expected, rtol=1e-4, atol=1e-6)
            pairs = np.diagonal(expected)
            np.testing.assert_allclose(model.similarity_pairwise(a, b), pairs, rtol=1e-4, atol=1e-6)
            assert model.similarity(a[0], b).shape == (1, 3)


def test_semantic_search_in_parts_is_that_of_the_whole():
    rng = np.random.default_rng(1)
    queries, corpus = rng.normal(size=(5, 8)), rng.normal(size=(40, 8))
    whole = util.semantic_search(queries, corpus, top_k=4)
    parts = util.semantic_search(queries, corpus, query_chunk_size=2, corpus_chunk_size=7, top_k=4)
    for one, other in zip(whole, parts, strict=True):
        assert [hit["corpus_id"] for hit in one] == [hit["corpus_id"] for hit in other]
    scores = util.cos_sim(queries, corpus)
    best = np.argsort(-scores[0])[:4].tolist()
    assert [hit["corpus_id"] for hit in whole[0]] == best
    assert whole[0][0]["score"] == pytest.approx(scores[0, best[0]], abs=1e-6)
    assert len(util.semantic_search(queries, corpus[:2])[0]) == 2


def test_communities_and_paraphrases():
    texts = ["a b c", "x y z", "a b d", "x y w", "q r s", "a b c e"]
    model = SentenceTransformer(FakeEmbedder.open(dim=4096))
    vectors = model.encode(texts)
    found = util.community_detection(vectors, threshold=0.6, min_community_size=2)
    assert sorted(map(sorted, found)) == [[0, 2, 5], [1, 3]]
    assert [len(group) for group in found] == [3, 2]
    pairs = util.paraphrase_mining(model, texts, top_k=2)
    assert pairs[0][1:] == [0, 5]
    assert [score for score, *_ in pairs] == sorted((s for s, *_ in pairs), reverse=True)


def test_the_rest_of_util_is_that_of_the_real_package():
    with pytest.raises(AttributeError, match=r"no util\.mine_hard_negatives; install"):
        util.mine_hard_negatives  # noqa: B018


# -- pairs -----------------------------------------------------------------------------------------


@pytest.fixture
def cross() -> Iterator[CrossEncoder]:
    with FakeReranker.open() as fake:
        yield CrossEncoder(fake)


def test_scores_of_pairs_are_in_their_order(cross: CrossEncoder):
    pairs = [("a b", "x"), ("c", "c d"), ("a b", "b"), ["a b", "a b"]]
    scores = cross.predict(pairs)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.12, 0.88, 0.5, 0.88], atol=0.01)
    assert cross.predict(("a b", "b")) == pytest.approx(0.5, abs=0.01)
    assert cross.predict([]).shape == (0,)
    assert len(cross.predict(pairs, convert_to_numpy=False)) == 4


def test_ranking(cross: CrossEncoder):
    found = cross.rank("a b", ["x", "b", "a b", "a"], top_k=3, return_documents=True)
    assert [hit["corpus_id"] for hit in found] == [2, 1, 3]
    assert found[0]["text"] == "a b"
    assert "text" not in cross.rank("a b", ["x"])[0]


def test_activations(cross: CrossEncoder):
    class Identity:
        pass

    class Softmax:
        pass

    raw = cross.predict([("a b", "a b"), ("a b", "x")], activation_fn=Identity())
    np.testing.assert_allclose(raw, [2, -2], atol=0.01)
    assert CrossEncoder(cross.reranker, activation_fn=Identity()).predict(("a", "a")) > 1
    with pytest.raises(BadOption, match=r"torch\.nn\.Sigmoid\(\)"):
        cross.predict([("a", "b")], activation_fn=Softmax())


def test_what_a_cross_encoder_refuses(cross: CrossEncoder, monkeypatch: pytest.MonkeyPatch):
    for wrong, hint in (([("a", 1)], "pass two str"), (["abc"], r"pass \(query, document\)")):
        with pytest.raises(BadInput, match=hint):
            cross.predict(wrong)
    for option, hint in (({"apply_softmax": True}, "one score"), ({"colour": 1}, "no 'colour'")):
        with pytest.raises(BadOption, match=hint):
            cross.predict([("a", "b")], **option)
    with pytest.raises(BadOption, match="has no fit here"):
        cross.fit  # noqa: B018
    assert not hasattr(cross, "model")

    def not_found(*_: object, **__: object) -> Reranker:
        raise ModelNotFound("no model is called that")

    monkeypatch.setattr(Reranker, "open", not_found)
    with pytest.raises(ModelNotFound, match="such as bge-reranker-v2-m3"):
        CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2")


def test_the_length_of_a_pair_is_said_at_its_opening(monkeypatch: pytest.MonkeyPatch):
    said: list[Settings] = []

    def open_fake(_name: str, *, settings: Settings) -> Reranker:
        said.append(settings)
        return FakeReranker.open(n_ctx=settings.n_ctx or 64)

    monkeypatch.setattr(Reranker, "open", open_fake)
    with CrossEncoder("bge-reranker-v2-m3", max_length=20, device="cpu", num_labels=1) as cross:
        assert cross.max_length == 20
    assert said == [Settings(n_ctx=20, n_gpu_layers=0)]
