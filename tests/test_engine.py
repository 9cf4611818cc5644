"""`Embedder`: one vector per text, in order, whatever the batching; errors name their rows."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import tiny
from conftest import Write
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS

from gguf_embed.catalog import catalog
from gguf_embed.engine import loaded, runner, tune
from gguf_embed.engine.embedder import Block, Embedder
from gguf_embed.engine.stream import ENCODE_WINDOW, WINDOW
from gguf_embed.errors import BadInput, BadModelFile, BadOption, BadText, NativeFailed, TextTooLong
from gguf_embed.native import tap as native_tap
from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.settings import Settings
from gguf_embed.vectors import Pooling, Vectors

pytestmark = pytest.mark.native

CAT, DOG = "the cat sat on the mat", "a dog in the river"


class Open(Protocol):
    """Opens a tiny model; the same arguments give the same embedder."""

    def __call__(
        self, architecture: str = "qwen3", outtype: str = "F32", **choices: Any
    ) -> Embedder: ...


@pytest.fixture(scope="module")
def open_tiny(tiny_model: Write) -> Iterator[Open]:
    with ExitStack() as opened:

        @cache
        def open_tiny(
            architecture: str = "qwen3", outtype: str = "F32", **choices: Any
        ) -> Embedder:
            chosen = Settings(tune=False, **({"n_threads": 1} | choices))
            path = tiny_model(architecture, outtype)
            return opened.enter_context(Embedder.open(path, settings=chosen))

        yield open_tiny


@pytest.fixture(scope="module")
def qwen3(open_tiny: Open) -> Embedder:
    return open_tiny()


@pytest.fixture(scope="module")
def builtin() -> Iterator[Embedder]:
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        yield embedder


def one_by_one(embedder: Embedder, texts: Iterable[str], **choices: Any) -> Vectors:
    return np.stack([embedder.encode(text, **choices) for text in texts])


def distance(a: Vectors, b: Vectors) -> float:
    """1 - cosine of the two rows that agree least."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosines = np.einsum("nd,nd->n", a, b)
    cosines /= np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 1 - float(cosines.min(initial=1))


@pytest.fixture
def calls(qwen3: Embedder, monkeypatch: pytest.MonkeyPatch) -> list[list[Tokens]]:
    """The sequences of each microbatch that `qwen3` decodes."""
    calls: list[list[Tokens]] = []
    run = Context.run

    def recorded(context: Context, sequences: Sequence[Tokens], *, n_prefix: int = 0) -> Vectors:
        if context.model.path == qwen3.path:
            calls.append(list(sequences))
        return run(context, sequences, n_prefix=n_prefix)

    monkeypatch.setattr(Context, "run", recorded)
    return calls


# -------------------------------------------------------------------------------- shapes


def test_a_str_gives_a_vector_and_anything_else_a_matrix(qwen3: Embedder):
    vector = qwen3.encode(CAT)
    assert (vector.shape, vector.dtype) == ((256,), np.float32)
    for texts in ([CAT], (CAT,), iter([CAT]), {CAT: 0}.keys(), np.array([CAT])):
        np.testing.assert_array_equal(qwen3.encode(texts), [vector])


@pytest.mark.parametrize("nothing", [[], (), iter(()), {}.keys()])
def test_no_texts_give_no_rows(nothing: Iterable[str], qwen3: Embedder):
    for choices, dim in (({}, 256), ({"dimensions": 32}, 32)):
        vectors = qwen3.encode(nothing, **choices)
        assert (vectors.shape, vectors.dtype) == ((0, dim), np.float32)
    assert list(qwen3.stream(nothing)) == []
    assert qwen3.count_tokens([]).shape == (0,)


def test_the_empty_text_is_a_text(qwen3: Embedder, open_tiny: Open):
    for embedder in (qwen3, open_tiny("bert")):
        vectors = embedder.encode(["", CAT, " "])
        assert np.isfinite(vectors).all()
        assert distance(vectors[:1], embedder.encode([""])) < 1e-5


# -------------------------------------------------------------- once each, back in place


def test_identical_texts_are_decoded_once(qwen3: Embedder, calls: list[list[Tokens]]):
    texts = [CAT, DOG, CAT, CAT, "fish", DOG]
    vectors = qwen3.encode(texts)
    assert sum(map(len, calls)) == 3
    np.testing.assert_array_equal(vectors[[2, 3, 5]], vectors[[0, 0, 1]])
    assert distance(vectors, one_by_one(qwen3, texts)) < 1e-5


