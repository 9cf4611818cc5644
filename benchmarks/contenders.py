"""The engines that peers.py compares, each run in a child process of its own.

The child reads one JSON object a line and answers each with one on its own pipe, so that a crash
stays here, peak memory is this engine's alone, and nothing runs between two commands:

    {"do": "load", "kind": "llama-server", "model": PATH, "n_threads": 2, ...}  -> {"ok": true, ...}
    {"do": "run", "texts": FILE.json, "vectors": FILE.npy}   -> {"ok": true, "seconds": 1.25, ...}
    {"do": "stop"}                                           -> {"ok": true, "peak_bytes": 123}

A failure answers {"ok": false, "error": "..."}. Only `embed` is timed: not the reading of texts,
not the writing of vectors.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

SERVER_START_S = 300
REQUEST_S = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to open. `settings` are the engine's own arguments; {} is the engine as it comes."""

    kind: str
    model: str  # a GGUF; a directory for sentence-transformers, onnxruntime
    n_threads: int
    max_tokens: int  # of the longest text to come, prompt and special tokens included
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    binary: str | None = None  # llama-server


class Contender(Protocol):
    """An open engine."""

    facts: dict[str, Any]  # what it tells about itself: choices it made, the cost of HTTP

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        """Vectors (n, dim) in the order of `texts`, with `prompt` in front of each."""
        ...

    def peak_bytes(self) -> int:
        """Most resident memory so far, the touched pages of a mapped model file included."""
        ...

    def close(self) -> None: ...


def peak_bytes(pid: int) -> int:
    """The process's VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no VmHWM in /proc/{pid}/status")


class GgufEmbed:
    """This package, as a user opens it; the parent's CPU affinity tells it how many cores."""

    def __init__(self, load: Load) -> None:
        from gguf_embed.engine.embedder import Embedder
        from gguf_embed.plan.settings import Settings

        self._embedder = Embedder.open(Path(load.model), settings=Settings(**load.settings))
        chosen = self._embedder.run_settings
        self.facts: dict[str, Any] = {"run_settings": repr(chosen)}

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        return self._embedder.encode(list(texts), prompt=prompt or None)

    def peak_bytes(self) -> int:
        return peak_bytes(os.getpid())

    def close(self) -> None:
        self._embedder.close()


class LlamaCppPython:
    """llama-cpp-python's high-level `Llama.embed`."""

    def __init__(self, load: Load) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            load.model,
            embedding=True,
            n_threads=load.n_threads,
            n_threads_batch=load.n_threads,
            verbose=False,
            **load.settings,
        )
        self.facts: dict[str, Any] = {}

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        found = self._llama.embed([prompt + text for text in texts], normalize=True)
        return np.asarray(found, dtype=np.float32)

    def peak_bytes(self) -> int:
        return peak_bytes(os.getpid())

    def close(self) -> None:
        self._llama.close()


