"""An Embedder in the life of a process: closed in use, dropped, forked, pickled."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Write

from gguf_embed import BadInput, Embedder, Settings
from gguf_embed.engine.backend import Head, Outcome
from gguf_embed.native.model import Tokens
from gguf_embed.testing import FakeBackend, FakeEmbedder

QUIET = Settings(tune=False, n_threads=1)


class Slow(FakeBackend):
    """Waits in each microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.closed = False

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        self.begun.set()
        assert self.go_on.wait(20)
        assert not self.closed
        return super().run(sequences, head=head, n_prefix=n_prefix, n_contexts=n_contexts)

    def close(self) -> None:
        self.closed = True


# -- close -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["encode", "token_vectors"])
def test_close_waits_for_calls_in_flight_and_refuses_later_ones(call: str):
    slow = Slow()
    embedder = FakeEmbedder.open(backend=slow)
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(getattr(embedder, call), "a b")
        assert slow.begun.wait(20)
        closing = threads.submit(embedder.close)
        while True:  # until the other thread is there
            try:
                embedder.tokenize("a")
            except BadInput:
                break
        time.sleep(0.05)
        assert not closing.done()
        assert not slow.closed
        slow.go_on.set()
        assert answer.result(20).shape[-1] == 64
        closing.result(20)
    assert slow.closed
    with pytest.raises(BadInput, match="is closed; open the model again"):
        embedder.tokenize("a")
    embedder.close()


def test_a_stream_that_waits_for_its_reader_does_not_keep_close_waiting():
    embedder = FakeEmbedder.open()
    stream = embedder.stream(["a"] * 9, window=2)
    next(stream)
    embedder.close()
    with pytest.raises(BadInput, match="is closed"):
        next(stream)


def test_close_inside_a_call_is_refused():
    """It would wait for itself."""
    with FakeEmbedder.open() as embedder:
        with pytest.raises(BadInput, match=r"close\(\) inside one of its calls"):
            embedder.encode("a", on_progress=lambda _texts, _tokens: embedder.close())
        assert embedder.encode("a").shape == (64,)


CLOSED_IN_USE = """
import random, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from gguf_embed import BadInput, Embedder, Settings

CALLS = [
    lambda e: e.encode(["a cat", "a dog sat on the mat"] * 20),
    lambda e: e.encode_query("a cat"),
    lambda e: e.token_vectors("a cat sat on the mat " * 9),
    lambda e: e.tokenize("a cat " * 99),
    lambda e: e.count_tokens(["a cat " * 9] * 200),
    lambda e: list(e.stream(["a cat"] * 30, window=7)),
    lambda e: e.fingerprint(),
]
n_refused = 0

def use(embedder, seed):
    global n_refused
    rng = random.Random(seed)
    try:
        while True:
            rng.choice(CALLS)(embedder)
    except BadInput as error:
        assert "is closed" in str(error), error
        n_refused += 1

for turn in range(int(sys.argv[2])):
    embedder = Embedder.open(sys.argv[1], settings=Settings(tune=False, n_contexts=2, n_threads=1))
    with ThreadPoolExecutor(6) as threads:
        users = [threads.submit(use, embedder, seed) for seed in range(6)]
        time.sleep(0.05)
        embedder.close()
        for user in users:
            user.result(60)
print(n_refused)
"""


@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
def test_closed_in_use_nothing_crashes(architecture: str, tiny_model: Write):
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_IN_USE, str(tiny_model(architecture)), "5"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "30\n", "")


# -- dropped ---------------------------------------------------------------------------------


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.native
def test_what_is_dropped_is_freed():
    """Without this a model of 25 MB leaves about 38 MiB behind each time."""

    def use() -> None:
        Embedder.open(settings=QUIET).encode(["a cat", "a dog"])

    use()
    n_threads, before = threading.active_count(), resident_bytes()
    for _ in range(6):
        use()
    gc.collect()
    assert threading.active_count() <= n_threads
    assert resident_bytes() - before < 80 * 2**20