def test_many_texts_take_few_calls(open_tiny: Open, qwen3: Embedder, calls: list[list[Tokens]]):
    texts = [f"{a} {b}" for a in WORDS[:20] for b in WORDS[20:30]]
    qwen3.encode(texts)
    assert sum(map(len, calls)) == 200
    assert len(calls) < 20


def test_one_text_is_computed_with_the_threads_of_all(
    tiny_model: Write, monkeypatch: pytest.MonkeyPatch
):
    used: list[int] = []

    class Recorder(Context):
        def use_threads(self, n_threads: int) -> None:
            used.append(n_threads)
            super().use_threads(n_threads)

    monkeypatch.setattr(runner, "Context", Recorder)
    chosen = Settings(tune=False, n_contexts=3, n_threads=2, max_batch_seqs=1)
    with Embedder.open(tiny_model("qwen3"), settings=chosen) as embedder:
        alone = embedder.encode(CAT)
        assert used == [6]
        together = embedder.encode([CAT, DOG, "fish", "bread"])
        assert used == [6, 2, 2, 2, 2]
    np.testing.assert_allclose(alone, together[0], atol=1e-6)


def test_one_instruction_is_computed_once(qwen3: Embedder, calls: list[list[Tokens]]):
    """Not once per text: the rows say how much of them is shared."""
    prompt = "instruct: given a web search query, find the relevant passages " * 3
    vectors = qwen3.encode(WORDS, prompt=prompt)
    assert len(calls) == 1
    assert distance(vectors, one_by_one(qwen3, [prompt + word for word in WORDS])) < 1e-5


