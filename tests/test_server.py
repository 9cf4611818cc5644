"""The routes of the server, with a model that is none: shapes, refusals, and no bytes left over."""

from __future__ import annotations

import base64
import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from gguf_embed import BadOption, Block, DoesNotFit, ModelNotFound, NativeFailed
from gguf_embed.engine.backend import BatchLimits
from gguf_embed.engine.pending import Meter, Pending
from gguf_embed.engine.scheduler import Computed
from gguf_embed.index.facts import IndexFacts, Space
from gguf_embed.index.index import Index
from gguf_embed.index.making import Wanted, make_index
from gguf_embed.jobs.cache import VectorCache
from gguf_embed.jobs.cached import space_of
from gguf_embed.plan.candidate import Candidate
from gguf_embed.server.app import application
from gguf_embed.server.asked import Result, Times
from gguf_embed.server.indexes import Indexes, IndexOffer, index_name, offer_for
from gguf_embed.server.limits import Limits
from gguf_embed.server.meters import Meters
from gguf_embed.server.models import Loaded, Models
from gguf_embed.server.offers import Offer, Offers, offer_of
from gguf_embed.server.safety import Keys, hosts_for
from gguf_embed.server.service import Service
from gguf_embed.server.traces import Traces
from gguf_embed.testing import FakeBackend, FakeEmbedder, FakePairBackend, FakeReranker

TEXTS = ["a cat sits", "a dog", "a cat sits", "the moon is far"]
KEY = "k" * 24


def offer(name: str, *, is_reranker: bool = False) -> Offer:
    return Offer(id=name, names=frozenset({name}), model=name, is_reranker=is_reranker)


