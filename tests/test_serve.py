"""`gguf-embed serve` as a process on a port: real clients, signals, sockets that misbehave."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_child
from conftest import Write

from gguf_embed import Embedder, Reranker
from gguf_embed.cli import main
from gguf_embed.engine import remote_scores

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(os.name != "posix", reason="sends signals"),
    # Of clients, which leave their connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TEXTS = ["a cat sits on the mat", "where is my money?", "", "Tür 日本語", "a cat sits on the mat"]
MODEL = "all-minilm-l6-v2"
KEY = "test-key-of-24-letters.."


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Clients that cannot be closed leave their connections to the collector: to this one."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


class Process:
    """A server that runs, and its address."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        self.errors = folder / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )

    def address_in(self, read: Callable[[], str]) -> str:
        while not (found := read()):
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.02)
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def address_in(said: str) -> str:
    """What a server tells when it has started; "" before."""
    found = [line for line in said.splitlines() if " at http" in line]
    return found[0].partition(" at ")[2].partition(";")[0] if found else ""


@pytest.fixture(scope="module")
def rerankers(tiny_model: Write) -> list[Path]:
    return [tiny_model("qwen3_reranker"), tiny_model("xlmr_reranker")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, rerankers: list[Path]) -> Iterator[str]:
    """The built-in model and two rerankers, behind a key."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text(f"# ours\n{KEY}\n")
    command = ["-m", "gguf_embed", "serve", "--port", "0", "--no-tune", "--preload"]
    for model in (MODEL, *rerankers):
        command += ["--model", str(model)]
    running = Process([*command, "--api-key-file", str(folder / "keys")], folder)

    try:
        yield running.address_in(lambda: address_in(running.errors.read_text()))
    finally:
        running.process.terminate()
        assert running.process.wait(60) == 0, running.errors.read_text()
        running.end()


@pytest.fixture(scope="module")
def direct() -> np.ndarray:
    from gguf_embed import Settings

    with Embedder.open(settings=Settings(tune=False)) as embedder:
        return embedder.encode(TEXTS)


def equal(rows: object, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.array(rows, np.float64).astype(np.float32), expected)


# -- clients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}])  # base64 unless it is said
def test_openai(url: str, direct: np.ndarray, options: Any):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        made = client.embeddings.create(model=MODEL, input=TEXTS, **options)
        equal([each.embedding for each in made.data], direct)
        assert MODEL in [model.id for model in client.models.list()]
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.embeddings.create(model="gpt-4", input="x")
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="a key is needed"),
    ):
        client.embeddings.create(model=MODEL, input="x")


def test_openai_async(url: str, direct: np.ndarray):
    import openai

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            calls = [client.embeddings.create(model=MODEL, input=text) for text in TEXTS]
            return await asyncio.gather(*calls)

    for made, expected in zip(asyncio.run(ask()), direct, strict=True):
        close([made.data[0].embedding], expected[None])


def close(rows: object, expected: np.ndarray) -> None:
    """A text that shared a microbatch with others: quantized weights tell."""
    got = np.array(rows, np.float64).astype(np.float32)
    assert got.shape == expected.shape
    assert (got * expected).sum(axis=1).min() > 0.999


def test_ollama(url: str, direct: np.ndarray):
    import ollama

    client = ollama.Client(host=url, headers={"authorization": f"Bearer {KEY}"})
    made = client.embed(model="all-minilm", input=TEXTS)
    equal(made.embeddings, direct)
    assert made.prompt_eval_count
    close([client.embeddings(model=MODEL, prompt=TEXTS[0]).embedding], direct[:1])
    assert client.list().models[0].model == f"{MODEL}:latest"
    assert client.ps().models[0].model == f"{MODEL}:latest"
    assert client.show(MODEL).capabilities == ["embedding"]
    with pytest.raises(ollama.ResponseError, match="--allow-pull") as caught:
        client.pull("bge-m3")
    assert caught.value.status_code == 403
    with pytest.raises(ollama.ResponseError, match="longer than"):
        client.embed(model=MODEL, input="a " * 1000, truncate=False)
    assert len(client.embed(model=MODEL, input="a " * 1000).embeddings) == 1


def test_ollama_async(url: str, direct: np.ndarray):
    import ollama

    client = ollama.AsyncClient(host=url, headers={"authorization": f"Bearer {KEY}"})
    equal(asyncio.run(client.embed(model=MODEL, input=TEXTS)).embeddings, direct)


def test_cohere(url: str, direct: np.ndarray):
    import cohere

    client = cohere.ClientV2(api_key=KEY, base_url=url)
    made = client.embed(
        model=MODEL,
        texts=TEXTS,
        input_type="search_document",
        embedding_types=["float", "int8", "ubinary"],
    )
    equal(made.embeddings.float_, direct)
    assert made.embeddings.ubinary is not None
    with pytest.raises(cohere.core.ApiError, match="gives vectors, not scores; the rerankers here"):
        client.rerank(model=MODEL, query="x", documents=["a"], request_options={"max_retries": 0})


QUERY = "the cat in the house"
DOCUMENTS = ["a dog and a boat", "the cat is in the house", "bread", "the cat"]


def test_cohere_reranks(url: str, rerankers: list[Path]):
    import cohere

    from gguf_embed import Settings

    new, old = cohere.ClientV2(api_key=KEY, base_url=url), cohere.Client(KEY, base_url=url)
    for path in rerankers:
        with Reranker.open(path, settings=Settings(tune=False)) as reranker:
            expected = [(each.index, each.score) for each in reranker.rank(QUERY, DOCUMENTS, top=2)]
        made = new.rerank(model=path.stem, query=QUERY, documents=DOCUMENTS, top_n=2)
        assert [(row.index, row.relevance_score) for row in made.results] == expected
        v1 = old.rerank(
            model=path.stem,
            query=QUERY,
            documents=[{"text": text} for text in DOCUMENTS],
            top_n=2,
            return_documents=True,
        )
        assert [(row.index, row.relevance_score) for row in v1.results] == expected
        assert v1.results[0].document is not None
        assert v1.results[0].document.text == DOCUMENTS[expected[0][0]]


def test_cohere_reranks_async(url: str, rerankers: list[Path]):
    import cohere

    client = cohere.AsyncClientV2(api_key=KEY, base_url=url)
    name = rerankers[0].stem
    made = asyncio.run(client.rerank(model=name, query=QUERY, documents=DOCUMENTS))
    assert len(made.results) == len(DOCUMENTS)


def test_cohere_async(url: str, direct: np.ndarray):
    import cohere

    client = cohere.AsyncClientV2(api_key=KEY, base_url=url)
    made = asyncio.run(client.embed(model=MODEL, texts=TEXTS, input_type="search_document"))
    equal(made.embeddings.float_, direct)


def test_the_hubs_inference_client(url: str, direct: np.ndarray):
    from huggingface_hub import AsyncInferenceClient, InferenceClient

    with InferenceClient(base_url=url, token=KEY) as client:
        close(client.feature_extraction(TEXTS[0]), direct[:1])
        close(
            client.feature_extraction("a " * 1000, truncate=True),
            client.feature_extraction("a " * 510),
        )
        scores = client.sentence_similarity(TEXTS[0], other_sentences=[TEXTS[0], TEXTS[1]])
        assert scores[0] > 0.999 > scores[1]

    async def ask() -> np.ndarray:
        async with AsyncInferenceClient(base_url=url, token=KEY) as client:
            return await client.feature_extraction(TEXTS[0])

    close(asyncio.run(ask()), direct[:1])


def asked(url: str, body: object) -> Any:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_tokens_and_back(url: str):
    (tokens,) = asked(f"{url}/tokenize", {"inputs": "Where is my money?"})
    assert (tokens[0]["text"], tokens[0]["special"]) == ("[CLS]", True)
    assert tokens[0]["start"] is None
    assert [each["text"] for each in tokens[1:5]] == ["Where", "is", "my", "money"]
    assert (tokens[4]["start"], tokens[4]["stop"]) == (12, 17)
    ids = [each["id"] for each in tokens]
    assert asked(f"{url}/decode", {"ids": ids}) == ["where is my money ?"]
    with_ends = asked(f"{url}/decode", {"ids": [ids], "skip_special_tokens": False})
    assert with_ends == ["[CLS] where is my money ?[SEP]"]
    body = {"inputs": "Where", "add_special_tokens": False}
    assert len(asked(f"{url}/tokenize", body)[0]) == 1


def test_our_own_client(url: str, direct: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    import pickle

    from gguf_embed import BadInput, FetchFailed, ModelNotFound, Settings, TextTooLong

    monkeypatch.setenv("GGUF_EMBED_API_KEY", KEY)
    with (
        Embedder.connect(url) as there,
        Embedder.open(settings=Settings(tune=False)) as here,
    ):
        np.testing.assert_array_equal(there.encode(TEXTS), direct)
        assert there.fingerprint(dimensions=8) == here.fingerprint(dimensions=8)
        assert there.tokenize(TEXTS[0]) == here.tokenize(TEXTS[0])
        assert (there.dim, there.n_ctx, there.quant, there.prompts, there.pooling) == (
            *(here.dim, here.n_ctx, here.quant, here.prompts, here.pooling),
        )
        close(there.token_vectors(TEXTS[0]), here.token_vectors(TEXTS[0]))
        many = [f"text number {number} of many" for number in range(700)]
        close(there.encode(many), here.encode(many))
        with pytest.raises(TextTooLong, match="row 1"):
            there.encode(["x", "a " * 1000])
        close(there.encode(["a " * 1000], truncate="end"), here.encode(["a " * 510]))
        with pytest.raises(BadInput, match="row 1: character 0 is a lone surrogate"):
            there.encode(["x", "\ud800"])
        again = pickle.loads(pickle.dumps(there))
        with again:
            np.testing.assert_array_equal(again.encode(TEXTS), direct)
        assert KEY.encode() not in pickle.dumps(there)
        with pytest.raises(ModelNotFound, match="not served here"):
            Embedder.connect(url, "no-such-model")
    with pytest.raises(FetchFailed, match="does not answer"):
        Embedder.connect("http://127.0.0.1:1")
    with pytest.raises(FetchFailed, match="a key is needed"):
        Embedder.connect(url, api_key="wrong")


def _noted(seen: list[int], n_documents: int, n_tokens: int) -> None:
    seen.append(n_documents)


def test_our_own_client_of_a_reranker(
    url: str, rerankers: list[Path], monkeypatch: pytest.MonkeyPatch
):
    import pickle

    from gguf_embed import BadInput, BadOption, BadText, FetchFailed, Settings, TextTooLong

    monkeypatch.setenv("GGUF_EMBED_API_KEY", KEY)
    documents = [*DOCUMENTS, DOCUMENTS[1], "a lone cat"]
    for path in rerankers:
        with (
            Reranker.connect(url, path.stem) as there,
            Reranker.open(path, settings=Settings(tune=False)) as here,
        ):
            expected = here.score(QUERY, documents)
            np.testing.assert_array_equal(there.score(QUERY, documents), expected)
            raw = here.score(QUERY, documents, raw=True)
            np.testing.assert_array_equal(there.score(QUERY, documents, raw=True), raw)
            assert there.rank(QUERY, documents, top=3) == here.rank(QUERY, documents, top=3)
            assert there.fingerprint(raw=True) == here.fingerprint(raw=True)
            assert (there.n_ctx, there.quant, there.default_task, there.model_id) == (
                *(here.n_ctx, here.quant, here.default_task, here.model_id),
            )
            assert there.score(QUERY, []).shape == (0,)
            seen: list[int] = []
            monkeypatch.setattr(remote_scores, "TOGETHER", 2)
            parts = there.score(QUERY, documents, on_progress=partial(_noted, seen))
            monkeypatch.undo()
            monkeypatch.setenv("GGUF_EMBED_API_KEY", KEY)
            np.testing.assert_allclose(parts, expected, atol=1e-5)
            assert (len(seen), sum(seen)) == (3, len(documents))
            long = ["x", "y", "z", "a " * there.n_ctx]
            with pytest.raises(TextTooLong, match="row 3"):
                there.score(QUERY, long, truncate="error")
            with pytest.raises(BadText, match="row 2: character 0 is a lone surrogate"):
                there.score(QUERY, ["x", "y", "\ud800"])
            with pytest.raises(BadInput, match="the query: character 1"):
                there.score("x\ud800", ["x"])
            with pytest.raises(BadOption, match="score and rank"):
                there.prepare(QUERY, documents)
            with pickle.loads(pickle.dumps(there)) as again:
                np.testing.assert_array_equal(again.score(QUERY, documents), expected)
            assert KEY.encode() not in pickle.dumps(there)
        with pytest.raises(BadInput, match="is closed"):
            there.score(QUERY, documents)
    with Reranker.connect(url) as there:
        assert there.model_id == rerankers[0].stem
    with pytest.raises(BadInput, match="gives vectors, not scores"):
        Reranker.connect(url, MODEL)
    with pytest.raises(FetchFailed, match="does not answer"):
        Reranker.connect("http://127.0.0.1:1")


def test_embed_on_a_server(url: str, direct: np.ndarray, tmp_path: Path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = [sys.executable, "-m", "gguf_embed", "embed", "texts.txt", "-o", "out.npy"]
    environment = {**os.environ, "GGUF_EMBED_API_KEY": KEY}
    subprocess.run([*command, "--server", url], cwd=tmp_path, env=environment, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), direct)


def test_rerank_on_a_server(
    url: str, rerankers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv("GGUF_EMBED_API_KEY", KEY)
    (tmp_path / "texts.txt").write_text("\n".join(DOCUMENTS))
    command = ["rerank", QUERY, str(tmp_path / "texts.txt"), "--server", url, "--json", "--quiet"]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["model"] == rerankers[0].stem
    with Reranker.connect(url) as there:
        best = there.rank(QUERY, DOCUMENTS)
    assert [each["text"] for each in made["results"]] == [each.document for each in best]


# -- a process that is ended ---------------------------------------------------------------------


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Process]:
    running = Process([serve_child.__file__], tmp_path)
    yield running
    running.end()


@pytest.fixture
def port(child: Process) -> int:
    return port_of(child)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One for all that must not hurt it, and leave it no long work."""
    running = Process([serve_child.__file__], tmp_path_factory.mktemp("lasting"))
    yield running
    running.end()