class LlamaServer:
    """llama-server's /v1/embeddings over connections that stay open.

    Settings: `flags` for the server; `per_request` texts in one request; `concurrency` requests
    at a time; `base64` vectors in place of decimal numbers. Memory is the server's.
    """

    def __init__(self, load: Load) -> None:
        settings = {"flags": [], "per_request": 32, "concurrency": 1, "base64": False}
        unknown = load.settings.keys() - settings.keys()
        if unknown:
            raise ValueError(f"llama-server has no setting {sorted(unknown)}")
        settings |= load.settings
        self._per_request = int(settings["per_request"])
        self._encoding = "base64" if settings["base64"] else "float"
        self._port = _free_port()
        n_threads = str(load.n_threads)
        assert load.binary is not None, "peers.py asks for it only with --llama-server"
        command = [load.binary, "--model", load.model, "--embedding", "--offline"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--threads", n_threads, "--threads-batch", n_threads, *settings["flags"]]
        # stdin is not ours: the server must not read our commands.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._pool = ThreadPoolExecutor(int(settings["concurrency"]))
        try:
            self._await_health()
        except BaseException:
            self.close()
            raise
        self.facts: dict[str, Any] = {"http_s": self._http_seconds()}

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        size = self._per_request
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        found = self._pool.map(lambda part: self._request([prompt + t for t in part]), parts)
        return np.concatenate(list(found))

    def _request(self, texts: list[str]) -> Vectors:
        body = json.dumps({"input": texts, "encoding_format": self._encoding})
        answer = json.loads(self._http("POST", "/v1/embeddings", body))
        rows = sorted(answer["data"], key=lambda row: row["index"])
        if self._encoding == "base64":
            raw = b"".join(base64.b64decode(row["embedding"]) for row in rows)
            return np.frombuffer(raw, dtype="<f4").reshape(len(rows), -1)
        return np.array([row["embedding"] for row in rows], dtype=np.float32)

    def _http(self, method: str, path: str, body: str | None = None) -> bytes:
        while True:
            connection, fresh = self._connection()
            try:
                connection.request(method, path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                del self._local.connection
                if fresh:
                    raise
                continue  # the server closes a connection after 5 idle seconds
            if response.status != http.HTTPStatus.OK:
                said = content[:300].decode(errors="replace")
                raise RuntimeError(f"HTTP {response.status}: {said}")
            return content

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's open connection, and whether it is a new one."""
        known: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if known is not None and known.sock is not None:
            return known, False
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_S)
        self._local.connection = connection
        self._connections.append(connection)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, True

    def _await_health(self) -> None:
        end = time.monotonic() + SERVER_START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}")
            try:
                self._http("GET", "/health")
            except (OSError, http.client.HTTPException, RuntimeError):  # 503 while loading
                time.sleep(0.05)
            else:
                return
        raise TimeoutError(f"llama-server not healthy after {SERVER_START_S} s")

    def _http_seconds(self) -> float:
        """Median time of a request that computes nothing: what HTTP itself costs."""
        return statistics.median(_seconds(lambda: self._http("GET", "/health")) for _ in range(50))

    def peak_bytes(self) -> int:
        return peak_bytes(self._process.pid)

    def close(self) -> None:
        self._pool.shutdown()
        for connection in self._connections:
            connection.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class SentenceTransformers:
    """sentence-transformers, which sorts by length itself. Settings: `dtype`, `batch_size`."""

    def __init__(self, load: Load) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(load.n_threads)
        self._batch_size = int(load.settings["batch_size"])
        self._model = SentenceTransformer(
            load.model,
            device="cpu",
            local_files_only=True,
            model_kwargs={"dtype": getattr(torch, load.settings["dtype"])},
        )
        # Some models are configured to cut earlier (MiniLM: 256); all must do the same work.
        self._model.max_seq_length = load.max_tokens
        self.facts: dict[str, Any] = {"torch": torch.__version__}

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        return self._model.encode(
            list(texts),
            prompt=prompt or None,
            batch_size=self._batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        ).astype(np.float32)

    def peak_bytes(self) -> int:
        return peak_bytes(os.getpid())

    def close(self) -> None: ...


