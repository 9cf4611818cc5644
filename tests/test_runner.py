"""Microbatches on contexts: the same vectors on every path, and NaN kept from spreading."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Write

from gguf_embed.engine import runner
from gguf_embed.engine.backend import Head
from gguf_embed.engine.runner import Runner, tap_works
from gguf_embed.errors import BadInput, NativeFailed
from gguf_embed.native import tap as native_tap
from gguf_embed.native.context import MAX_SEQS, Context, ContextParams, TapUnavailable
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.contexts import LONG_STEP
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings
from gguf_embed.vectors import Pooling, Vectors

pytestmark = pytest.mark.native

LAST = EmbedMode(pooling=Pooling.LAST, causal=True, encoder=False)
CLS = EmbedMode(pooling=Pooling.CLS, causal=False, encoder=True)


def texts(*lengths: int, seed: int = 0) -> list[Tokens]:
    """Random token ids that every tiny model has."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 140, n).astype(np.int32) for n in lengths]


def distance(a: Vectors, b: Vectors) -> float:
    """1 - cosine of the two rows that agree least."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosines = np.einsum("nd,nd->n", a, b)
    cosines /= np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 1 - float(cosines.min())


# ------------------------------------------------------------------- the same on every path


@pytest.fixture(scope="module")
def load(tiny_model: Write) -> Iterator[Callable[..., Model]]:
    opened: dict[Path, Model] = {}

    def load(architecture: str, outtype: str = "F32") -> Model:
        path = tiny_model(architecture, outtype)
        if path not in opened:
            opened[path] = Model(path)
        return opened[path]

    yield load
    for model in opened.values():
        model.close()


PARAMS = ContextParams(
    n_ctx=256, n_ubatch=256, n_seq_max=4, n_threads=1, pooling=Pooling.LAST, causal=True
)


def decode(model: Model, sequences: Sequence[Tokens], **changes: object) -> Vectors:
    with Context(model, replace(PARAMS, **changes), encoder=False) as context:
        return context.run(sequences)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.MEAN, Pooling.CLS, Pooling.NONE])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2_bidirectional"])
def test_the_tap_gives_what_llama_cpp_pools(
    architecture: str, pooling: Pooling, causal: bool, load: Callable[..., Model]
):
    model = load(architecture)
    sequences = texts(1, 9, 40, 100)
    ours, theirs = (
        decode(model, sequences, pooling=pooling, causal=causal, tap=tap) for tap in (True, False)
    )
    assert ours.shape == theirs.shape == (150 if pooling is Pooling.NONE else 4, model.dim)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2_bidirectional"])
@pytest.mark.parametrize("tap", [True, False])
def test_who_attends_is_ours_to_say(architecture: str, tap: bool, load: Callable[..., Model]):
    """Files of bidirectional models do not always say so."""
    model = load(architecture)
    one_way, both_ways, unsaid = (
        decode(model, texts(40), causal=causal, tap=tap, pooling=Pooling.CLS)
        for causal in (True, False, None)
    )
    assert distance(one_way, both_ways) > 1e-2
    # The first token's vector does not depend on the others if it sees none of them.
    assert distance(one_way, decode(model, [texts(40)[0][:1]], causal=True, tap=tap)) < 1e-5
    assert distance(unsaid, one_way if architecture == "qwen3" else both_ways) < 1e-6


@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.MEAN, Pooling.CLS])
@pytest.mark.parametrize("n_ubatch", [32, 100, 128])
def test_a_sequence_that_spans_microbatches(
    pooling: Pooling, n_ubatch: int, load: Callable[..., Model]
):
    sequences = texts(129, 100)
    whole = decode(load("qwen3"), sequences, pooling=pooling)
    split = decode(load("qwen3"), sequences, pooling=pooling, n_ubatch=n_ubatch, tap=True)
    assert distance(split, whole) < 1e-5


@pytest.mark.parametrize("outtype", ["F32", "F16"])
def test_a_shared_prefix_changes_nothing(outtype: str, load: Callable[..., Model]):
    """Without flash attention, whose sums depend on where in the cache a token is."""
    one, other = texts(30, 30, seed=1)
    rows = [np.concatenate([one, text]) for text in texts(1, 12, 50)]
    others = [np.concatenate([other, text]) for text in texts(3, 30, seed=2)]
    settings = RunSettings(max_batch_tokens=256, flash_attn=False)
    with Runner(load("qwen3", outtype), LAST, settings) as run:
        plain, others_plain = run.run(rows).vectors, run.run(others).vectors
        for _ in range(2):  # the second time the prefix is still there
            assert distance(run.run(rows, n_prefix=30).vectors, plain) < 1e-6
            assert distance(run.run(others, n_prefix=30).vectors, others_plain) < 1e-6
            assert distance(run.run(rows[1:], n_prefix=25).vectors, plain[1:]) < 1e-6
        assert distance(run.run(rows).vectors, plain) < 1e-6


def test_a_shared_prefix_with_flash_attention(load: Callable[..., Model]):
    (prefix,) = texts(30, seed=1)
    rows = [np.concatenate([prefix, text]) for text in texts(1, 12, 50)]
    with Runner(load("qwen3"), LAST, RunSettings(max_batch_tokens=256)) as run:
        plain = run.run(rows).vectors
        assert distance(run.run(rows, n_prefix=30).vectors, plain) < 1e-5


def test_as_many_texts_as_allowed_share_a_prefix(load: Callable[..., Model]):
    """The prefix is a sequence too, and so takes a place of its own."""
    rows = [np.array([7, 8, token], np.int32) for token in range(16)]
    settings = RunSettings(max_batch_tokens=16, max_batch_seqs=16)
    with Runner(load("qwen3"), LAST, settings) as run:
        assert distance(run.run(rows, n_prefix=2).vectors, run.run(rows).vectors) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "outtype"),
    [("bert", "F32"), ("bert", "Q8_0")]
    + [("qwen3", outtype) for outtype in ("F32", "F16", "Q8_0", "Q4_K_M")],
)
def test_a_text_alone_has_the_same_bits_again(
    architecture: str, outtype: str, load: Callable[..., Model]
):
    """Whatever was decoded before it, on any number of threads and in any context."""
    model = load(architecture, outtype)
    mode = CLS if architecture == "bert" else LAST
    rows = texts(1, 2, 7, 8, 9, 31, 33, 64, 100)
    results: list[Vectors] = []
    for n_threads, n_contexts, max_batch_tokens in ((1, 1, 128), (2, 1, 256), (3, 2, 512)):
        settings = RunSettings(
            n_threads=n_threads, n_contexts=n_contexts, max_batch_tokens=max_batch_tokens
        )
        with Runner(model, mode, replace(settings, tap=not mode.encoder)) as run:
            run.run(rows[:5])
            order = range(len(rows)) if n_threads == 1 else reversed(range(len(rows)))
            alone = {row: run.submit([rows[row]]) for row in order}
            results.append(
                np.concatenate([alone[row].result().vectors for row in range(len(rows))])
            )
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_token_vectors_are_those_before_pooling(load: Callable[..., Model]):
    (tokens,) = texts(77)
    settings = RunSettings(max_batch_tokens=32)
    with Runner(load("qwen3"), LAST, settings) as run:
        vectors = run.run([tokens], head=Head.TOKENS).vectors
        assert vectors.shape == (77, 256)
        assert distance(vectors[-1:], run.run([tokens]).vectors) < 1e-5
    with Runner(load("bert"), CLS, RunSettings(tap=False)) as run:
        vectors = run.run([tokens], head=Head.TOKENS).vectors
        assert vectors.shape == (77, 96)
        assert distance(vectors[:1], run.run([tokens]).vectors) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [
        ("qwen3", LAST),
        ("qwen3", replace(LAST, pooling=Pooling.MEAN)),
        ("qwen2_bidirectional", replace(LAST, causal=False)),
        ("qwen2_bidirectional", replace(LAST, causal=False, pooling=Pooling.MEAN)),
        ("bert", CLS),
    ],
)
@pytest.mark.parametrize("n_tokens", [5, 100, 400])
def test_token_vectors_on_contexts_that_pool(
    architecture: str, mode: EmbedMode, n_tokens: int, load: Callable[..., Model]
):
    """As in a context that pools nothing, also where a text is decoded in pieces."""
    model = load(architecture)
    (tokens,) = texts(min(n_tokens, 128) if mode.encoder else n_tokens)
    settings = RunSettings(max_batch_tokens=128, max_batch_seqs=8, tap=not mode.encoder)
    params = replace(PARAMS, n_ctx=512, n_ubatch=512, pooling=Pooling.NONE, causal=mode.causal)
    with Context(model, params, mode.encoder) as context:
        whole = context.run([tokens])
    with Runner(model, mode, settings) as run:
        before = run.run(texts(9)).vectors
        for _ in range(2):
            vectors = run.run([tokens], head=Head.TOKENS).vectors
            assert vectors.shape == whole.shape
            assert distance(vectors, whole) < 1e-4
        np.testing.assert_array_equal(run.run(texts(9)).vectors, before)


def test_a_reranker_scores_and_others_do_not(load: Callable[..., Model]):
    pair = texts(20)
    rank = replace(LAST, pooling=Pooling.RANK)
    with Runner(load("qwen3_reranker"), rank, RunSettings(tap=False)) as run:
        assert run.run(pair, head=Head.RANK).vectors.shape == (1, 2)
        with pytest.raises(BadInput, match="no pooled"):
            run.run(pair)
    other = Runner(load("qwen3"), LAST, RunSettings())
    with other, pytest.raises(BadInput, match="no rank"):
        other.run(pair, head=Head.RANK)


# ------------------------------------------------------------------------ is there a tap?


def test_the_tap_is_proved_before_it_is_used(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
):
    model = load("qwen3")
    assert tap_works(model, LAST, RunSettings())
    monkeypatch.setattr(native_tap, "TAPPED_TENSOR", b"of another architecture")
    assert not tap_works(model, LAST, RunSettings())


def test_a_tap_at_the_wrong_tensor_is_not_used(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A tensor of the right shape that is not the one pooled."""
    monkeypatch.setattr(native_tap, "TAPPED_TENSOR", b"ffn_out-1")
    assert not tap_works(load("qwen3"), LAST, RunSettings())
    assert "differs" in caplog.text