class Served:
    """An application with fakes in it."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        keys: tuple[str, ...] = (),
        hosts: frozenset[str] | None = None,
        open_model: Callable[[Offer, int | None], FakeEmbedder | FakeReranker] | None = None,
        rerankers: tuple[str, ...] = (),
        origins: tuple[str, ...] = (),
        traces: Traces | None = None,
        **fake: Any,
    ) -> None:
        self.opened: list[str] = []
        self.fake = fake
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="served")
        self.meters = Meters()
        models = Models(
            Offers(
                [
                    offer("fake"),
                    offer("other"),
                    *(offer(name, is_reranker=True) for name in rerankers),
                ]
            ),
            open_model or self._open,
            threads=self.threads,
            keep_alive_s=-1,
            on_microbatch=self.meters.microbatch,
        )
        self.service = Service(models, limits or Limits(), threads=self.threads)
        self.service.ready = True
        self.app = application(
            self.service,
            self.meters,
            keys=Keys(keys),
            hosts=hosts,
            origins=origins,
            traces=traces,
        )
        self.client = TestClient(self.app, base_url="http://localhost")

    def _open(self, offer: Offer, left_bytes: int | None) -> FakeEmbedder | FakeReranker:
        self.opened.append(offer.id)
        kind = FakeReranker if offer.is_reranker else FakeEmbedder
        return kind.open(offer.id, **self.fake)


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(**options: Any) -> Served:
        served = Served(**options)
        made.append(served)
        served.client.__enter__()  # one event loop for all its requests
        return served

    yield start
    for served in made:
        assert served.meters.in_flight == 0
        assert served.client.portal is not None
        served.client.portal.call(served.service.models.close)
        served.client.__exit__(None, None, None)
        served.threads.shutdown()


@pytest.fixture(scope="module")
def direct() -> Iterator[FakeEmbedder]:
    with FakeEmbedder.open() as embedder:
        yield embedder


def floats(rows: object) -> np.ndarray:
    return np.array(rows, np.float64).astype(np.float32)


# -- the cache of vectors ----------------------------------------------------------------------


def test_texts_that_the_cache_knows_are_not_computed(
    serve: Callable[..., Served], direct: FakeEmbedder, tmp_path: Path
):
    computed: list[int] = []

    class Counts(FakeBackend):
        def run(self, sequences: Any, **how: Any) -> Any:
            computed.append(len(sequences))
            return super().run(sequences, **how)

    def ask(texts: Any, **body: Any) -> Any:
        sent = {"input": texts, **body}
        return served.client.post("/v1/embeddings", json=sent).json()

    with VectorCache.open(tmp_path / "vectors.sqlite") as cache:
        served = serve(backend=Counts())
        plain = ask(["a cat", "a dog"])
        served.service.cache = cache
        first = ask(["a cat", "a dog"])
        assert first == plain
        n = sum(computed)
        assert n == 4
        again = ask(["a dog", "a bird", "a cat"])
        assert sum(computed) == n + 1
        rows = [each["embedding"] for each in again["data"]]
        np.testing.assert_array_equal(floats(rows), direct.encode(["a dog", "a bird", "a cat"]))
        assert again["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] * 3 // 2
        assert ask(["a cat"], input_type="query") != ask(["a cat"])  # another space
        n = sum(computed)
        assert "data" in ask([[1, 2, 3]])  # token ids are no text
        assert "data" in ask([[1, 2, 3]])
        assert sum(computed) == n + 2
        assert served.client.post("/v1/embeddings", json={"input": "x " * 999}).status_code == 400
        space = space_of(direct)
        assert sorted(cache.find(space, ["a dog", "no", "a cat"], max_tokens=99)) == [0, 2]


# -- a call that no thread waits for -------------------------------------------------------------


class _Nan(FakeBackend):
    """Has no vector for texts of two words."""

    def _vector(self, ids: Any) -> np.ndarray:
        return super()._vector(ids) * (np.nan if len(ids) == 4 else 1)


def computed(embedder: FakeEmbedder, texts: list[str], **options: Any) -> Block:
    done = threading.Event()
    pending = embedder.prepare(texts, **options)
    pending.submit(done.set)
    assert done.wait(10)
    return pending.result()


@pytest.mark.parametrize(
    "options", [{}, {"normalize": False}, {"dimensions": 32}, {"truncate": "end"}]
)
def test_one_text_is_put_together_as_several_are(options: dict[str, Any]):
    with FakeEmbedder.open(backend=_Nan()) as embedder:
        for text in ("a cat sits", "", "long " * 40 if options.get("truncate") else "x"):
            one = computed(embedder, [text], **options)
            two = computed(embedder, [text, "another one here"], **options)
            np.testing.assert_array_equal(one.vectors, two.vectors[:1])
            assert one.vectors.dtype == two.vectors.dtype
            assert one.token_counts == two.token_counts[:1]
            assert one.truncated == two.truncated[:1]
        with pytest.raises(NativeFailed, match="row 0"):
            computed(embedder, ["two words"], **options)
        (failed,) = computed(embedder, ["two words"], on_error="skip", **options).failed
        assert (failed.row, failed.n_tokens) == (0, 4)


# -- OpenAI ------------------------------------------------------------------------------------


def test_openai_gives_the_vectors_of_the_engine_to_the_bit(
    serve: Callable[..., Served], direct: FakeEmbedder
):
    client = serve().client
    answer = client.post("/v1/embeddings", json={"model": "fake", "input": TEXTS})
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["object"], said["model"]) == ("list", "fake")
    assert [each["index"] for each in said["data"]] == [0, 1, 2, 3]
    expected = direct.encode(TEXTS)
    np.testing.assert_array_equal(floats([each["embedding"] for each in said["data"]]), expected)
    n_tokens = int(direct.count_tokens(TEXTS).sum())
    assert said["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}

    body = {"model": "fake", "input": TEXTS, "encoding_format": "base64", "user": "u"}
    rows = client.post("/v1/embeddings", json=body).json()["data"]
    vectors = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in rows]
    np.testing.assert_array_equal(np.stack(vectors), expected)


def test_openai_takes_token_ids_with_or_without_the_special_ones(
    serve: Callable[..., Served], direct: FakeEmbedder
):
    client = serve().client
    ids = [direct.tokenize(text) for text in TEXTS]
    for given in (ids, [each[1:-1] for each in ids], ids[0]):
        rows = client.post("/v1/embeddings", json={"model": "fake", "input": given}).json()["data"]
        expected = direct.encode(TEXTS if given is not ids[0] else TEXTS[:1])
        np.testing.assert_array_equal(floats([each["embedding"] for each in rows]), expected)
    for given, why in (
        ([-1], "none of this model"),
        ([[]], "pass all texts"),
        ([2**40], "pass all"),
    ):
        answer = client.post("/v1/embeddings", json={"model": "fake", "input": given})
        assert answer.status_code == 400
        assert why in answer.json()["error"]["message"]
    body = {"model": "fake", "input": ids, "input_type": "query"}
    answer = client.post("/v1/embeddings", json=body)
    assert (answer.status_code, "a prompt goes" in answer.text) == (400, True)


def test_openai_options(serve: Callable[..., Served], direct: FakeEmbedder):
    client = serve().client

    def vectors(**options: object) -> np.ndarray:
        answer = client.post("/v1/embeddings", json={"model": "fake", "input": "x x", **options})
        assert answer.status_code == 200, answer.text
        return floats([answer.json()["data"][0]["embedding"]])

    assert vectors(dimensions=8).shape == (1, 8)
    query = direct.encode_query(["x x"])
    np.testing.assert_array_equal(vectors(input_type="query"), query)
    np.testing.assert_array_equal(vectors(prompt_name="query"), query)
    assert not np.isclose(np.linalg.norm(vectors(normalize=False)), 1)
    long = "a b c " * 40
    answer = client.post("/v1/embeddings", json={"model": "fake", "input": [long, "x"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "text_too_long")
    body = {"model": "fake", "input": [long, "x"], "truncate": "end"}
    answer = client.post("/v1/embeddings", json=body)
    assert (answer.status_code, answer.headers["x-truncated"]) == (200, "1")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "fake"}, 400, "invalid_request"),
        ({"model": "fake", "input": []}, 400, "empty_input"),
        ({"model": "fake", "input": [1, "x"]}, 400, "invalid_request"),
        ({"model": "fake", "input": [None]}, 400, "invalid_request"),
        ({"model": "fake", "input": {"a": 1}}, 400, "invalid_request"),
        ({"model": "fake", "input": "x", "dimensions": 0}, 400, "invalid_request"),
        ({"model": "fake", "input": "x", "dimensions": 10**30}, 400, "invalid_request"),
        ({"model": "fake", "input": "x", "encoding_format": "hex"}, 400, "invalid_request"),
        ({"model": "fake", "input": "x", "prompt_name": "poem"}, 400, "invalid_request"),
        ({"model": "nothing", "input": "x"}, 404, "model_not_found"),
        ({"model": "/etc/passwd.gguf", "input": "x"}, 404, "model_not_found"),
    ],
)
def test_openai_refusals(serve: Callable[..., Served], body: object, status: int, code: str):
    answer = serve().client.post("/v1/embeddings", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["type"] == "invalid_request_error"


def test_openai_lists_models(serve: Callable[..., Served]):
    client = serve().client
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["fake", "other"]
    assert client.get("/v1/models/other").json()["id"] == "other"
    assert client.get("/v1/models/none").status_code == 404


# -- Ollama ------------------------------------------------------------------------------------


def test_ollama_embeds_and_cuts(serve: Callable[..., Served], direct: FakeEmbedder):
    client = serve().client
    said = client.post("/api/embed", json={"model": "fake:latest", "input": TEXTS}).json()
    np.testing.assert_array_equal(floats(said["embeddings"]), direct.encode(TEXTS))
    assert said["model"] == "fake:latest"
    assert said["prompt_eval_count"] == direct.count_tokens(TEXTS).sum()
    assert said["total_duration"] >= said["load_duration"] > 0

    long = "a b c " * 40
    answer = client.post("/api/embed", json={"model": "fake", "input": long})
    assert (answer.status_code, answer.headers["x-truncated"]) == (200, "1")
    body = {"model": "fake", "input": long, "truncate": False}
    answer = client.post("/api/embed", json=body)
    assert answer.status_code == 400
    assert "longer than 32 tokens" in answer.json()["error"]

    said = client.post("/api/embeddings", json={"model": "fake", "prompt": "a cat"}).json()
    np.testing.assert_array_equal(
        floats(said["embedding"]), direct.encode("a cat", normalize=False)
    )
    assert client.post("/api/embed", json={"model": "fake", "input": []}).json()["embeddings"] == []
    answer = client.post("/api/embed", json={"model": "none", "input": "x"})
    assert (answer.status_code, "try pulling it" in answer.json()["error"]) == (404, True)


def test_ollama_lists_shows_and_refuses_to_pull(serve: Callable[..., Served]):
    served = serve()
    client = served.client
    names = [each["name"] for each in client.get("/api/tags").json()["models"]]
    assert names == ["fake:latest", "other:latest"]
    assert client.get("/api/ps").json() == {"models": []}
    client.post("/api/embed", json={"model": "other", "input": "x", "keep_alive": "1h"})
    (running,) = client.get("/api/ps").json()["models"]
    assert running["name"] == "other:latest"
    assert running["expires_at"].startswith("20")
    assert client.post("/api/show", json={"model": "fake"}).json()["capabilities"] == ["embedding"]
    assert client.post("/api/pull", json={"model": "bge-m3"}).status_code == 403
    assert client.get("/api/version").json()["version"]
    assert client.head("/").status_code == 200
    assert client.get("/").text == "gguf-embed is running"


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("90", 90),
        (30, 30),
        (-1, -1),
        ("-1m", -1),
        (0, 0),
        (1e300, 3e9),
    ],
)
def test_ollama_durations(said: str | float, seconds: float):
    from gguf_embed.server import ollama

    kept = ollama.seconds(said)
    assert kept is not None
    assert kept == seconds or (seconds > 1e9 and kept == ollama.FOREVER)


# -- text-embeddings-inference -------------------------------------------------------------------


def test_tei_routes(serve: Callable[..., Served], direct: FakeEmbedder):
    client = serve().client
    for path in ("/embed", "/"):
        answer = client.post(path, json={"inputs": TEXTS})
        np.testing.assert_array_equal(floats(answer.json()), direct.encode(TEXTS))
    assert answer.headers["x-compute-tokens"] == str(direct.count_tokens(TEXTS).sum())
    one = client.post("/embed", json={"inputs": "x", "normalize": False, "prompt_name": "query"})
    expected = direct.encode(["x"], prompt_name="query", normalize=False)
    np.testing.assert_array_equal(floats(one.json()), expected)
    (tokens,) = client.post("/embed_all", json={"inputs": "a cat"}).json()
    np.testing.assert_array_equal(floats(tokens), direct.token_vectors("a cat"))
    ids = direct.tokenize("a cat")
    answer = client.post("/embed_all", json={"inputs": [ids]})
    np.testing.assert_array_equal(floats(answer.json()[0]), floats(tokens))
    answer = client.post("/embed_all", json={"inputs": ["a cat", "a " * 50], "truncate": True})
    assert len(answer.json()[1]) == 32
    told = {"x-truncated": "1", "x-compute-tokens": str(len(ids) + 32)}
    assert {name: answer.headers[name] for name in told} == told
    body = {"inputs": {"source_sentence": "a cat", "sentences": ["a dog", "a cat"]}}
    scores = client.post("/similarity", json=body).json()
    np.testing.assert_allclose(
        scores, direct.similarity(*map(direct.encode, ("a cat", ["a dog", "a cat"])))[0], rtol=1e-6
    )
    info = client.get("/info").json()
    assert (info["max_input_length"], info["model_type"]) == (
        32,
        {"embedding": {"pooling": "mean"}},
    )
    long = "a b c " * 40
    answer = client.post("/embed", json={"inputs": long})
    assert (answer.status_code, answer.json()["error_type"]) == (413, "validation")
    left = {"inputs": long, "truncate": True, "truncation_direction": "Left"}
    answer = client.post("/embed", json=left)
    np.testing.assert_array_equal(floats(answer.json()), direct.encode([long], truncate="start"))
    answer = client.post("/embed", json={"inputs": [""]})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "empty")


# -- Cohere and Jina -----------------------------------------------------------------------------


def test_cohere_encodings(serve: Callable[..., Served], direct: FakeEmbedder):
    client = serve().client
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    body = {"model": "fake", "texts": TEXTS, "input_type": "search_query", "embedding_types": types}
    said = client.post("/v2/embed", json=body).json()
    vectors = direct.encode_query(TEXTS)
    got = said["embeddings"]
    np.testing.assert_array_equal(floats(got["float"]), vectors)
    decoded = [np.frombuffer(base64.b64decode(each), "<f4") for each in got["base64"]]
    np.testing.assert_array_equal(np.stack(decoded), vectors)
    int8 = np.array(got["int8"])
    assert int8.min() >= -128
    assert int8.max() <= 127
    np.testing.assert_array_equal(int8 + 128, got["uint8"])
    np.testing.assert_allclose(int8 / 127 * 4 / 8, np.clip(vectors, -0.505, 0.5), atol=0.003)
    bits = np.unpackbits(np.array(got["ubinary"], np.uint8), axis=1)
    np.testing.assert_array_equal(bits, vectors > 0)
    np.testing.assert_array_equal(np.array(got["binary"]) + 128, got["ubinary"])
    assert said["response_type"] == "embeddings_by_type"
    body = {"model": "fake", "texts": ["x"], "input_type": "clustering"}  # no prompt of that name
    got = client.post("/v2/embed", json=body).json()["embeddings"]["float"]
    np.testing.assert_array_equal(floats(got), direct.encode(["x"]))


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v2/rerank", {"query": "q", "documents": ["a"]}, "message"),
        ("/v1/rerank", {"query": "q", "documents": [{"text": "a"}]}, "message"),
        ("/rerank", {"query": "q", "texts": ["a"]}, "error"),
    ],
)
def test_reranking_needs_a_reranker(
    serve: Callable[..., Served], path: str, body: object, message: str
):
    answer = serve().client.post(path, json=body)
    assert answer.status_code == 501
    assert "no reranker is loaded" in answer.json()[message]


QUERY = "where is the cat"
DOCUMENTS = ["a dog barks", "the cat is there", "the cat", "a dog barks"]


@pytest.fixture(scope="module")
def judge() -> Iterator[FakeReranker]:
    with FakeReranker.open() as reranker:
        yield reranker


def best(scores: np.ndarray) -> list[int]:
    return np.argsort(-scores, kind="stable").tolist()


def test_tei_reranks(serve: Callable[..., Served], judge: FakeReranker):
    client = serve(rerankers=("judge", "second")).client
    expected = judge.score(QUERY, DOCUMENTS)
    body = {"query": QUERY, "texts": DOCUMENTS}
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 200, answer.text
    rows = answer.json()
    assert [row["index"] for row in rows] == best(expected) == [1, 2, 0, 3]
    np.testing.assert_array_equal(floats([row["score"] for row in rows]), -np.sort(-expected))
    assert {*rows[0]} == {"index", "score"}
    assert int(answer.headers["x-compute-tokens"]) > 0
    n_chars = sum(len(QUERY) + len(document) for document in DOCUMENTS)
    assert answer.headers["x-compute-characters"] == str(n_chars)
    rows = client.post("/rerank", json={**body, "raw_scores": True, "return_text": True}).json()
    raw = judge.score(QUERY, DOCUMENTS, raw=True)
    np.testing.assert_array_equal(floats([row["score"] for row in rows]), -np.sort(-raw))
    assert [row["text"] for row in rows] == [DOCUMENTS[row["index"]] for row in rows]

    long = {"query": QUERY, "texts": ["a " * 100]}
    answer = client.post("/rerank", json=long)
    assert (answer.status_code, answer.json()["error_type"]) == (413, "validation")
    answer = client.post("/rerank", json={**long, "truncate": True})
    assert (answer.status_code, answer.headers["x-truncated"]) == (200, "1")
    assert client.post("/rerank", json={"query": "q", "texts": []}).status_code == 400


def test_cohere_and_jina_rerank(serve: Callable[..., Served], judge: FakeReranker):
    client = serve(rerankers=("judge", "second")).client
    expected = judge.score(QUERY, DOCUMENTS)
    body = {"model": "second", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}
    said = client.post("/v2/rerank", json=body).json()
    assert [row["index"] for row in said["results"]] == best(expected)[:2]
    scores = [row["relevance_score"] for row in said["results"]]
    np.testing.assert_array_equal(floats(scores), -np.sort(-expected)[:2])
    assert said["id"]
    assert said["meta"]["billed_units"] == {"search_units": 1}
    answer = client.post("/v2/rerank", json={**body, "top_n": 0})
    assert answer.status_code == 400
    assert "top_n" in answer.json()["message"]
    assert client.post("/v2/rerank", json={**body, "documents": []}).status_code == 400

    given = [{"text": text, "title": "the cat", "id": row} for row, text in enumerate(DOCUMENTS)]
    body = {"query": QUERY, "documents": given, "return_documents": True}
    said = client.post("/v1/rerank", json=body).json()
    assert [row["document"]["id"] for row in said["results"]] == best(expected)
    assert (said["model"], said["object"]) == ("judge", "list")
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] > 0
    said = client.post("/v1/rerank", json={**body, "rank_fields": ["title", "text"]}).json()
    titled = judge.score(QUERY, [f"the cat\n{text}" for text in DOCUMENTS])
    scores = [row["relevance_score"] for row in said["results"]]
    np.testing.assert_array_equal(floats(scores), -np.sort(-titled))
    answer = client.post("/v1/rerank", json={**body, "rank_fields": ["author"]})
    assert (answer.status_code, "author" in answer.json()["message"]) == (400, True)
    answer = client.post("/v1/rerank", json={**body, "documents": [{"title": "x"}]})
    assert (answer.status_code, "`text`" in answer.json()["message"]) == (400, True)


def test_who_is_asked_for_what_it_does_not_give_says_so(serve: Callable[..., Served]):
    client = serve(rerankers=("judge",)).client
    body = {"model": "judge", "input": "x"}
    for path, message in (("/v1/embeddings", "error"), ("/api/embed", "error")):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert "judge is a reranker: it gives scores, not vectors" in str(answer.json()[message])
    answer = client.post("/v2/rerank", json={"model": "fake", "query": "q", "documents": ["a"]})
    assert answer.status_code == 400
    assert "fake gives vectors, not scores; the rerankers here: judge" in answer.json()["message"]
    answer = client.post("/v2/rerank", json={"model": "x", "query": "q", "documents": ["a"]})
    assert answer.status_code == 404


def test_rerankers_come_and_go_beside_embedders(serve: Callable[..., Served]):
    served = serve(rerankers=("judge", "second"))
    client = served.client
    for model in ("judge", "second", "judge"):
        body = {"model": model, "query": QUERY, "documents": DOCUMENTS}
        assert client.post("/v2/rerank", json=body).status_code == 200
    client.post("/v1/embeddings", json={"input": "x"})
    assert served.opened == ["judge", "second", "fake"]
    gives = {each["id"]: each["gives"] for each in client.get("/status").json()["models"]}
    assert gives == {"judge": "scores", "second": "scores", "fake": "vectors"}
    gives = {each["id"]: each["gives"] for each in client.get("/v1/models").json()["data"]}
    assert gives == {"fake": "vectors", "other": "vectors", "judge": "scores", "second": "scores"}
    assert client.get("/info").json()["model_type"] == {"embedding": {"pooling": "mean"}}
    metrics = client.get("/metrics").text
    assert 'te_request_duration_count{dialect="cohere",model="judge"} 2.0' in metrics
    assert len(client.get("/api/ps").json()["models"]) == 3
    answer = client.post("/api/show", json={"model": "judge"})
    assert answer.json()["capabilities"] == []


def test_a_server_of_rerankers_alone(serve: Callable[..., Served]):
    served = serve(rerankers=("judge",))
    served.service.models.offers = Offers([offer("judge", is_reranker=True)])
    assert "reranker" in served.client.get("/info").json()["model_type"]
    answer = served.client.post("/embed", json={"inputs": "x"})
    assert (answer.status_code, "is a reranker" in answer.json()["error"]) == (413, True)


def test_scores_and_many_vectors_are_made_beside_the_loop(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
):
    def open_model(offer: Offer, left: int | None) -> FakeEmbedder | FakeReranker:
        return FakeReranker.open() if offer.is_reranker else FakeEmbedder.open(dim=4096)

    served = serve(rerankers=("judge",), open_model=open_model)
    threads: set[str] = set()
    result = Pending[Any].result

    def noted(pending: Pending[Any]) -> Any:
        threads.add(threading.current_thread().name[:6])
        return result(pending)

    monkeypatch.setattr(Pending, "result", noted)
    body = {"query": QUERY, "documents": DOCUMENTS}
    assert served.client.post("/v2/rerank", json=body).status_code == 200
    many = {"input": [f"text {n}" for n in range(20)]}
    assert served.client.post("/v1/embeddings", json=many).status_code == 200
    assert threads == {"served"}


def test_a_pair_without_a_score_is_named(serve: Callable[..., Served]):
    class Failing(FakePairBackend):
        def _vector(self, ids: Any) -> np.ndarray:
            vector = super()._vector(ids)
            return vector * np.nan if vector[0] == 1 else vector

    client = serve(
        open_model=lambda offer, left: FakeReranker.open(backend=Failing()), rerankers=("judge",)
    ).client
    body = {"query": QUERY, "documents": ["a dog", QUERY]}
    answer = client.post("/v2/rerank", json=body)
    assert (answer.status_code, "row 1" in answer.json()["message"]) == (500, True)
    assert client.post("/v2/rerank", json={**body, "documents": ["a dog"]}).status_code == 200


# -- indexes -------------------------------------------------------------------------------------


@pytest.fixture
def searched(serve: Callable[..., Served], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """A server with the index `handbook`, made by the fake."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "refunds.md").write_text(
        "# Refunds\n\nWe refund every order within ten days.\n\n## Late\n\nA late parcel too.\n"
    )
    (folder / "travel.md").write_text("# Travel\n\nTrains are booked by the office.\n")
    place = tmp_path / "handbook.index"
    with FakeEmbedder.open() as embedder:
        make_index(place, embedder, Wanted(folders={folder: "rules"}, chunk_tokens=20), model="f")
    offer = IndexOffer(name=index_name(str(place)), place=str(place), model="fake")
    indexes = Indexes.open([offer], lambda place: Index.open(Path(place)))

    def start(**options: Any) -> Served:
        served = serve(**options)
        served.service.indexes = indexes
        return served

    yield start
    indexes.close()