@pytest.fixture(scope="module")
def lasting_port(lasting: Process) -> int:
    return port_of(lasting)


def port_of(child: Process) -> int:
    assert child.process.stdout is not None
    port = int(child.address_in(child.process.stdout.readline).rpartition(":")[2])
    wait_for(lambda: status(port)["ready"])
    return port


def post(port: int, text: str) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/embed",
        json.dumps({"model": "fake", "input": text}).encode(),
    )
    with urllib.request.urlopen(request) as answer:
        return answer.status, json.load(answer)


def status(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status") as answer:
        return json.load(answer)


def wait_for(true: Callable[[], object]) -> None:
    while not true():
        time.sleep(0.01)


def test_the_first_signal_lets_requests_end(child: Process, port: int):
    answers: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(post(port, "wait 7")))
    asking.start()
    wait_for(lambda: status(port)["requests_in_flight"] == 2)
    child.process.terminate()
    asking.join()
    assert answers[0][0] == 200
    assert child.process.wait() == 0
    assert "no new requests" in child.errors.read_text()


def test_the_second_signal_ends_at_once(child: Process, port: int):
    sending = connected(port)
    sending.sendall(request_of("wait 600"))
    wait_for(lambda: status(port)["requests_in_flight"] == 2)
    child.process.send_signal(signal.SIGINT)
    wait_for(lambda: "no new requests" in child.errors.read_text())
    child.process.terminate()
    assert child.process.wait() == 128 + signal.SIGTERM
    sending.close()