@pytest.fixture(params=["in the library", "in Python"])
def each_tap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts that are made meanwhile have this one."""
    if request.param == "in Python":
        monkeypatch.setattr(native_tap, "_function_of_library", lambda: None)
    elif native_tap.tap_of(8).data is None:
        pytest.skip("no library was compiled for this llama.cpp")


@pytest.mark.usefixtures("each_tap")
@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.CLS, Pooling.MEAN])
def test_a_tap_takes_what_is_pooled(load: Callable[..., Model], pooling: Pooling):
    model, some = load("qwen3"), texts(3, 70, 1, 40)
    changes = {"pooling": pooling, "n_ubatch": 32, "n_ctx": 256}
    whole = decode(model, some, pooling=pooling)
    assert distance(decode(model, some, tap=True, **changes), whole) < 1e-5  # in four microbatches
    for text, vector in zip(some, whole, strict=True):
        assert distance(decode(model, [text], tap=True, **changes), vector[None]) < 1e-5


@pytest.mark.usefixtures("each_tap")
@pytest.mark.parametrize("name", [b"ffn_out-0", b"no such tensor"])
def test_what_is_not_the_last_hidden_state_is_refused(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, name: bytes
):
    """All tokens' rows where those of some were asked for, or none."""
    monkeypatch.setattr(native_tap, "TAPPED_TENSOR", name)
    with pytest.raises(TapUnavailable, match="outputs at"):
        decode(load("qwen3"), texts(5, 9), tap=True)