words = st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join)
any_text = st.one_of(words, st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
# Few different texts in many rows; some longer than a microbatch of 64 tokens.
lists = st.lists(any_text, min_size=1, max_size=12).flatmap(
    lambda pool: st.lists(st.sampled_from([*pool, " ".join(pool)]), min_size=1, max_size=24)
)


@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
@settings(deadline=None, max_examples=20)
@given(
    texts=lists,
    prompt=words,
    window=st.integers(1, 30),
    max_batch_seqs=st.sampled_from([1, 3, None]),
    n_contexts=st.sampled_from([1, 2]),
)
def test_any_mix_equals_one_by_one(
    architecture: str,
    open_tiny: Open,
    texts: list[str],
    prompt: str,
    window: int,
    max_batch_seqs: int | None,
    n_contexts: int,
):
    embedder = open_tiny(
        architecture,
        max_batch_tokens=64,
        max_batch_seqs=max_batch_seqs,
        n_contexts=n_contexts,
    )
    choices: dict[str, Any] = {"prompt": prompt, "truncate": "end"}
    expected = one_by_one(open_tiny(architecture), texts, **choices)
    assert distance(embedder.encode(texts, **choices), expected) <= 1e-5
    blocks = list(embedder.stream(texts, window=window, **choices))
    assert distance(np.concatenate([block.vectors for block in blocks]), expected) <= 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
@settings(deadline=None, max_examples=20)
@given(texts=lists, prompt=words, order=st.randoms(use_true_random=False))
def test_exact_is_the_same_to_the_bit_in_any_company(
    architecture: str, open_tiny: Open, texts: list[str], prompt: str, order: random.Random
):
    embedder = open_tiny(architecture, "Q8_0", exact=True, max_batch_tokens=64, n_contexts=2)
    choices: dict[str, Any] = {"prompt": prompt, "truncate": "end"}
    rows = order.sample(range(len(texts)), len(texts))
    together = embedder.encode([texts[row] for row in rows], **choices)
    for row, vector in zip(rows, together, strict=True):
        np.testing.assert_array_equal(vector, embedder.encode(texts[row], **choices))


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_a_stream_is_the_matrix_in_blocks(window: int, qwen3: Embedder):
    texts = [" ".join(WORDS[: i % 7]) for i in range(12)]
    blocks = list(qwen3.stream(iter(texts), window=window))
    assert [block.start for block in blocks] == list(range(0, 12, window))
    assert all(len(block.vectors) == min(window, 12 - block.start) for block in blocks)
    counts = np.concatenate([block.token_counts for block in blocks])
    np.testing.assert_array_equal(counts, qwen3.count_tokens(texts))
    assert not np.concatenate([block.truncated for block in blocks]).any()
    vectors = np.concatenate([block.vectors for block in blocks])
    assert distance(vectors, qwen3.encode(texts)) < 1e-5


def test_a_list_is_one_window_and_an_iterator_is_not(
    qwen3: Embedder, monkeypatch: pytest.MonkeyPatch
):
    """Sorting all texts by length packs best, but only a caller with a list holds them anyway."""
    windows: list[int] = []
    stream = qwen3.stream

    def recorded(texts: Iterable[str], *, window: int, **choices: Any) -> Iterator[Block]:
        windows.append(window)
        return stream(texts, window=window, **choices)

    monkeypatch.setattr(qwen3, "stream", recorded)
    qwen3.encode([CAT])
    qwen3.encode(iter([CAT]))
    assert windows == [ENCODE_WINDOW, WINDOW]


@pytest.mark.parametrize("exact", [False, True])
def test_threads_may_share_an_embedder(exact: bool, open_tiny: Open):
    """Their texts share microbatches; with `exact` not even the bits depend on that."""
    embedder = open_tiny(n_contexts=2, max_batch_tokens=64, exact=exact)
    lists = [[f"{word} {i}" for word in WORDS[i : i + 9]] for i in range(12)]
    expected = [embedder.encode(texts) for texts in lists]
    with ThreadPoolExecutor(6) as callers:
        for ours, theirs in zip(callers.map(embedder.encode, lists), expected, strict=True):
            if exact:
                np.testing.assert_array_equal(ours, theirs)
            assert distance(ours, theirs) < 1e-5


# -------------------------------------------------------------------------------- memory


class Text(str):
    """A string that can be watched."""

    __slots__ = ("__weakref__",)


def test_memory_is_for_two_windows_however_many_texts(qwen3: Embedder):
    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    given, most_alive, most_ahead, taken = 0, 0, 0, 0

    def texts() -> Iterator[Text]:
        nonlocal given, most_alive, most_ahead
        for i in range(400):
            text = Text(WORDS[i % len(WORDS)] + str(i))
            alive.add(text)
            given += 1
            most_alive = max(most_alive, len(alive))
            most_ahead = max(most_ahead, given - taken)
            yield text

    for block in qwen3.stream(texts(), window=20):
        taken += len(block.vectors)
    assert taken == given == 400
    assert most_alive <= 2 * 20 + 1
    assert most_ahead <= 3 * 20


def test_an_abandoned_stream_stops_working(qwen3: Embedder, calls: list[list[Tokens]]):
    stream = qwen3.stream((f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS), window=9)
    next(stream)
    stream.close()
    assert sum(map(len, calls)) <= 2 * 9
    assert qwen3.encode([CAT]).shape == (1, 256)


# ------------------------------------------------------------------------------ progress


@pytest.mark.parametrize("texts", [[CAT], [CAT, DOG, CAT], [f"{word} a" for word in WORDS]])
def test_progress_adds_up_in_the_callers_thread(texts: list[str], open_tiny: Open):
    """In another thread the last step could come after the call has returned."""
    embedder = open_tiny(max_batch_tokens=64, n_contexts=2)
    done: list[tuple[int, int]] = []
    threads: set[int] = set()

    def on_progress(n_texts: int, n_tokens: int) -> None:
        done.append((n_texts, n_tokens))
        threads.add(threading.get_ident())

    embedder.encode(texts, on_progress=on_progress)
    assert threads == {threading.get_ident()}
    n_tokens = int(embedder.count_tokens(list(dict.fromkeys(texts))).sum())
    assert sum(n for n, _ in done) == len(texts)
    assert 0 < sum(n for _, n in done) <= n_tokens


def test_progress_that_fails_is_an_error(qwen3: Embedder):
    def fail(_texts: int, _tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwen3.encode([CAT, DOG], on_progress=fail)


# ------------------------------------------------------------------------------- prompts


def test_a_prompt_is_put_in_front(qwen3: Embedder):
    with_prompt = qwen3.encode([CAT, DOG], prompt="query: ")
    assert distance(with_prompt, qwen3.encode([f"query: {CAT}", f"query: {DOG}"])) < 1e-5
    assert distance(with_prompt, qwen3.encode([CAT, DOG])) > 1e-3
    np.testing.assert_array_equal(qwen3.encode(CAT, prompt=""), qwen3.encode(CAT))


def test_prompts_come_from_the_catalog(qwen3: Embedder, monkeypatch: pytest.MonkeyPatch):
    card = catalog.find("qwen3-embedding-0.6b")
    monkeypatch.setitem(vars(qwen3), "card", card)
    query = card.prompt("query", None)
    assert query
    np.testing.assert_array_equal(
        qwen3.encode(CAT, prompt_name="query"), qwen3.encode(CAT, prompt=query)
    )
    np.testing.assert_array_equal(qwen3.encode_query(CAT), qwen3.encode(CAT, prompt=query))
    np.testing.assert_array_equal(
        qwen3.encode_query(CAT, task="find fish"),
        qwen3.encode(CAT, prompt=card.prompt("query", "find fish")),
    )
    np.testing.assert_array_equal(qwen3.encode_document([CAT]), qwen3.encode([CAT]))
    with pytest.raises(BadOption, match=r"poem"):
        qwen3.encode(CAT, prompt_name="poem")


def test_a_model_outside_the_catalog_has_plain_prompts(qwen3: Embedder):
    assert qwen3.card is None
    for encode in (qwen3.encode_query, qwen3.encode_document):
        np.testing.assert_array_equal(encode(CAT), qwen3.encode(CAT))
        np.testing.assert_allclose(
            encode([CAT], dimensions=16), qwen3.encode([CAT], dimensions=16), rtol=1e-6
        )
    with pytest.raises(BadOption, match="not in the catalog and has no prompt 'poem'"):
        qwen3.encode(CAT, prompt_name="poem")
    with pytest.raises(BadOption, match="not in the catalog"):
        qwen3.encode_query(CAT, task="find fish")


# -------------------------------------------------------------------- options and values


def test_dimensions_are_cut_before_normalizing(qwen3: Embedder):
    raw = qwen3.encode([CAT, DOG], normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.01
    for dimensions in (1, 32, 256):
        cut = raw[:, :dimensions]
        expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        vectors = qwen3.encode([CAT, DOG], dimensions=dimensions)
        np.testing.assert_allclose(vectors, expected, rtol=1e-5)
        np.testing.assert_array_equal(
            qwen3.encode([CAT, DOG], dimensions=dimensions, normalize=False), cut
        )


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"prompt": "a", "prompt_name": "query"}, "prompt_name and prompt exclude each other"),
        ({"truncate": "middle"}, "truncate='middle': choose 'error', 'end' or 'start'"),
        ({"dimensions": 0}, "dimensions=0: pass a whole number from 1"),
        ({"dimensions": 257}, "dimensions=257.* 1 to 256 values"),
        ({"prompt": "cat " * 3000}, r"prompt takes 300\d of n_ctx=2048 tokens"),
    ],
)
def test_options_that_cannot_be_honoured(
    choices: dict[str, Any], message: str, qwen3: Embedder, calls: list[list[Tokens]]
):
    with pytest.raises(BadOption, match=message):
        qwen3.encode([CAT], **choices)
    assert calls == []


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_batch_tokens", 0, "from 1,"),
        ("max_batch_seqs", 0, "from 1 to 255"),
        ("max_batch_seqs", 256, "from 1 to 255"),
        ("n_contexts", 0, "from 1,"),
        ("n_threads", -1, "from 1,"),
        ("n_ctx", 0, "from 3,"),
        ("n_ctx", 2, "from 3,"),
        ("n_ctx", 2049, "trained on 2048"),
    ],
)
def test_settings_out_of_range(name: str, value: int, allowed: str, tiny_model: Write):
    with pytest.raises(BadOption, match=f"{name}={value}.*{allowed}"):
        Embedder.open(tiny_model("qwen3"), settings=Settings(tune=False, **{name: value}))