def test_a_unix_socket(tmp_path: Path):
    path = tmp_path / "s"
    running = Process([serve_child.__file__, str(path)], tmp_path)
    try:
        assert running.process.stdout is not None
        running.address_in(running.process.stdout.readline)
        assert path.stat().st_mode & 0o077 == 0
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(request_of("a text"))
            assert b" 200 " in connection.recv(100)
        running.process.terminate()
        assert running.process.wait() == 0
        assert not path.exists()
    finally:
        running.end()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_tls(tmp_path: Path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    make += ["-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", *subject]
    subprocess.run(make, check=True, capture_output=True)
    running = Process([serve_child.__file__, str(cert), str(key)], tmp_path)
    try:
        assert running.process.stdout is not None
        address = running.address_in(running.process.stdout.readline).strip()
        assert address.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        port = address.rpartition(":")[2]
        with urllib.request.urlopen(f"https://localhost:{port}/health", context=context) as answer:
            assert answer.read() == b"ok"
    finally:
        running.end()


# -- sockets that misbehave ----------------------------------------------------------------------


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


def request_of(text: str, **headers: object) -> bytes:
    body = json.dumps({"model": "fake", "input": text}).encode()
    said = {"Host": "localhost", "Content-Length": len(body), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    return f"POST /api/embed HTTP/1.1\r\n{lines}\r\n".encode() + body


def all_of(connection: socket.socket) -> bytes:
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_who_goes_away_has_its_work_cancelled(port: int):
    going = connected(port)
    body = json.dumps({"model": "fake", "input": [f"wait {n}" for n in range(600, 610)]}).encode()
    head = f"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    going.sendall(head.encode() + body)
    wait_for(lambda: status(port)["models"][0]["waiting_tokens"])
    going.close()
    wait_for(lambda: not status(port)["models"][0]["waiting_tokens"])
    wait_for(lambda: status(port)["requests_in_flight"] == 1)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b"408"),  # nothing
        (b"POST /api/embed HTTP/1.1\r\nHost: loc", b"408"),  # half a head
        (b"GET /" + b"x" * 200_000, b"431"),  # a head without an end
        (b"NONSENSE\r\n\r\n", b"400"),
        (request_of("x", **{"Content-Length": 10**10}), b"413"),
        (request_of("x", **{"Content-Length": 1000}), b"408"),  # half a body
        (request_of("x", Host="evil.example"), b"403"),
        (request_of("x", **{"Content-Length": "-5"}), b"400"),
    ],
    ids=["nothing", "half-head", "endless-head", "nonsense", "10GB", "half-body", "host", "minus"],
)
def test_a_connection_that_misbehaves_is_told_and_closed(
    lasting_port: int, sent: bytes, answer: bytes
):
    connection = connected(lasting_port)
    with suppress(ConnectionError):  # it may be refused while it still sends
        connection.sendall(sent)
    if answer == b"403":
        connection.shutdown(socket.SHUT_WR)
    try:
        said = all_of(connection)
    except ConnectionResetError:  # the answer can be lost with what was not read
        said = b"HTTP/1.1 " + answer
    assert said.startswith(b"HTTP/1.1 " + answer), said[:300]
    wait_for(lambda: status(lasting_port)["requests_in_flight"] == 1)


def test_who_does_not_take_its_answer_is_cut_off(lasting: Process, lasting_port: int):
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", lasting_port))
    body = json.dumps({"model": "fake", "input": [str(n) for n in range(3000)]}).encode()
    head = f"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with reader:
        reader.sendall(head.encode() + body)
        wait_for(lambda: "did not take its answer" in lasting.errors.read_text())
    wait_for(lambda: status(lasting_port)["requests_in_flight"] == 1)