def test_an_index_is_searched(searched: Callable[..., Served]):
    client = searched(rerankers=("judge",)).client
    (listed,) = client.get("/gguf-embed/v1/indexes").json()["indexes"]
    assert (listed["name"], listed["model"], listed["n_files"]) == ("handbook", "fake", 2)
    assert listed["folders"] == ["rules"]
    assert listed["metadata_keys"] == ["ext", "modified"]

    def asked(**body: object) -> list[dict[str, Any]]:
        answer = client.post("/gguf-embed/v1/search", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["index"] == "handbook"
        return answer.json()["results"]

    best = asked(query="who has trains booked by the office")[0]
    assert (Path(best["file"]).name, best["first_line"], best["last_line"]) == ("travel.md", 1, 3)
    assert (best["headings"], best["about"]) == (["Travel"], "rules")
    assert 0.5 < best["score"] <= 1
    assert best["text"].strip().endswith("by the office.")
    assert len(asked(query="order", index="handbook", top=1)) == 1
    (late,) = asked(query="parcel", by="words")
    assert (late["headings"], late["similarity"]) == (["Refunds"], None)
    assert asked(query="trains", paths=["refunds*"], by="words") == []
    assert len(asked(query="trains", where=["ext=md", "modified>=2000"], by="words")) == 1
    assert asked(query="trains", where=["modified<=2000"]) == []
    judged = asked(query="refund order late parcel", rerank=True, top=2)
    assert judged[0]["score"] > judged[1]["score"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"query": "x", "index": "diary"}, 404, "there are: handbook"),
        ({"query": " "}, 400, "the question is empty"),
        ({"query": "x", "top": 0}, 400, "top"),
        ({"query": "x", "by": "feeling"}, 400, "by"),
        ({"query": "x " * 600_000}, 413, "characters"),
        ({"query": "x", "rerank": True}, 501, "no reranker"),
        ({"query": "x", "where": ["lang=en"]}, 400, "there are ext, modified"),
        ({"query": "x", "where": ["lang"]}, 400, "KEY=VALUE"),
    ],
)
def test_questions_that_are_refused(
    searched: Callable[..., Served], body: object, status: int, message: str
):
    answer = searched().client.post("/gguf-embed/v1/search", json=body)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_an_index_is_behind_the_key_and_the_host(searched: Callable[..., Served]):
    served = searched(keys=(KEY,), hosts=hosts_for("127.0.0.1", ()))
    body = {"query": "trains"}
    assert served.client.post("/gguf-embed/v1/search", json=body).status_code == 401
    assert served.client.get("/gguf-embed/v1/indexes").status_code == 401
    headers = {"authorization": f"Bearer {KEY}"}
    assert served.client.post("/gguf-embed/v1/search", json=body, headers=headers).json()["results"]
    elsewhere = {**headers, "host": "evil.example"}
    answer = served.client.post("/gguf-embed/v1/search", json=body, headers=elsewhere)
    assert answer.status_code == 403