class OnnxRuntime:
    """ONNX Runtime, sorted by length as fastembed does. Settings: `file`, `batch_size`.

    The model is a directory that to_onnx.py has written: mean pooling, length 1.
    """

    def __init__(self, load: Load) -> None:
        import onnxruntime  # pyright: ignore[reportMissingImports]
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = load.n_threads
        folder = Path(load.model)
        self._session = onnxruntime.InferenceSession(
            str(folder / load.settings["file"]), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {each.name for each in self._session.get_inputs()}
        self._batch_size = int(load.settings["batch_size"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(load.max_tokens)
        self.facts: dict[str, Any] = {"onnxruntime": onnxruntime.__version__}

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        ids = [each.ids for each in self._tokenizer.encode_batch([prompt + t for t in texts])]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        vectors: Vectors | None = None
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            shape = (len(rows), len(ids[rows[0]]))
            tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
            for place, row in enumerate(rows):
                tokens[place, : len(ids[row])] = ids[row]
                mask[place, : len(ids[row])] = 1
            given = {"input_ids": tokens, "attention_mask": mask}
            given["token_type_ids"] = np.zeros(shape, np.int64)
            (hidden,) = self._session.run(
                None, {name: value for name, value in given.items() if name in self._inputs}
            )
            means = np.einsum("btd,bt->bd", hidden, mask.astype(np.float32))
            if vectors is None:
                vectors = np.empty((len(texts), means.shape[1]), np.float32)
            vectors[rows] = means / np.linalg.norm(means, axis=1, keepdims=True)
        assert vectors is not None, "no texts"
        return vectors

    def peak_bytes(self) -> int:
        return peak_bytes(os.getpid())

    def close(self) -> None: ...


class FastEmbed:
    """fastembed, given texts sorted by length, which it does not do. Settings as ONNX Runtime's.

    The model is a directory that to_onnx.py has written.
    """

    def __init__(self, load: Load) -> None:
        from fastembed import TextEmbedding  # pyright: ignore[reportMissingImports]
        from fastembed.common.model_description import (  # pyright: ignore[reportMissingImports]
            ModelSource,
            PoolingType,
        )

        name = "local/model"
        TextEmbedding.add_custom_model(
            model=name,
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(url="file://nowhere"),
            dim=1,  # not read
            model_file=load.settings["file"],
        )
        self._model = TextEmbedding(
            name, threads=load.n_threads, specific_model_path=load.model, local_files_only=True
        )
        self._model.model.tokenizer.enable_truncation(load.max_tokens)
        self._batch_size = int(load.settings["batch_size"])
        self.facts: dict[str, Any] = {"fastembed": version("fastembed")}

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        given = [prompt + texts[row] for row in order]
        found = np.array(list(self._model.embed(given, batch_size=self._batch_size)), np.float32)
        vectors = np.empty_like(found)
        vectors[order] = found
        return vectors

    def peak_bytes(self) -> int:
        return peak_bytes(os.getpid())

    def close(self) -> None: ...


class IkLlamaCpp:
    """ik_llama.cpp through ik-llama-cpp-python's bindings, sorted by length.

    Its own `embed` pools the mean and looks both ways, whatever the file says, so it is not used.
    Nor is its flash attention, which ends the process on a CPU without VNNI.
    Settings: `repack` weights for its fastest kernels at loading, `n_ubatch` tokens.
    """

    def __init__(self, load: Load) -> None:
        from ik_llama_cpp import _ctypes_api, _internals  # pyright: ignore[reportMissingImports]

        self._make_batch, self._free = _internals.make_embedding_batch, _ctypes_api.llama_batch_free
        defaults = _ctypes_api.llama_model_default_params

        def model_params() -> Any:
            params = defaults()
            params.repack_tensors = load.settings["repack"]
            return params

        _ctypes_api.llama_model_default_params = model_params
        self._model = _internals.IkModel(load.model, use_mmap=not load.settings["repack"])
        self._n_tokens = int(load.settings["n_ubatch"])
        self._n_texts = 64
        self._context = _internals.IkContext(
            self._model,
            n_ctx=self._n_tokens,
            n_threads=load.n_threads,
            flash_attn=False,
            embeddings=True,
            n_seq_max=self._n_texts,
        )
        self.facts: dict[str, Any] = {"ik-llama-cpp-python": version("ik-llama-cpp-python")}

    def embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        from gguf_embed.engine.schedule import pack

        tokens = [self._model.tokenize(prompt + text) for text in texts]
        vectors: list[list[float]] = [[]] * len(tokens)
        lengths = [len(ids) for ids in tokens]
        for batch in pack(lengths, max_tokens=self._n_tokens, max_seqs=self._n_texts):
            self._decode([tokens[row] for row in batch.rows])
            for place, row in enumerate(batch.rows):
                vectors[row] = self._context.get_embeddings_seq(place)
        found = np.array(vectors, dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def _decode(self, tokens: list[list[int]]) -> None:
        self._context.kv_cache_clear()
        batch = self._make_batch(tokens)
        status = self._context.decode(batch)
        self._free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def peak_bytes(self) -> int:
        return peak_bytes(os.getpid())

    def close(self) -> None:
        self._context.close()
        self._model.close()


KINDS: dict[str, Callable[[Load], Contender]] = {
    "gguf-embed": GgufEmbed,
    "llama-cpp-python": LlamaCppPython,
    "llama-server": LlamaServer,
    "sentence-transformers": SentenceTransformers,
    "onnxruntime": OnnxRuntime,
    "fastembed": FastEmbed,
    "ik-llama-cpp": IkLlamaCpp,
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def serve(requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer every line of `requests` until "stop" or the end of the pipe."""
    contender: Contender | None = None
    try:
        for line in requests:
            request = json.loads(line)
            do = request.pop("do")
            try:
                if do == "load":
                    load = Load(**request)
                    start = time.perf_counter()
                    contender = KINDS[load.kind](load)
                    seconds = time.perf_counter() - start
                    answer({"ok": True, "seconds": seconds, **contender.facts})
                elif do == "run":
                    assert contender is not None, "run before load"
                    answer({"ok": True, **timed(contender, **request)})
                elif do == "stop":
                    peak = contender.peak_bytes() if contender else 0
                    answer({"ok": True, "peak_bytes": peak})
                    return
                else:
                    raise ValueError(f"no command {do!r}")
            except Exception as error:  # whatever a peer raises is a result, not our end
                answer({"ok": False, "error": f"{type(error).__name__}: {error}"[:500]})
    finally:
        if contender is not None:
            contender.close()


def timed(contender: Contender, *, texts: str, vectors: str) -> dict[str, Any]:
    work = json.loads(Path(texts).read_text())
    rows, prompt = work["texts"], work["prompt"]
    found: list[Vectors] = []
    calls = [[row] for row in rows] if work["one_by_one"] else [rows]
    seconds: list[float] = []
    for call in calls:
        start = time.perf_counter()
        found.append(contender.embed(call, prompt))
        seconds.append(time.perf_counter() - start)
    np.save(vectors, np.concatenate(found))
    return {"seconds": seconds}


def main() -> None:
    # Answers go to the pipe that was stdout; whatever else prints goes to stderr, the log.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=pipe, flush=True)

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