def test_the_most_sequences_share_a_prefix(open_tiny: Open):
    embedder = open_tiny(max_batch_seqs=255, max_batch_tokens=1024)
    texts = [f"{a} {b}" for a in WORDS[:20] for b in WORDS[:15]]
    vectors = embedder.encode(texts, prompt="the river and the bank ")
    few = open_tiny().encode(texts, prompt="the river and the bank ")
    assert distance(vectors, few) < 1e-5


def test_similarity_is_the_cosine(qwen3: Embedder):
    a, b = qwen3.encode([CAT, DOG], normalize=False), qwen3.encode([CAT, "fish", DOG])
    scores = qwen3.similarity(a, b)
    assert (scores.shape, scores.dtype) == ((2, 3), np.float32)
    np.testing.assert_allclose([scores[0, 0], scores[1, 2]], 1, atol=1e-5)
    assert np.abs(scores).max() <= 1
    assert qwen3.similarity(a[0], b).shape == (1, 3)


def test_tokens_and_their_vectors(qwen3: Embedder, open_tiny: Open):
    ids = qwen3.tokenize(CAT)
    assert all(type(token) is int for token in ids)
    assert qwen3.count_tokens([CAT, "", DOG]).tolist() == [
        len(qwen3.tokenize(text)) for text in (CAT, "", DOG)
    ]
    assert qwen3.count_tokens(CAT).tolist() == [len(ids)]
    for embedder, pooled in ((qwen3, -1), (open_tiny("bert"), 0)):
        vectors = embedder.token_vectors(CAT)
        assert vectors.shape == (len(embedder.tokenize(CAT)), embedder.dim)
        assert distance(vectors[[pooled]], embedder.encode([CAT])) < 1e-5
    with pytest.raises(TextTooLong, match="row 0: 2102 tokens"):
        qwen3.token_vectors("\x01" * 2101)