def ask_as_agent(served: Served, path: str, headers: dict[str, str]) -> dict[str, Any]:
    """What the client of the MCP SDK gets over HTTP."""
    mcp = pytest.importorskip("mcp")
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    async def talk() -> dict[str, Any]:
        transport = httpx2.ASGITransport(app=served.app)
        http = httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)
        place = streamable_http_client(f"http://localhost{path}", http_client=http)
        async with mcp.Client(place) as client:
            tools = (await client.list_tools()).tools
            return {
                "server": client.server_info.name,
                "tools": [tool.name for tool in tools],
                "read_only": [tool.annotations.read_only_hint for tool in tools],
                "found": await client.call_tool("search", {"query": "late parcel", "limit": 1}),
                "words": await client.call_tool("search", {"query": "trains", "by": "words"}),
                "unknown": await client.call_tool("search", {"query": "x", "colour": "red"}),
                "got": await client.call_tool("get", {"file": "travel.md", "first_line": 3}),
                "status": await client.call_tool("status", {}),
            }

    assert served.client.portal is not None
    return served.client.portal.call(talk)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/mcp", "/mcp/handbook"])
def test_an_agent_asks_over_http(searched: Callable[..., Served], path: str):
    served = searched(keys=(KEY,), hosts=hosts_for("127.0.0.1", ()))
    said = ask_as_agent(served, path, {"authorization": f"Bearer {KEY}"})
    assert (said["server"], said["tools"]) == ("gguf-embed", ["search", "get", "status"])
    assert said["read_only"] == [True] * 3
    (hit,) = said["found"].structured_content["results"]
    assert (hit["file"].endswith("texts/refunds.md"), hit["about"]) == (True, "rules")
    assert said["words"].structured_content["results"][0]["file"].endswith("travel.md")
    assert said["unknown"].is_error
    assert "search has no parameter 'colour'" in said["unknown"].content[0].text
    (excerpt,) = said["got"].structured_content["excerpts"]
    assert excerpt["text"] == "Trains are booked by the office."
    assert said["status"].structured_content["n_files"] == 2
    assert served.opened == ["fake"]  # the model of the server, opened once


