"""The model in a child process: the same vectors, and a child's death costs the culprit only."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny

from gguf_embed import BadInput, BadText, Embedder, NativeFailed, Settings
from gguf_embed.catalog.catalog import builtin_path
from gguf_embed.engine import isolated
from gguf_embed.engine.barriers import waiting
from gguf_embed.engine.gate import Gate
from gguf_embed.engine.hosted import FAULT_VARIABLE
from gguf_embed.engine.isolated import IsolatedModel
from gguf_embed.engine.opening import Opened, prove_model
from gguf_embed.vectors import Vectors

pytestmark = pytest.mark.native

UNTUNED = Settings(tune=False, n_contexts=2)
POISON = "a fish in the river"
TEXTS = [f"the {word} and the dog {i}" for i in range(12) for word in ("cat", "boat", "bread")]
TEXTS[17] = POISON


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_qwen3(tmp_path_factory.mktemp("tiny") / "qwen3.gguf", outtype="Q8_0").path


@pytest.fixture(scope="module")
def expected(path: Path) -> Vectors:
    with Embedder.open(path, settings=UNTUNED) as embedder:
        return embedder.encode(TEXTS)


@pytest.fixture
def backend(path: Path) -> Iterator[IsolatedModel]:
    with IsolatedModel(prove_model(path, UNTUNED)) as backend:
        yield backend


def test_threads_of_the_child_do_not_spin_for_long(path: Path, monkeypatch: pytest.MonkeyPatch):
    assert waiting({"OMP_WAIT_POLICY": "active"}) == waiting({"GOMP_SPINCOUNT": "9"}) == {}
    if not Path("/proc/self/environ").exists():
        pytest.skip("no /proc")
    proved = prove_model(path, UNTUNED)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with IsolatedModel(proved) as backend:
        assert b"GOMP_SPINCOUNT=1000" in Path(f"/proc/{backend.pid}/environ").read_bytes()


def embedder_of(backend: IsolatedModel) -> Embedder:
    return Embedder(Opened.of(backend.proved, backend.run_settings, backend, lambda: backend))


def gone(pid: int) -> bool:
    """Within some seconds."""
    for _ in range(300):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_the_same_to_the_bit(path: Path, expected: Vectors):
    prompt = "the query and the answer"
    with (
        Embedder.open(path, settings=UNTUNED) as plain,
        Embedder.open(path, settings=UNTUNED, isolated=True) as isolated,
    ):
        assert np.array_equal(isolated.encode(TEXTS), expected)
        assert np.array_equal(
            isolated.encode(TEXTS, prompt=prompt, dimensions=64),
            plain.encode(TEXTS, prompt=prompt, dimensions=64),
        )
        assert np.array_equal(isolated.token_vectors(POISON), plain.token_vectors(POISON))
        assert isolated.tokenize(POISON) == plain.tokenize(POISON)
        assert isolated.count_tokens(TEXTS).tolist() == plain.count_tokens(TEXTS).tolist()
        assert (isolated.dim, isolated.n_ctx) == (plain.dim, plain.n_ctx)
        assert isolated.run_settings == plain.run_settings
        with pytest.raises(BadText, match="row 1: character 0 is a lone surrogate"):
            isolated.encode(["a", "\ud800"])
        seen: list[tuple[int, int]] = []
        isolated.encode(TEXTS, on_progress=lambda *done: seen.append(done))
        assert sum(rows for rows, _ in seen) == len(TEXTS)


def test_a_text_that_kills_is_named(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, f"run:{POISON}")
    with (
        Embedder.open(path, settings=UNTUNED, isolated=True) as embedder,
        pytest.raises(NativeFailed, match=r"row 17: llama.cpp dies of this text; .* \(\d+ tokens"),
    ):
        embedder.encode(TEXTS)


def test_all_others_are_as_if_nothing_had_happened(
    path: Path, expected: Vectors, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(FAULT_VARIABLE, f"run:{POISON}")
    with Embedder.open(path, settings=UNTUNED, isolated=True) as embedder:
        (block,) = embedder.stream([*TEXTS[:30], POISON, *TEXTS[30:]], on_error="skip")
    assert [failed.row for failed in block.failed] == [17, 30]
    assert block.failed[0].n_tokens == block.token_counts[17]
    assert "dies of this text" in block.failed[0].reason
    assert np.isnan(block.vectors[[17, 30]]).all()
    rest = np.delete(block.vectors, [17, 30], axis=0)
    assert np.array_equal(rest, np.delete(expected, 17, axis=0))


def test_a_text_alone_that_kills(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, f"run:{POISON}")
    with Embedder.open(path, settings=UNTUNED, isolated=True) as embedder:
        assert np.isnan(embedder.encode(POISON, on_error="skip")).all()
        assert np.isfinite(embedder.encode("a cat")).all()


def test_a_text_that_kills_the_tokenizer_is_named(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, f"tokenize:{POISON}")
    with Embedder.open(path, settings=UNTUNED, isolated=True) as embedder:
        with pytest.raises(NativeFailed, match=r"row 17: llama.cpp dies when it tokenizes"):
            embedder.encode(TEXTS)
        with pytest.raises(NativeFailed, match=r"row 0: llama.cpp dies when it tokenizes"):
            embedder.tokenize(POISON)
        assert embedder.encode("a cat").shape == (256,)


def test_our_own_tokenizer_needs_no_child(monkeypatch: pytest.MonkeyPatch):
    """Of a BERT file: where llama.cpp tokenizes nothing, nothing dies, and no text waits for it."""
    monkeypatch.setenv(FAULT_VARIABLE, f"tokenize:{POISON}")
    with Embedder.open(settings=UNTUNED) as here:
        ids, vectors = here.tokenize(POISON), here.encode(TEXTS)
    with IsolatedModel(prove_model(builtin_path(), UNTUNED)) as backend:
        assert backend.tokenize(POISON).tolist() == list(ids)
        with pytest.raises(UnicodeEncodeError):
            backend.tokenize("\ud800")
        assert np.array_equal(embedder_of(backend).encode(TEXTS), vectors)
        assert backend.n_deaths == 0


def test_a_text_that_kills_the_tokenizer_costs_itself_only(
    path: Path, expected: Vectors, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(FAULT_VARIABLE, f"tokenize:{POISON}")
    seen: list[tuple[int, int]] = []
    with Embedder.open(path, settings=UNTUNED, isolated=True) as embedder:
        texts = [*TEXTS[:30], POISON, *TEXTS[30:]]
        (block,) = embedder.stream(
            texts, on_error="skip", on_progress=lambda *done: seen.append(done)
        )
        (alone,) = embedder.stream([POISON], on_error="skip")
    assert [(failed.row, failed.n_tokens) for failed in block.failed] == [(17, None), (30, None)]
    assert "dies when it tokenizes this text of 19 characters" in block.failed[0].reason
    assert np.isnan(block.vectors[[17, 30]]).all()
    assert block.token_counts[[17, 30]].tolist() == [0, 0]
    assert not block.truncated.any()
    rest = np.delete(block.vectors, [17, 30], axis=0)
    assert np.array_equal(rest, np.delete(expected, 17, axis=0))
    assert sum(rows for rows, _ in seen) == len(texts)
    assert np.isnan(alone.vectors).all()
    assert [failed.row for failed in alone.failed] == [0]


@pytest.mark.parametrize("stage", ["run", "tokenize"])
def test_many_texts_that_kill_are_each_named(
    path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    """However many: deaths count in a row only where ordinary texts kill as well."""
    monkeypatch.setattr(isolated, "MAX_DEATHS", 4)  # of two culprits there are more
    poisons = [f"the fish {i} and the river" for i in range(2)]
    monkeypatch.setenv(FAULT_VARIABLE, f"{stage}:" + "\n".join(poisons))
    with Embedder.open(path, settings=UNTUNED, isolated=True) as embedder:
        (block,) = embedder.stream(poisons, on_error="skip")
        assert np.isfinite(embedder.encode("the cat")).all()
    assert [failed.row for failed in block.failed] == [0, 1]


def test_an_engine_that_dies_of_every_text_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(isolated, "MAX_DEATHS", 4)
    texts = ["a", *(f"the cat {i}" for i in range(3))]
    monkeypatch.setenv(FAULT_VARIABLE, "run:" + "\n".join(texts))
    with (
        Embedder.open(path, settings=UNTUNED, isolated=True) as embedder,
        pytest.raises(NativeFailed, match=r"died \d+ times in a row; run `gguf-embed doctor`"),
    ):
        embedder.encode(texts, on_error="skip")


def test_a_kill_from_outside_is_no_text_s_fault(backend: IsolatedModel, expected: Vectors):
    """Whatever is alone at that moment, twice in a row."""
    done = threading.Event()

    def kill() -> None:
        for _ in range(4):  # each as soon as a child is ready: always in the first text or batch
            with suppress(ProcessLookupError):
                os.kill(backend.pid, signal.SIGKILL)
            if done.wait(0.01):
                return

    killer = threading.Thread(target=kill)
    with embedder_of(backend) as embedder:
        killer.start()
        try:
            assert np.array_equal(embedder.encode(TEXTS), expected)
        finally:
            done.set()
            killer.join()


def segments() -> set[Path]:
    """Shared-memory files of this package that lie there now."""
    memory = Path("/dev/shm")
    return set(memory.glob("gguf-embed-*/*")) if memory.is_dir() else set()


@pytest.mark.parametrize(
    ("n_kills", "n_texts", "seconds"),
    [(5, 720, 1.0), pytest.param(50, 10_000, 0.75, marks=pytest.mark.minutes)],
)
def test_kills_at_random_moments_change_nothing(
    backend: IsolatedModel, path: Path, n_kills: int, n_texts: int, seconds: float
):
    """Each kill comes at a random moment of a run, which is made again until all have come."""
    texts = [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(n_texts)]
    with Embedder.open(path, settings=UNTUNED) as embedder:
        expected = embedder.encode(texts)
    before = segments()
    draw, pids, done = random.Random(0), set[int](), threading.Event()

    def kill() -> None:
        n_killed = 0
        while n_killed < n_kills:
            pids.add(pid := backend.pid)  # of a child that was ready, if not of the last one
            if done.wait(draw.uniform(0, 2 * seconds)):
                return
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                n_killed += 1

    killer = threading.Thread(target=kill)
    started = time.monotonic()
    with embedder_of(backend) as embedder:
        killer.start()
        rounds = 0
        try:
            while rounds == 0 or killer.is_alive():
                assert np.array_equal(embedder.encode(texts), expected)
                rounds += 1
        finally:
            done.set()
            killer.join()
        pids.add(backend.pid)
    print(
        f"{backend.n_deaths} deaths in {rounds} runs of {n_texts:,} texts, "
        f"{time.monotonic() - started:.0f} s"
    )
    assert backend.n_deaths >= n_kills - 1
    assert all(gone(pid) for pid in pids)
    assert segments() <= before


def test_nothing_is_left(backend: IsolatedModel):
    before = segments()
    with embedder_of(backend) as embedder:
        embedder.encode(TEXTS)
        assert segments() <= before
        pid = backend.pid
    assert gone(pid)
    with pytest.raises(BadInput, match="is closed"):
        embedder.encode("a")


def test_texts_that_come_one_by_one_are_computed_by_one_thread(backend: IsolatedModel):
    """More threads that compute have more teams of threads."""
    ids = backend.tokenize("the cat and the dog")
    threads = psutil.Process(backend.pid)
    n_contexts = backend.run_settings.n_contexts
    assert n_contexts > 1
    n_threads = set[int]()
    for _ in range(20):
        backend.run([ids], n_contexts=n_contexts)
        n_threads.add(threads.num_threads())
    assert len(n_threads) == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_ctrl_c_loses_no_answer(path: Path):
    """It comes while the main thread waits for the child, which others ask as well."""
    code = (
        "import signal, sys, threading; from pathlib import Path\n"
        "from gguf_embed.engine.isolated import IsolatedModel\n"
        "from gguf_embed.engine.opening import prove_model\n"
        "from gguf_embed.plan.settings import Settings\n"
        "text, long = 'the cat and the dog', 'the cat and the dog ' * 20_000\n"
        "settings = Settings(tune=False, n_contexts=2)\n"
        "with IsolatedModel(prove_model(Path(sys.argv[1]), settings)) as backend:\n"
        "    signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "    expected, wrong, ended = backend.tokenize(text).tolist(), [], threading.Event()\n"
        "    pid, n_stopped = backend.pid, 0\n"
        "    def ask():\n"
        "        while not ended.wait(0.01):\n"
        "            if backend.tokenize(text).tolist() != expected: wrong.append(text)\n"
        "    asking = threading.Thread(target=ask); asking.start()\n"
        "    for n in range(20):\n"
        "        try:\n"
        "            signal.setitimer(signal.ITIMER_REAL, 0.02 + n / 2000)\n"
        "            backend.tokenize(long)\n"
        "        except KeyboardInterrupt:\n"
        "            n_stopped += 1\n"
        "        signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "        assert backend.tokenize(text).tolist() == expected\n"
        "    ended.set(); asking.join()\n"
        "    assert not wrong and n_stopped > 10 and backend.pid == pid, (n_stopped, wrong)\n"
        "print('ok')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "ok\n", done.stderr


def test_the_child_ends_with_a_parent_that_is_killed(path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gguf_embed.engine.isolated import IsolatedModel\n"
        "from gguf_embed.engine.opening import prove_model\n"
        "from gguf_embed.plan.settings import Settings\n"
        "settings = Settings(tune=False)\n"
        "backend = IsolatedModel(prove_model(Path(sys.argv[1]), settings))\n"
        "print(backend.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert gone(int(done.stdout))


def test_a_child_that_dies_at_its_start(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, "load:")
    with pytest.raises(NativeFailed, match=r"died 3 times while it loaded the model \(SIGSEGV\)"):
        Embedder.open(path, settings=UNTUNED, isolated=True)


def test_a_gate_lets_one_alone():
    gate, inside, most = Gate(), 0, list[tuple[bool, int]]()
    lock = threading.Lock()

    def go(alone: bool) -> None:
        nonlocal inside
        with gate.alone() if alone else gate.shared():
            with lock:
                inside += 1
                most.append((alone, inside))
            time.sleep(0.01)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=go, args=(i % 3 == 0,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(n == 1 for alone, n in most if alone)
    assert max(n for alone, n in most if not alone) > 1