def test_the_end_token_comes_last_where_the_file_does_not_say(tmp_path: Path, qwen3: Embedder):
    """Files converted before add_eos_token was written; LAST pooling reads that token."""
    path = tiny.write_qwen3(tmp_path / "old.gguf", add_eos=False).path
    raw = path.read_bytes()
    key = b"tokenizer.ggml.add_eos_token"
    assert raw.count(key) == 1
    path.write_bytes(raw.replace(key, b"tokenizer.ggml.add_xxx_token"))
    with Embedder.open(path, settings=Settings(tune=False, n_threads=1)) as embedder:
        assert embedder.tokenize(CAT) == qwen3.tokenize(CAT)
        np.testing.assert_array_equal(embedder.encode(CAT), qwen3.encode(CAT))


# ---------------------------------------------------------------------------- long texts


@pytest.mark.parametrize("window", [2, 5, 100])
def test_every_text_that_is_too_long_is_named(window: int, open_tiny: Open):
    embedder = open_tiny(n_ctx=16)
    n_read = 0

    def texts() -> Iterator[str]:
        nonlocal n_read
        for text in (CAT, "\x01" * 20, DOG, "\x02" * 16, "\x02" * 15, "\x01" * 20, CAT):
            n_read += 1
            yield text

    with pytest.raises(TextTooLong) as caught:
        list(embedder.stream(texts(), window=window))
    assert caught.value.rows == ((1, 21), (3, 17), (5, 21))
    assert caught.value.n_ctx == 16
    assert n_read == 7


def test_truncation_is_reported(open_tiny: Open):
    embedder = open_tiny(n_ctx=16)
    long = "\x01" * 10 + "\x02" * 10
    (block,) = embedder.stream([CAT, long, long, "\x01" * 15], truncate="end")
    assert block.truncated.tolist() == [False, True, True, False]
    assert block.token_counts.tolist()[1:] == [16, 16, 16]
    end, start = (embedder.encode(long, truncate=truncate) for truncate in ("end", "start"))
    np.testing.assert_array_equal(end, embedder.encode("\x01" * 10 + "\x02" * 5))
    np.testing.assert_array_equal(start, embedder.encode("\x01" * 5 + "\x02" * 10))
    less = embedder.encode([CAT, long], truncate="end", max_tokens=9)
    np.testing.assert_array_equal(less[1], embedder.encode([CAT, "\x01" * 8], max_tokens=16)[1])


def test_a_prompt_survives_truncation(open_tiny: Open):
    embedder = open_tiny(n_ctx=16)
    long = "\x01" * 10 + "\x02" * 10
    for truncate, kept in (("end", "\x01" * 8), ("start", "\x02" * 8)):
        vector = embedder.encode(long, prompt="query: ", truncate=truncate)
        n_prompt = len(embedder.tokenize("query: ")) - 1
        kept = (long[: 15 - n_prompt], long[len(long) - 15 + n_prompt :])[truncate == "start"]
        np.testing.assert_array_equal(vector, embedder.encode(kept, prompt="query: "))