@pytest.mark.parametrize(
    ("headers", "path", "status", "message"),
    [
        ({}, "/mcp", 401, "a key is needed"),
        ({"host": "evil.example"}, "/mcp", 403, "--allowed-host"),
        ({"origin": "http://evil.example"}, "/mcp", 403, "--cors-origin"),
        ({"origin": "null"}, "/mcp", 403, "--cors-origin"),
        ({"origin": "http://localhost"}, "/mcp", 200, ""),
        ({"origin": "https://page.example"}, "/mcp", 200, ""),
        ({}, "/mcp/minutes", 404, "there are: handbook"),
    ],
)
def test_who_may_not_ask_as_an_agent(
    searched: Callable[..., Served], headers: dict[str, str], path: str, status: int, message: str
):
    pytest.importorskip("mcp")
    hosts = hosts_for("127.0.0.1", ())
    served = searched(keys=(KEY,), hosts=hosts, origins=("https://page.example",))
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    key = {} if status == 401 else {"authorization": f"Bearer {KEY}"}
    accepted = {"accept": "application/json, text/event-stream", **key, **headers}
    answer = served.client.post(path, json=body, headers=accepted)
    assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert served.client.get("/mcp", headers=key).status_code in (401, 405)


def rpc(method: str, **params: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


JSON_OR_EVENTS = {"accept": "application/json, text/event-stream"}


def test_words_open_no_model_for_an_agent(searched: Callable[..., Served]):
    pytest.importorskip("mcp")
    served = searched(hosts=hosts_for("127.0.0.1", ()))

    def search(**arguments: object) -> dict[str, Any]:
        body = rpc("tools/call", name="search", arguments=arguments)
        answer = served.client.post("/mcp", json=body, headers=JSON_OR_EVENTS)
        assert answer.headers["content-length"] == str(len(answer.content))
        return answer.json()["result"]

    assert not search(query="trains", by="words")["isError"]
    assert served.opened == []
    refused = search(query="trains", by="words", where=["colour=red"])
    assert refused["isError"]
    assert "there are ext, modified" in refused["content"][0]["text"]
    assert not search(query="trains")["isError"]
    assert served.opened == ["fake"]


def test_any_page_may_ask_as_an_agent_where_all_are_allowed(searched: Callable[..., Served]):
    pytest.importorskip("mcp")
    served = searched(hosts=hosts_for("127.0.0.1", ()), origins=("*",))
    headers = {**JSON_OR_EVENTS, "origin": "http://evil.example"}
    assert served.client.post("/mcp", json=rpc("tools/list"), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        (JSON_OR_EVENTS, b"{", 400),
        ({"accept": "text/html"}, b"{}", 406),
        ({**JSON_OR_EVENTS, "content-type": "text/plain"}, b"{}", (400, 415)),
    ],
)
def test_what_is_no_message_of_the_protocol(
    searched: Callable[..., Served], headers: dict[str, str], content: bytes, status: object
):
    pytest.importorskip("mcp")
    served = searched(hosts=hosts_for("127.0.0.1", ()))
    given = {"content-type": "application/json", **headers}
    answer = served.client.post("/mcp", content=content, headers=given)
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text


def test_a_message_that_is_too_long_is_refused(searched: Callable[..., Served]):
    pytest.importorskip("mcp")
    most = 5 << 20  # more than the SDK takes where nobody says so
    served = searched(hosts=hosts_for("127.0.0.1", ()), limits=Limits(max_body_bytes=most))
    for text, status in (("x" * (most - 1000), 200), ("x" * most, 413)):
        body = rpc("tools/call", name="search", arguments={"query": text, "by": "words"})
        answer = served.client.post("/mcp", json=body, headers=JSON_OR_EVENTS)
        assert answer.status_code == status, answer.text


def test_without_an_index_a_search_says_how_to_have_one(serve: Callable[..., Served]):
    client = serve().client
    assert client.get("/gguf-embed/v1/indexes").json() == {"indexes": []}
    answer = client.post("/gguf-embed/v1/search", json={"query": "x"})
    assert (answer.status_code, "--index" in answer.json()["error"]) == (404, True)