def test_rows_of_another_width_are_refused(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
):
    """By the library, which would write beyond its memory."""
    monkeypatch.setattr(native_tap, "TAPPED_TENSOR", b"kqv_out-1")
    if native_tap.tap_of(8).data is None:
        pytest.skip("no library was compiled for this llama.cpp")
    with pytest.raises(TapUnavailable, match="outputs at"):
        decode(load("qwen3"), texts(1), tap=True)


def test_what_fails_in_a_tap_in_python_is_raised(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(native_tap, "_function_of_library", lambda: None)
    with Context(load("qwen3"), replace(PARAMS, tap=True), encoder=False) as context:
        monkeypatch.setattr(context._tap, "_get_rows", fail)
        with pytest.raises(ZeroDivisionError):
            context.run(texts(5))


def fail(_: int) -> int:
    """What no memory would be."""
    raise ZeroDivisionError


@pytest.mark.parametrize("mode", [CLS, EmbedMode(pooling=Pooling.RANK, causal=True, encoder=False)])
def test_no_tap_where_nothing_is_gained(mode: EmbedMode):
    assert not tap_works(SimpleNamespace(), mode, RunSettings())  # nothing is tried


# --------------------------------------------------------------------- contexts, with fakes


@dataclass(eq=False, slots=True)
class Lab:
    """Makes fake contexts and remembers them."""

    poison: Callable[[Tokens, int, ContextParams], bool] = lambda *_: False
    value: float = np.nan  # what is wrong in a poisoned vector
    spreads: bool = False  # one NaN makes its whole microbatch NaN
    together: threading.Barrier | None = None  # runs that must be under way at the same time
    takes_s: float = 0.0  # each call
    made: list[FakeContext] = field(default_factory=list)

    def context(self, _model: object, params: ContextParams, encoder: bool) -> FakeContext:
        context = FakeContext(self, params)
        self.made.append(context)
        return context

    @property
    def open(self) -> list[FakeContext]:
        return [context for context in self.made if not context.closed]


@dataclass(eq=False, slots=True)
class FakeContext:
    """The vector of a text is (sum, length) of its tokens.

    As with llama.cpp, a NaN stays in the memory: all later texts are NaN until it is cleared.
    """

    lab: Lab
    params: ContextParams
    closed: bool = False
    spoiled: bool = False
    runs: list[int] = field(default_factory=list)  # rows of each call
    n_threads: list[int] = field(default_factory=list)  # of each call that was given some

    @property
    def gives_tokens(self) -> bool:
        return self.params.pooling is Pooling.NONE or (self.params.tap and self.params.causal)

    def token_vectors(self, sequence: Tokens) -> Vectors:
        assert self.gives_tokens
        return self.run([np.array([token]) for token in sequence])

    def use_threads(self, n_threads: int) -> None:
        self.n_threads.append(n_threads)

    def run(self, sequences: Sequence[Tokens], *, n_prefix: int = 0) -> Vectors:
        assert not self.closed
        if self.lab.together is not None:
            self.lab.together.wait(timeout=10)
        time.sleep(self.lab.takes_s)
        self.runs.append(len(sequences))
        vectors = expected(sequences)
        if self.params.pooling is Pooling.NONE:
            sequences = [ids[i : i + 1] for ids in sequences for i in range(len(ids))]
            vectors = expected(sequences)
        bad = [self.lab.poison(text, len(sequences), self.params) for text in sequences]
        vectors[self.spoiled | np.array(bad) | (self.lab.spreads and any(bad))] = self.lab.value
        self.spoiled |= any(bad)
        return vectors

    def forget(self) -> None:
        self.spoiled = False

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def expected(sequences: Sequence[Tokens]) -> Vectors:
    return np.array([[text.sum(), len(text)] for text in sequences], np.float32)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab()
    monkeypatch.setattr(runner, "Context", lab.context)
    return lab


def fake_runner(mode: EmbedMode = LAST, **changes: object) -> Runner:
    settings = RunSettings(max_batch_tokens=64, tap=not mode.encoder)
    return Runner(SimpleNamespace(), mode, replace(settings, **changes))


def test_contexts_compute_at_the_same_time(lab: Lab):
    with fake_runner(n_contexts=3) as run:
        lab.together = threading.Barrier(3)
        futures = [run.submit([text]) for text in texts(3, 4, 5)]
        done, _ = wait(futures, timeout=20)
        vectors = np.concatenate([future.result().vectors for future in futures])
    assert len(done) == 3
    np.testing.assert_array_equal(vectors, expected(texts(3, 4, 5)))
    assert [context.runs for context in lab.made] == [[1], [1], [1]]


def test_a_microbatch_may_have_the_threads_of_several_contexts(lab: Lab):
    with fake_runner(n_contexts=3, n_threads=2) as run:
        for share in (3, 1, 2):
            run.run(texts(3), n_contexts=share)
    assert sorted(n for context in lab.made for n in context.n_threads) == [2, 4, 6]


@pytest.mark.parametrize("share", [2, 3])
def test_takers_of_several_contexts_do_not_wait_for_one_another(share: int, lab: Lab):
    """Two that each hold a part of what they need would."""
    lab.takes_s = 0.001
    with fake_runner(n_contexts=3) as run, ThreadPoolExecutor(6) as callers:
        long = texts(run.ordinary_tokens + 1)
        jobs = [callers.submit(run.run, texts(3), n_contexts=share) for _ in range(40)]
        jobs += [callers.submit(run.run, long) for _ in range(10)]
        jobs += [callers.submit(run.run, texts(4)) for _ in range(40)]
        done, _ = wait(jobs, timeout=20)
    assert len(done) == 90


def test_one_context_is_used_by_one_thread_at_a_time(lab: Lab):
    with fake_runner() as run, ThreadPoolExecutor(2) as callers:
        lab.together = threading.Barrier(2)  # for this thread and one run: two would pass it
        futures = [callers.submit(run.run, [text]) for text in texts(3, 4)]
        for _ in futures:
            time.sleep(0.02)
            lab.together.wait(timeout=5)
        vectors = np.concatenate([future.result().vectors for future in futures])
    np.testing.assert_array_equal(vectors, expected(texts(3, 4)))


@pytest.mark.parametrize(("mode", "room"), [(LAST, 128), (CLS, 64)])
def test_a_long_text_gets_a_larger_context_and_the_others_stay(
    mode: EmbedMode, room: int, lab: Lab
):
    with fake_runner(mode, n_contexts=2, n_threads=3) as run:
        ordinary = list(lab.made)
        run.run(texts(room))
        assert lab.made == ordinary
        for n, n_made in ((room + 1, 3), (LONG_STEP, 3), (LONG_STEP + 1, 4), (room + 1, 4)):
            (text,) = texts(n)
            np.testing.assert_array_equal(run.run([text]).vectors, expected([text]))
            assert len(lab.made) == n_made
        assert lab.open == [*ordinary, lab.made[-1]]
        long = lab.made[-1].params
        assert long.n_ctx == 2 * LONG_STEP
        assert long.n_threads == 6  # the others wait for it
        # An encoder sees a text whole; others take it in microbatches of the ordinary size.
        assert long.n_ubatch == (long.n_ctx if mode.encoder else 64)
    assert lab.open == []


@pytest.mark.parametrize(
    ("mode", "n_made"), [(LAST, 1), (replace(LAST, causal=False), 2), (CLS, 2)]
)
def test_token_vectors_make_no_context_for_each_text(mode: EmbedMode, n_made: int, lab: Lab):
    """One is made, and kept, where the ordinary ones cannot give them."""
    with fake_runner(mode) as run:
        for n in (5, 60, 7):
            (tokens,) = texts(n)
            vectors = run.run([tokens], head=Head.TOKENS).vectors
            np.testing.assert_array_equal(vectors[:, 0], tokens)
        assert len(lab.made) == n_made
        assert run.contexts_for(9, Head.TOKENS) == 1
    assert lab.open == []


def test_a_shared_prefix_counts_once(lab: Lab):
    """40 tokens of prefix and three times 20: fits; computed in full it would not."""
    (prefix,) = texts(40)
    rows = [np.concatenate([prefix, text]) for text in texts(20, 20, 20)]
    with fake_runner() as run:
        assert run.max_prefix
        run.run(rows, n_prefix=40)
        assert len(lab.made) == 1
        run.run(rows)
        assert len(lab.made) == 2


def test_who_can_share_a_prefix(lab: Lab):
    for mode, tap, can in (
        (LAST, True, True),
        (LAST, False, False),
        (replace(LAST, causal=False), True, False),
        (replace(LAST, pooling=Pooling.MEAN), True, False),
        (CLS, False, False),
    ):
        with fake_runner(mode, tap=tap) as run:
            assert bool(run.max_prefix) is can


@pytest.mark.parametrize("mode", [LAST, CLS, replace(LAST, causal=False)])
@pytest.mark.parametrize("max_batch_tokens", [8, 100, 2048])
@pytest.mark.parametrize("max_batch_seqs", [1, 64, 256])
def test_ordinary_contexts_hold_a_full_microbatch(
    mode: EmbedMode, max_batch_tokens: int, max_batch_seqs: int, lab: Lab
):
    with fake_runner(mode, max_batch_tokens=max_batch_tokens, max_batch_seqs=max_batch_seqs):
        params = lab.made[0].params
    assert params.n_ubatch >= max_batch_tokens
    assert params.n_ctx >= max_batch_tokens
    assert min(max_batch_seqs, max_batch_tokens) <= params.n_seq_max <= MAX_SEQS


def test_closing_waits_for_what_is_under_way(lab: Lab):
    run = fake_runner()
    lab.together = threading.Barrier(2)
    future = run.submit(texts(3))
    closer = threading.Thread(target=run.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    lab.together.wait(timeout=10)
    closer.join(10)
    np.testing.assert_array_equal(future.result().vectors, expected(texts(3)))
    assert lab.open == []
    run.close()


def test_contexts_made_before_a_failure_are_freed(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    def context(model: object, params: ContextParams, encoder: bool) -> FakeContext:
        if len(lab.made) == 2:
            raise NativeFailed("no memory")
        return lab.context(model, params, encoder)

    monkeypatch.setattr(runner, "Context", context)
    with pytest.raises(NativeFailed, match="no memory"):
        fake_runner(n_contexts=3)
    assert len(lab.made) == 2
    assert lab.open == []


# ------------------------------------------------------------------------------------ NaN

POISON = 999


def poisoned(text: Tokens) -> Tokens:
    return np.append(text, np.int32(POISON))


def has_poison(text: Tokens) -> bool:
    return POISON in text


KINDS: dict[str, Callable[[Tokens, int, ContextParams], bool]] = {
    "among others": lambda text, n_rows, _: has_poison(text) and n_rows > 1,
    "with flash attention": lambda text, _, params: has_poison(text) and params.flash_attn is True,
    "with the tap": lambda text, _, params: has_poison(text) and params.tap,
    "always": lambda text, *_: has_poison(text),
}


@pytest.mark.parametrize("spreads", [False, True])
@pytest.mark.parametrize("n_prefix", [0, 2])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_kept_to_its_row(kind: str, long: bool, n_prefix: int, spreads: bool, lab: Lab):
    lab.poison, lab.spreads = KINDS[kind], spreads
    (prefix,) = texts(2)
    rows = [np.concatenate([prefix, text]) for text in texts(5, 300 if long else 6, 7, 8)]
    rows[1], rows[3] = poisoned(rows[1]), poisoned(rows[3])
    with fake_runner() as run:
        outcome = run.run(rows, n_prefix=n_prefix)
        assert outcome.bad == ((1, 3) if kind == "always" else ())
        right = [row for row in range(4) if row not in outcome.bad]
        np.testing.assert_array_equal(outcome.vectors[right], expected(rows)[right])
        assert np.isnan(outcome.vectors[list(outcome.bad)]).all()
        assert not any(context.spoiled for context in lab.open)
        # Another context is made only where alone in the same one was not enough.
        assert len(lab.made) - 1 - long == (0 if kind == "among others" else 2)
        # Nothing is left behind, in the ordinary contexts and in the long one.
        for clean in (texts(5, 6, 7), texts(200)):
            again = run.run(clean)
            np.testing.assert_array_equal(again.vectors, expected(clean))
            assert again.bad == ()


def test_the_last_resort_is_llama_cpps_own_path(lab: Lab):
    lab.poison = KINDS["with the tap"]
    with fake_runner() as run:
        run.run([poisoned(texts(9)[0])])
        resort = lab.made[-1]
        assert lab.open == [lab.made[0]]
    assert (resort.params.tap, resort.params.flash_attn) == (False, False)
    assert (resort.params.n_ctx, resort.params.n_ubatch) == (10, 10)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 0.0])
def test_infinity_and_no_length_are_as_bad_as_nan(value: float, lab: Lab):
    lab.value, lab.poison = value, KINDS["always"]
    with fake_runner() as run:
        assert run.run([*texts(4), poisoned(texts(5)[0])]).bad == (1,)


@pytest.mark.parametrize("mode", [LAST, CLS])
@pytest.mark.parametrize("kind", ["once", "with flash attention", "always"])
def test_token_vectors_are_guarded(kind: str, mode: EmbedMode, lab: Lab):
    n_calls = 0

    def once(text: Tokens, *_: object) -> bool:
        nonlocal n_calls
        n_calls += 1
        return n_calls == 3

    lab.poison = once if kind == "once" else KINDS[kind]
    text = poisoned(texts(5)[0])
    with fake_runner(mode) as run:
        outcome = run.run([text], head=Head.TOKENS)
        assert outcome.bad == ((0,) if kind == "always" else ())
        if kind != "always":
            np.testing.assert_array_equal(outcome.vectors[:, 0], text)
        assert not any(context.spoiled for context in lab.open)


def test_a_score_may_be_zero(lab: Lab):
    lab.value, lab.poison = 0.0, KINDS["always"]
    with fake_runner(replace(LAST, pooling=Pooling.RANK), tap=False) as run:
        assert run.run([poisoned(texts(5)[0])], head=Head.RANK).bad == ()


def test_nan_is_reported(lab: Lab, caplog: pytest.LogCaptureFixture):
    lab.poison = KINDS["among others"]
    with fake_runner() as run:
        run.run([*texts(4), poisoned(texts(5)[0])])
    assert "NaN in 1 rows of a microbatch; 0 stay NaN alone" in caplog.text