def test_a_prompt_that_leaves_no_room_for_text(open_tiny: Open):
    for embedder in (open_tiny(n_ctx=16), open_tiny("bert")):
        n = embedder.n_ctx
        for truncate in ("error", "end", "start"):
            with pytest.raises(BadOption, match=rf"prompt takes \d+ of n_ctx={n} tokens"):
                embedder.encode([CAT], prompt="a " * n, truncate=truncate)


# ----------------------------------------------------------------------- texts that are not


@pytest.mark.parametrize("window", [2, 100])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "row 3: is a NoneType, not a str"),
        (b"bytes", "row 3: is a bytes, not a str"),
        (["list"], "row 3: is a list, not a str"),
        ("ab\ud800", r"row 3: character 2 is a lone surrogate \(U\+D800\)"),
        ("e\u0301\udfff", r"row 3: character 2 is a lone surrogate \(U\+DFFF\)"),
    ],
)
def test_what_is_no_text_is_named(bad: Any, message: str, window: int, open_tiny: Open):
    for embedder in (open_tiny(), open_tiny("bert")):
        with pytest.raises(BadText, match=message) as caught:
            list(embedder.stream([CAT, DOG, CAT, bad, DOG, bad], window=window))
        assert caught.value.row == 3


def test_a_surrogate_is_found_behind_a_prompt(qwen3: Embedder):
    with pytest.raises(BadText, match=r"row 1: character 0 is a lone surrogate \(U\+D800\)"):
        qwen3.encode([CAT, "\ud800"], prompt="query: ")


def test_any_characters_are_text(qwen3: Embedder, open_tiny: Open):
    odd = ["\0", "a\0b", "\ufffe\uffff", "\U0010ffff", "e\u0301", "🦙" * 9, "\r\n\t", "\u202e"]
    for embedder in (qwen3, open_tiny("bert"), open_tiny("xlmr")):
        assert np.isfinite(embedder.encode(odd)).all()


# ----------------------------------------------------------------------------------- NaN