def test_two_indexes_need_two_names(tmp_path: Path):
    offers = [IndexOffer(name="a", place=f"{n}/a", model="fake") for n in (1, 2)]
    closed: list[object] = []

    class Opened:
        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(self)

    with pytest.raises(BadOption, match="another index is called a"):
        Indexes.open(offers, lambda place: Opened())  # type: ignore[arg-type,return-value]
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("model", "quant", "id_"),
    [
        ("qwen3-embedding:0.6b", "Q4_K_M", "qwen3-embedding-0.6b:Q4_K_M"),
        ("owner/repo:Q8_0", "Q8_0", "owner/repo:Q8_0"),
        ("/models/mine.gguf", "F16", "mine"),
    ],
)
def test_the_model_of_an_index(model: str, quant: str, id_: str):
    space = Space(
        model=model,
        model_id="m",
        quant=quant,
        fingerprint="f",
        sha256="s",
        pooling="mean",
        prompt="",
        dim=3,
    )
    facts = IndexFacts(format=1, space=space, chunk_tokens=10, overlap=0, made_by="0")
    found = offer_for(facts)
    assert (found.id, found.quant) == (id_, None if model.endswith(".gguf") else quant)


# -- who may ask, and how much -------------------------------------------------------------------


def test_keys(serve: Callable[..., Served]):
    client = serve(keys=(KEY, "j" * 30)).client
    body = {"model": "fake", "input": "x"}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
        answer = client.post("/v1/embeddings", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": "j" * 30}):
        assert client.post("/v1/embeddings", json=body, headers=headers).status_code == 200
    assert client.get("/health").status_code == 200
    assert client.get("/metrics").status_code == 401


def test_another_host_is_refused(serve: Callable[..., Served]):
    client = serve(hosts=hosts_for("127.0.0.1", ["gpu.lan"])).client
    for host, status in (
        *(("localhost:11434", 200), ("[::1]:80", 200), ("GPU.lan", 200), ("127.0.0.1", 200)),
        *(("evil.example", 403), ("localhost.evil.example", 403), ("", 403)),
    ):
        assert client.get("/api/version", headers={"host": host}).status_code == status, host


def test_pages_of_other_origins_are_refused_unless_named(serve: Callable[..., Served]):
    asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
    headers = serve().client.options("/v1/embeddings", headers=asked).headers
    assert "access-control-allow-origin" not in headers
    served = serve(origins=("http://page.example",))
    headers = served.client.options("/v1/embeddings", headers=asked).headers
    assert headers["access-control-allow-origin"] == "http://page.example"


def test_what_is_too_much_is_refused(serve: Callable[..., Served]):
    limits = Limits(max_body_bytes=2000, max_texts=3, max_text_chars=50)
    client = serve(limits=limits).client

    def refused(**body: object) -> str:
        answer = client.post("/v1/embeddings", json={"model": "fake", **body})
        assert answer.status_code == 413, answer.text
        return answer.json()["error"]["message"]

    assert "4 texts" in refused(input=["x"] * 4)
    assert "51 characters" in refused(input="x" * 51)
    assert "a body of" in refused(input="x" * 3000)

    def parts() -> Iterator[bytes]:  # without a length
        yield b'{"input": "'
        for _ in range(40):
            yield b"x" * 100

    answer = client.post("/v1/embeddings", content=parts())
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "fake", "input": "x"',
        b'{"model": "fake", "input": NaN}',
        b'{"model": "fake", "input": "\xff\xfe"}',
        b'{"model": "fake", "input": "\\ud800"}',
        b'{"model": "fake", "input": "x", "dimensions": 1e400}',
        b'{"model": "fake", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'"fake"',
        b"[]",
    ],
    ids=range(10),
)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed", "/embed", "/v2/embed"])
def test_what_is_no_request_is_refused(serve: Callable[..., Served], path: str, body: bytes):
    answer = serve().client.post(path, content=body)
    assert answer.status_code in (400, 413), answer.text
    assert answer.json()
    assert answer.headers["content-type"] == "application/json"


def test_a_full_queue_is_refused_with_the_time_to_wait(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
):
    from gguf_embed.server.failures import Refused

    limits = Limits(max_queue_tokens=100)
    limits.check_queue(0, 10_000, 0.0)  # alone it is always taken
    limits.check_queue(50, 50, 0.0)
    with pytest.raises(Refused) as caught:
        limits.check_queue(90, 11, 45.0)
    assert caught.value.retry_s == 2
    slow = Limits(max_queue_tokens=100, request_s=20)
    slow.check_queue(15, 15, 3.0)
    with pytest.raises(Refused, match="the queue takes 30"):  # what is done before it is late
        slow.check_queue(16, 15, 3.0)

    monkeypatch.setattr(Meter, "waiting_tokens", 101)
    served = serve(limits=limits)
    answer = served.client.post("/api/embed", json={"model": "fake", "input": "x"})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) == 60
    assert "try again in" in answer.json()["error"]


def test_how_much_a_model_does_is_told_by_its_fastest_large_microbatch():
    limits = BatchLimits(max_tokens=100, max_seqs=4, n_contexts=3)
    model = FakeEmbedder.open("fake", backend=FakeBackend(limits=limits))
    loaded = Loaded(offer=offer_of("fake"), model=model, load_s=0, keep_alive_s=0)
    for n_computed, n_contexts, seconds, most in (
        (3, 1, 1.0, 0.0),
        (100, 3, 1.0, 100.0),  # all contexts' threads worked on it
        (100, 1, 1.0, 300.0),
        (100, 1, 2.0, 300.0),
    ):
        batch = {"n_texts": 1, "n_tokens": 1000, "n_computed": n_computed}
        loaded.computed(Computed(**batch, n_contexts=n_contexts, seconds=seconds))
        assert loaded.most_tokens_per_s == most


def test_until_a_microbatch_tells_it_the_plan_says_how_much_a_model_does(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Candidate, "tokens_per_s", 200.0)
    model = FakeEmbedder.open("fake")
    loaded = Loaded(offer=offer_of("fake"), model=model, load_s=0, keep_alive_s=0)
    assert loaded.most_tokens_per_s == 200.0
    batch = {"n_texts": 1, "n_tokens": 100, "n_computed": 100, "n_contexts": 1}
    loaded.computed(Computed(**batch, seconds=1.0))
    assert loaded.most_tokens_per_s == 100.0


def test_a_request_takes_no_longer_than_it_may(serve: Callable[..., Served]):
    import threading

    let_go = threading.Event()

    class Slow(FakeBackend):
        def run(self, sequences: Any, **how: Any) -> Any:
            let_go.wait()
            return super().run(sequences, **how)

    served = serve(
        limits=Limits(request_s=0.05),
        open_model=lambda offer, left: FakeEmbedder.open(offer.id, backend=Slow()),
    )
    answer = served.client.post("/v1/embeddings", json={"model": "fake", "input": "x"})
    let_go.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