def test_an_embedder_is_freed_without_the_garbage_collector():
    slow = Slow()
    slow.go_on.set()
    gc.disable()
    try:
        embedder = FakeEmbedder.open(backend=slow)
        stream = embedder.stream(["a"] * 9, window=2)
        next(stream)
        del embedder
        assert not slow.closed  # the stream still needs it
        del stream
        assert slow.closed
    finally:
        gc.enable()


# -- forked ----------------------------------------------------------------------------------

FORK = """
import os, signal, sys
from gguf_embed import BadInput, Embedder, Settings

signal.alarm(120)  # a hang ends here
embedder = Embedder.open(sys.argv[1], settings=Settings(tune=False, n_contexts=2, n_threads=2))
texts = ["a cat sat", "a dog", "the river"]
expected = embedder.encode(texts)
stream = embedder.stream(texts, window=1)
next(stream)
closed = Embedder.open(sys.argv[1], settings=Settings(tune=False))
closed.close()
child = os.fork()
if not child:
    signal.alarm(120)  # a hang ends here
    assert abs(embedder.encode(texts) - expected).max() < 1e-3
    assert embedder.count_tokens(texts).min() > 1
    with Embedder.open(sys.argv[1], settings=Settings(tune=False, n_threads=2)) as another:
        assert abs(another.encode(texts) - expected).max() < 1e-3
    for use in (lambda: next(stream), lambda: closed.encode("a")):
        try:
            use()
        except BadInput as error:
            print(str(error).partition(" of ")[0][-60:], flush=True)
    grandchild = os.fork()
    if not grandchild:
        assert abs(embedder.encode(texts) - expected).max() < 1e-3
        os._exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
    embedder.close()
    sys.exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert (embedder.encode(texts) == expected).all()
embedder.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
def test_a_fork_after_encode(architecture: str, tiny_model: Write):
    """As gunicorn and multiprocessing do it: the child computes on threads of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tiny_model(architecture))],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert "os.fork() came in the middle" in first
    assert "is closed; open the model again" in second


# -- pickled ---------------------------------------------------------------------------------


def encode(embedder: Embedder) -> np.ndarray:
    return embedder.encode(["a cat", "a dog"])


def test_a_pickle_opens_the_same_file_again(tiny_model: Write):
    with Embedder.open(tiny_model("qwen3"), settings=QUIET) as embedder:
        raw = pickle.dumps(embedder)
        expected, space = encode(embedder), embedder.fingerprint()
        with copy.deepcopy(embedder) as other:
            assert other is not embedder
            np.testing.assert_array_equal(encode(other), expected)
    assert len(raw) < 4096
    with pickle.loads(raw) as other:
        assert other.settings == QUIET
        assert other.fingerprint() == space
        np.testing.assert_array_equal(encode(other), expected)


@pytest.mark.native
def test_a_model_of_the_catalog_is_pickled_by_its_name():
    """Its file is elsewhere on another machine."""
    with Embedder.open(settings=QUIET) as embedder:
        raw = pickle.dumps(embedder)
        assert str(embedder.path).encode() not in raw
        assert b"Q8_0" in raw
        with pickle.loads(raw) as other:
            np.testing.assert_array_equal(encode(other), encode(embedder))


def test_a_fake_is_pickled_too():
    embedder = FakeEmbedder.open(dim=16, n_ctx=9, prompts={"query": "q: "})
    with embedder, pickle.loads(pickle.dumps(embedder)) as other:
        assert (other.dim, other.n_ctx, other.prompts) == (16, 9, {"query": "q: "})
        np.testing.assert_array_equal(encode(other), encode(embedder))


def test_workers_get_an_embedder(tiny_model: Write):
    with (
        Embedder.open(tiny_model("bert"), settings=QUIET) as embedder,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        np.testing.assert_array_equal(pool.apply(encode, (embedder,)), encode(embedder))