@pytest.fixture
def nan_for_cats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts that give NaN for every text with the word "cat" in it."""
    cat = 0

    class Broken(Context):
        def run(self, sequences: Sequence[Tokens], *, n_prefix: int = 0) -> Vectors:
            vectors = super().run(sequences, n_prefix=n_prefix)
            bad = [cat in sequence for sequence in sequences]
            vectors[any(bad) if self.params.pooling is Pooling.NONE else bad] = np.nan
            return vectors

        def token_vectors(self, sequence: Tokens) -> Vectors:
            vectors = super().token_vectors(sequence)
            vectors[sequence == cat] = np.nan
            return vectors

    def of(model: Model, params: ContextParams, encoder: bool) -> Context:
        nonlocal cat
        cat = int(model.tokenize(b" cat")[0])
        return Broken(model, params, encoder)

    monkeypatch.setattr(runner, "Context", of)


@pytest.mark.parametrize("window", [2, 3, 100])
@pytest.mark.parametrize("prompt", ["", "the river bank and the money and the water and the boat "])
@pytest.mark.usefixtures("nan_for_cats")
def test_a_text_that_stays_nan_is_named(window: int, prompt: str, tiny_model: Write):
    chosen = Settings(tune=False, n_threads=1, tap=True)
    with Embedder.open(tiny_model("qwen3"), settings=chosen) as embedder:
        texts = [DOG, "fish", DOG, "a fish", "bread", CAT, "water", CAT, "yes", "no"]
        blocks: list[Block] = []
        with pytest.raises(NativeFailed, match=r"^row 5: .*NaN.*leave the row out"):
            blocks.extend(embedder.stream(texts, window=window, prompt=prompt))
        # And the engine lives on.
        good = [text for text in texts if text != CAT]
        assert np.isfinite(embedder.encode(good, prompt=prompt)).all()


@pytest.mark.usefixtures("nan_for_cats")
def test_token_vectors_that_stay_nan_are_an_error(tiny_model: Write):
    chosen = Settings(tune=False, n_threads=1, tap=True)
    with Embedder.open(tiny_model("qwen3"), settings=chosen) as embedder:
        with pytest.raises(NativeFailed, match=r"^row 0: .*NaN"):
            embedder.token_vectors(CAT)
        assert np.isfinite(embedder.token_vectors(DOG)).all()


def test_a_vector_without_length_is_an_error(tiny_model: Write, monkeypatch: pytest.MonkeyPatch):
    """As an all-zero norm or an overflow gives: the same vector for every text, without a word."""
    run = Context.run

    def zero(context: Context, sequences: Sequence[Tokens], **how: int) -> Vectors:
        return 0 * run(context, sequences, **how)

    chosen = Settings(tune=False, n_threads=1)
    with Embedder.open(tiny_model("bert"), settings=chosen) as embedder:
        monkeypatch.setattr(Context, "run", zero)
        for call in (embedder.encode, lambda text: list(embedder.stream([text]))):
            with pytest.raises(NativeFailed, match=r"^row 0: .*without length"):
                call(CAT)


def test_a_text_without_tokens_is_named(tiny_model: Write):
    """A blank line, where the model adds no end token."""
    chosen = Settings(tune=False, n_threads=1, pooling=Pooling.MEAN)
    with Embedder.open(tiny_model("qwen3", add_eos=False), settings=chosen) as embedder:
        assert embedder.tokenize("") == []
        with pytest.raises(BadText, match="row 2: has no token, and this model adds none"):
            embedder.encode([CAT, DOG, "", CAT])
        with pytest.raises(BadText, match="row 0: has no token"):
            embedder.token_vectors("")


@pytest.mark.usefixtures("nan_for_cats")
def test_a_failure_stops_the_rest(tiny_model: Write, monkeypatch: pytest.MonkeyPatch):
    """Nobody waits for the rest, so it must not go on in the background."""
    chosen = Settings(tune=False, n_threads=1, max_batch_seqs=1, tap=True)
    with Embedder.open(tiny_model("qwen3"), settings=chosen) as embedder:
        n_decoded = 0
        run = Context.run

        def counted(context: Context, sequences: Sequence[Tokens], **how: int) -> Vectors:
            nonlocal n_decoded
            n_decoded += len(sequences)
            time.sleep(0.001)  # as long as a larger model takes at least
            return run(context, sequences, **how)

        monkeypatch.setattr(Context, "run", counted)
        # The bad row is decoded before those that share no prefix with others.
        texts = [f"{CAT} {CAT} {CAT}", *(f"{a} {b}" for a in WORDS[:30] for b in WORDS[:30])]
        with pytest.raises(NativeFailed, match=r"^row 0:"):
            embedder.encode(texts)
        embedder.encode([DOG])  # what was under way is done
        before = n_decoded
        assert before < len(texts)
        time.sleep(0.1)
        assert n_decoded == before


# ---------------------------------------------------------------------- models and settings


def test_a_model_that_does_not_say_how_to_pool(tiny_model: Write, qwen3: Embedder):
    path = tiny_model("qwen3", pooling=None)
    with pytest.raises(BadModelFile, match=r"\.gguf: .*pass pooling LAST"):
        Embedder.open(path, settings=Settings(tune=False))
    chosen = Settings(tune=False, n_threads=1, pooling=Pooling.LAST)
    with Embedder.open(path, settings=chosen) as embedder:
        np.testing.assert_array_equal(embedder.encode(CAT), qwen3.encode(CAT))


def test_the_caller_may_pool_otherwise(tiny_model: Write, qwen3: Embedder):
    chosen = Settings(tune=False, n_threads=1, pooling=Pooling.MEAN)
    with Embedder.open(tiny_model("qwen3"), settings=chosen) as embedder:
        mean = qwen3.token_vectors(CAT).mean(axis=0)
        assert distance(embedder.encode([CAT]), mean[None]) < 1e-5


@pytest.mark.parametrize("pooling", [None, Pooling.RANK])
def test_a_reranker_is_refused(pooling: Pooling | None, tiny_model: Write):
    with pytest.raises(BadModelFile, match="rerank"):
        Embedder.open(tiny_model("qwen3_reranker"), settings=Settings(tune=False, pooling=pooling))


def test_without_a_tap_the_pooled_path_serves(
    tiny_model: Write, qwen3: Embedder, monkeypatch: pytest.MonkeyPatch
):
    texts = [CAT, DOG, "\x01" * 600]  # the last one longer than a microbatch
    tapped = qwen3.encode(texts)
    monkeypatch.setattr(native_tap, "TAPPED_TENSOR", b"of another architecture")
    with Embedder.open(
        tiny_model("qwen3"), settings=Settings(tune=False, n_threads=1, tap=True)
    ) as embedder:
        assert distance(embedder.encode(texts), tapped) < 1e-5


def test_what_it_says_of_itself(builtin: Embedder, qwen3: Embedder):
    assert repr(builtin) == (
        "Embedder('all-minilm-l6-v2', quant='Q8_0', dim=384, n_ctx=512, pooling=MEAN)"
    )
    assert repr(qwen3) == "Embedder('qwen3-F32', quant='F32', dim=256, n_ctx=2048, pooling=LAST)"
    assert builtin.card is not None
    assert builtin.remarks == ()


def test_nothing_is_measured_before_the_first_answer(
    tmp_path: Path, tiny_model: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "tune", lambda *_, **__: pytest.fail("it was measured"))
    said: list[str] = []
    for _ in range(2):
        with Embedder.open(tiny_model("qwen3"), on_status=said.append) as embedder:
            assert embedder.encode(CAT).shape == (256,)
    # Where the proof of the file takes seconds it has a line, too.
    plan, plan_again = [line for line in said if not line.startswith("proved ")]
    assert plan_again == embedder.plan.in_short
    assert "F32 on CPU: the file that was named; leaves" in plan


def test_a_model_that_cannot_run_is_freed(tiny_model: Write, monkeypatch: pytest.MonkeyPatch):
    """Whoever tries again with smaller settings needs the memory."""
    opened: list[Model] = []
    closed: list[Model] = []

    class Watched(Model):
        def __init__(self, *args: Any, **choices: Any) -> None:
            super().__init__(*args, **choices)
            opened.append(self)

        def close(self) -> None:
            super().close()
            closed.append(self)

    def no_memory(*_: object) -> None:
        raise NativeFailed("no context")

    monkeypatch.setattr(loaded, "Model", Watched)
    monkeypatch.setattr(runner, "Context", no_memory)
    with pytest.raises(NativeFailed, match="no context"):
        Embedder.open(tiny_model("bert"), settings=Settings(tune=False))
    assert opened == closed
    assert len(opened) == 1


# -------------------------------------------------------------------------------- closed

USES: dict[str, Callable[[Embedder], object]] = {
    "encode": lambda embedder: embedder.encode(CAT),
    "encode_query": lambda embedder: embedder.encode_query([CAT]),
    "encode_document": lambda embedder: embedder.encode_document([CAT]),
    "stream": lambda embedder: next(embedder.stream([CAT])),
    "tokenize": lambda embedder: embedder.tokenize(CAT),
    "count_tokens": lambda embedder: embedder.count_tokens([CAT]),
    "token_vectors": lambda embedder: embedder.token_vectors(CAT),
}


@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
def test_after_close_every_use_says_so(architecture: str, tiny_model: Write):
    embedder = Embedder.open(tiny_model(architecture), settings=Settings(tune=False, n_threads=1))
    stream = embedder.stream([CAT] * 9, window=2)
    next(stream)
    embedder.close()
    embedder.close()
    for use in USES.values():
        with pytest.raises(BadInput, match=rf"Embedder\('{architecture}-F32'.* is closed"):
            use(embedder)
    with pytest.raises(BadInput, match="is closed"):
        next(stream)


def test_closing_frees_the_threads(tiny_model: Write):
    before = threading.active_count()
    with Embedder.open(tiny_model("bert"), settings=Settings(tune=False)) as embedder:
        embedder.encode([CAT, DOG])
        assert threading.active_count() > before
    gc.collect()
    assert threading.active_count() == before


# ---------------------------------------------------------------------- quantized weights

LINES = [" ".join(WORDS[i : i + 1 + i % 17]) for i in range(40)]


def test_the_builtin_model_alone_and_in_batches(builtin: Embedder):
    """Kernels for quantized weights round with the number of rows: measured 2e-4 to 9e-4."""
    assert distance(builtin.encode(LINES), one_by_one(builtin, LINES)) < 2e-3


@pytest.mark.parametrize(("outtype", "bound"), [("Q8_0", 2e-3), ("Q4_K_M", 4e-3)])
def test_quantized_alone_and_in_batches(outtype: str, bound: float, open_tiny: Open):
    """Measured 3e-4 and 7e-4 with random weights, which amplify."""
    embedder = open_tiny("qwen3", outtype)
    assert distance(embedder.encode(LINES), one_by_one(embedder, LINES)) < bound