@pytest.mark.parametrize(
    ("error", "status", "tei", "code"),
    [
        (NativeFailed("row 0: llama.cpp dies of this text"), 500, 424, "engine_failed"),
        (DoesNotFit("needs 9", needed_bytes=9, free_bytes=1), 503, 503, "model_does_not_fit"),
        (ModelNotFound("nowhere"), 404, 404, "model_not_found"),
        (ZeroDivisionError("secret"), 500, 500, "internal_error"),
    ],
)
def test_errors_in_each_shape(
    serve: Callable[..., Served], error: Exception, status: int, tei: int, code: str
):
    def fail(offer: Offer, left_bytes: int | None) -> FakeEmbedder:
        raise error

    client = serve(open_model=fail).client
    answers = [
        client.post("/v1/embeddings", json={"model": "fake", "input": "x"}),
        client.post("/api/embed", json={"model": "fake", "input": "x"}),
        client.post("/embed", json={"inputs": "x"}),
        client.post("/v2/embed", json={"model": "fake", "texts": ["x"]}),
    ]
    assert [each.status_code for each in answers] == [status, status, tei, status]
    assert answers[0].json()["error"]["code"] == code
    assert {*answers[1].json()} == {"error"}
    assert {*answers[2].json()} == {"error", "error_type"}
    assert {*answers[3].json()} == {"id", "message"}
    assert all("secret" not in each.text for each in answers)


# -- models ------------------------------------------------------------------------------------


def test_models_are_loaded_once_and_leave_when_they_should(serve: Callable[..., Served]):
    served = serve()
    client = served.client
    for model in ("fake", "other", "fake", "other"):
        client.post("/api/embed", json={"model": model, "input": "x"})
    assert served.opened == ["fake", "other"]
    client.post("/api/embed", json={"model": "fake", "input": "x", "keep_alive": 0})
    wait_until(lambda: len(client.get("/api/ps").json()["models"]) == 1)
    client.post("/api/embed", json={"model": "fake", "input": "x"})
    assert served.opened == ["fake", "other", "fake"]


def test_the_least_recently_used_model_makes_room(serve: Callable[..., Served]):
    open_now: list[str] = []
    closed: list[str] = []

    class Closing(FakeEmbedder):
        def close(self) -> None:
            closed.append(self.n_ctx and open_now.pop(0))
            super().close()

    def open_model(offer: Offer, left_bytes: int | None) -> FakeEmbedder:
        if open_now:
            raise DoesNotFit("needs 2, 1 free", needed_bytes=2, free_bytes=1)
        open_now.append(offer.id)
        return Closing.open(offer.id)

    client = serve(open_model=open_model).client
    for model in ("fake", "other", "other", "fake"):
        answer = client.post("/api/embed", json={"model": model, "input": "x"})
        assert answer.status_code == 200, answer.text
    assert closed == ["fake", "other"]


def wait_until(true: Callable[[], bool]) -> None:
    import time

    while not true():
        time.sleep(0.005)


# -- what is seen from outside --------------------------------------------------------------------


def test_health_ready_status_and_metrics(serve: Callable[..., Served]):
    served = serve()
    client = served.client
    assert client.get("/health").text == "ok"
    assert client.get("/ready").status_code == 200
    served.service.ready = False
    assert client.get("/ready").status_code == 503
    client.post("/v1/embeddings", json={"model": "fake", "input": TEXTS})
    client.post("/v1/embeddings", json={"model": "fake"})
    metrics = client.get("/metrics").text
    labels = 'dialect="openai",model="fake"'
    for line in (
        f"te_request_duration_count{{{labels}}} 1.0",
        f"te_request_queue_duration_count{{{labels}}} 1.0",
        f"gguf_embed_texts_total{{{labels}}} 4.0",
        'te_batch_next_size_sum{model="fake"} 3.0',  # two of the texts are the same
        'te_request_failure{dialect="openai",err="invalid_request"} 1.0',
        'gguf_embed_responses_total{dialect="openai",status="400"} 1.0',
        "gguf_embed_models_loaded 1.0",
    ):
        sorted_ = line if line in metrics else line.replace(labels, 'model="fake",dialect="openai"')
        assert sorted_ in metrics, line
    status = client.get("/status").json()
    assert status["models"][0]["id"] == "fake"
    assert status["requests_in_flight"] == 1


def test_values_are_counted_as_prometheus_counts_them():
    """Against its own client, whose counting is too slow for every request."""
    registry = CollectorRegistry()
    labels = ("model", "dialect")
    bounds = (
        *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
    )
    duration = Histogram(
        "te_request_duration",
        "Seconds of a request that a model computes",
        labels,
        buckets=bounds,
        registry=registry,
    )
    texts = Counter("gguf_embed_texts", "Texts embedded or scored", labels, registry=registry)
    meters = Meters()
    rng = random.Random(0)
    for _ in range(500):
        seconds = rng.choice([*bounds, 0.0, 1e4, rng.lognormvariate(0, 3)])
        model, dialect, n = rng.choice("ab"), rng.choice("cd"), rng.randrange(9)
        times = Times(total_s=seconds, load_s=0, tokenize_s=0, queue_s=0, compute_s=0)
        done = Result(
            model=model,
            served=model,
            token_counts=np.ones(n, np.int32),
            n_tokens=n,
            n_truncated=0,
            n_chars=0,
            times=times,
        )
        meters.result(model, dialect, done)
        duration.labels(model, dialect).observe(seconds)
        texts.labels(model, dialect).inc(n)

    def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    ours = samples(meters.text().decode())
    theirs = samples(generate_latest(registry).decode())
    assert len(theirs) > 70
    assert {name: ours.get(name) for name in theirs} == pytest.approx(theirs)


def test_deaths_are_told_after_a_model_has_left():
    meters = Meters()
    meters.models({"a": (5, 2), "b": (0, 0)})
    meters.models({"b": (7, 1)})
    text = meters.text().decode()
    assert 'gguf_embed_engine_deaths{model="a"} 2.0' in text
    assert 'gguf_embed_engine_deaths{model="b"} 1.0' in text
    assert 'gguf_embed_queue_tokens{model="b"} 7.0' in text
    assert 'gguf_embed_queue_tokens{model="a"}' not in text
    assert "gguf_embed_models_loaded 1.0" in text


def test_a_short_text_needs_no_thread(serve: Callable[..., Served], direct: FakeEmbedder):
    """Where Python alone tokenizes; a long one, or many, would hold the loop."""
    served = serve()
    served.client.post("/embed", json={"inputs": TEXTS})
    (loaded,) = served.service.models.loaded
    asked = list[str]()
    real = served.service.in_thread

    async def in_thread(call: Callable[[], Any]) -> Any:
        asked.append("a thread")
        return await real(call)

    served.service.in_thread = in_thread
    for here, body in ((True, "a cat"), (False, "a cat"), (True, "c" * 2500), (True, TEXTS * 9)):
        loaded.tokenizes_here = here
        got = served.client.post("/embed", json={"inputs": body})
        wanted = direct.encode([body] if isinstance(body, str) else body)
        np.testing.assert_array_equal(floats(got.json()), wanted)
        asked.append(str(here))
    assert asked == ["True", *["a thread", "False"], *["a thread", "True"] * 2]


def test_a_request_is_a_span_with_its_parts(serve: Callable[..., Served]):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    client = serve(traces=Traces(provider.get_tracer("test")), rerankers=("judge",)).client
    caller = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{caller}-b7ad6b7169203331-01"}
    client.post("/v1/embeddings", json={"model": "fake", "input": TEXTS}, headers=headers)
    *parts, request = kept.get_finished_spans()
    assert [part.name for part in parts] == ["load", "tokenize", "queue", "compute"]
    assert all(part.parent.span_id == request.context.span_id for part in parts if part.parent)
    assert f"{request.context.trace_id:032x}" == caller
    assert request.name == "POST /v1/embeddings"
    assert request.start_time <= parts[0].start_time <= parts[-1].end_time <= request.end_time
    said = request.attributes
    assert (said["http.response.status_code"], said["gguf_embed.texts"]) == (200, 4)
    assert said["gen_ai.operation.name"] == "embeddings"
    assert not any(text in str(span.to_json()) for span in (*parts, request) for text in TEXTS)
    kept.clear()
    client.post("/v2/rerank", json={"query": "q", "documents": ["a"]})
    client.post("/v2/rerank", json={"query": "q"})
    *_, scored, refused = kept.get_finished_spans()
    assert scored.attributes["gen_ai.operation.name"] == "rerank"
    assert refused.attributes["error.type"] == "invalid_request"


def test_without_an_address_no_spans_are_made(monkeypatch: pytest.MonkeyPatch):
    from gguf_embed.server.traces import traces

    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert not traces()


def test_request_ids(serve: Callable[..., Served]):
    client = serve().client
    mine = client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"]
    assert mine == "abc-1"
    made = {client.get("/health", headers={"x-request-id": "x" * 200}).headers["x-request-id"]}
    made.add(client.get("/nowhere").headers["x-request-id"])
    assert len(made) == 2
    assert all(len(each) < 32 for each in made)


def test_no_text_and_no_key_is_logged(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("DEBUG", logger="gguf_embed")
    client = serve(keys=(KEY,)).client
    headers = {"authorization": f"Bearer {KEY}"}
    for path, body in (
        ("/v1/embeddings", {"model": "fake", "input": "xyzzy " * 60}),
        ("/api/embed", {"model": "fake", "input": "xyzzy"}),
        ("/embed", {"inputs": ["xyzzy", ""]}),
    ):
        client.post(path, json=body, headers=headers)
        client.post(path, json=body, headers={"authorization": "Bearer wrong-key"})
    said = caplog.text + json.dumps([str(vars(each)) for each in caplog.records])
    assert len(caplog.records) >= 6
    assert "xyzzy" not in said
    assert KEY not in said
    assert "wrong-key" not in said


def test_what_has_no_route_is_refused_in_its_dialect(serve: Callable[..., Served]):
    client = serve().client
    assert client.get("/v1/chat/completions").json()["error"]["code"] == "no_such_route"
    assert "no route" in client.post("/api/generate").json()["error"]
    assert "no route" in client.post("/v2/chat").json()["message"]
    assert client.get("/favicon.ico").status_code == 404
    answer = client.get("/v1/embeddings")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_the_pages_load_nothing_from_elsewhere(serve: Callable[..., Served]):
    import re

    client = serve().client
    for path in ("/", "/docs"):
        answer = client.get(path, headers={"accept": "text/html"})
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", answer.text)
        assert "url(" not in answer.text


def test_the_description_names_every_route(serve: Callable[..., Served]):
    said = serve().client.get("/openapi.json").json()
    assert {"/v1/embeddings", "/api/embed", "/embed", "/v2/embed", "/rerank"} <= {*said["paths"]}
    for methods in said["paths"].values():
        for operation in methods.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body:
                name = body["schema"]["$ref"].rpartition("/")[2]
                assert name in said["components"]["schemas"]


# -- who may ask, as a person says it --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# only a remark", "holds no key"),
        ("short", "key 1 of FILE can be guessed"),
        (f"{KEY}\nwith a blank in it and long", "key 2 of FILE"),
        ("schlüssel-schlüssel-schlüssel", "key 1"),
    ],
)
def test_a_file_of_keys_that_is_none(text: str, message: str):
    from gguf_embed import BadOption
    from gguf_embed.server.safety import keys_in

    with pytest.raises(BadOption, match=message) as caught:
        keys_in(text, "FILE")
    assert not text or text not in str(caught.value)


def test_a_file_of_keys():
    from gguf_embed.server.safety import keys_in

    assert keys_in(f"\n# one\n{KEY}\r\n", "FILE") == (KEY,)
    assert KEY not in repr(Keys((KEY,)))


def test_another_host_needs_a_key_or_the_word():
    from gguf_embed import BadOption
    from gguf_embed.server.run import ServeOptions

    offers = (offer("fake"),)
    with pytest.raises(BadOption, match="lets other machines in"):
        ServeOptions(offers=offers, only_these=True, host="0.0.0.0").check()
    for options in ({"keys": (KEY,)}, {"insecure": True}, {"host": "127.0.0.2"}):
        said: dict[str, Any] = {"host": "0.0.0.0", **options}
        ServeOptions(offers=offers, only_these=True, **said).check()
    assert KEY not in repr(ServeOptions(offers=offers, only_these=True, keys=(KEY,)))


def test_names_that_requests_may_use():
    from gguf_embed.server.offers import offer_of, offers_here

    built_in = offer_of("all-minilm-l6-v2")
    offers = Offers([built_in, offer_of("/models/my-model-Q8_0.gguf")])
    for name in ("all-minilm", "ALL-MINILM:latest", "sentence-transformers/all-MiniLM-L6-v2", None):
        assert offers.find(name) is built_in
    assert offers.find("my-model-Q8_0").model == "/models/my-model-Q8_0.gguf"
    for name in ("/models/my-model-Q8_0.gguf", "../x", "hf:owner/repo/file.gguf", "", "bge-m3"):
        with pytest.raises(ModelNotFound, match="is not served here; there are: all-minilm"):
            offers.find(name)
    assert "all-minilm-l6-v2" in [each.id for each in offers_here()]


def test_a_pull_tells_its_steps(serve: Callable[..., Served], tmp_path: Any):
    from gguf_embed import FetchFailed
    from gguf_embed.server.pull import Puller

    fails: list[Exception] = []

    def fetch(source: Any, on_download: Callable[[int, int], None]) -> Any:
        for done in (0, 50, 100):
            on_download(done, 100)
        if fails:
            raise fails[0]
        return tmp_path / source.file

    served = serve()
    served.service.puller = Puller(served.threads, fetch)

    def pulled(model: str) -> list[dict[str, Any]]:
        answer = served.client.post("/api/pull", json={"model": model})
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]

    steps = pulled("all-minilm")
    assert steps[0] == {"status": "pulling manifest"}
    assert steps[-1] == {"status": "success"}
    assert any(step.get("total") for step in steps)
    fails.append(FetchFailed("no way there"))
    assert pulled("all-minilm")[-1] == {"error": "no way there"}
    assert "cannot be pulled" in pulled("/etc/passwd")[-1]["error"]
    body = {"model": "all-minilm", "stream": False}
    assert served.client.post("/api/pull", json=body).status_code == 502
