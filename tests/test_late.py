"""Late chunking: a chunk's vector is made of the token vectors of the whole document."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.late import DOCUMENT, NAMES, PROMPT, SPANS, load
from reference.make_reference import CASES

from gguf_embed import BadInput, BadOption, BadText, Embedder, NativeFailed, Settings, TextTooLong
from gguf_embed.engine.backend import Outcome
from gguf_embed.engine.late import token_places
from gguf_embed.native.model import Tokens
from gguf_embed.testing import FakeBackend, FakeEmbedder


class Open(Protocol):
    def __call__(
        self, name: str, *, isolated: bool = False, n_ctx: int | None = None
    ) -> Embedder: ...


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("late")

    @cache
    def write(name: str) -> Path:
        return CASES[name].write(folder / f"{name}.gguf").path

    with ExitStack() as opened:

        @cache
        def open_model(name: str, *, isolated: bool = False, n_ctx: int | None = None) -> Embedder:
            settings = Settings(tune=False, n_threads=1, n_ctx=n_ctx)
            return opened.enter_context(
                Embedder.open(write(name), settings=settings, isolated=isolated)
            )

        yield open_model


def cosines(a: Any, b: Any) -> Any:
    return np.einsum("nd,nd->n", a, b)


@pytest.mark.native
@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_transformers(name: str, open_model: Open):
    embedder, stored = open_model(name), load(name)
    vectors = embedder.encode_chunks(DOCUMENT, SPANS)
    assert (vectors.dtype, vectors.shape) == (np.float32, stored["plain"].shape)
    assert cosines(vectors, stored["plain"]).min() > 0.9999
    prompted = embedder.encode_chunks(DOCUMENT, SPANS, prompt=PROMPT)
    assert cosines(prompted, stored["prompted"]).min() > 0.9999
    assert cosines(prompted, stored["plain"]).min() < 0.9999
    order = [3, 0, 9, 3]
    some = embedder.encode_chunks(DOCUMENT, [SPANS[at] for at in order])
    np.testing.assert_array_equal(some, vectors[order])


@pytest.mark.native
def test_it_is_not_the_vector_of_the_chunk_alone(open_model: Open):
    embedder = open_model("xlmr-mean")
    late = embedder.encode_chunks(DOCUMENT, SPANS[:3])
    alone = embedder.encode([DOCUMENT[start:end] for start, end in SPANS[:3]])
    assert cosines(late, alone).max() < 0.995


@pytest.mark.native
def test_isolated_and_options(open_model: Open):
    embedder = open_model("qwen3-mean")
    vectors = embedder.encode_chunks(DOCUMENT, SPANS)
    isolated = open_model("qwen3-mean", isolated=True)
    np.testing.assert_array_equal(isolated.encode_chunks(DOCUMENT, SPANS), vectors)
    raw = embedder.encode_chunks(DOCUMENT, SPANS, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1)[:, None], vectors, atol=1e-6)
    assert embedder.encode_chunks(DOCUMENT, SPANS, dimensions=64).shape == (len(SPANS), 64)
    tokens = embedder.token_vectors(DOCUMENT)
    whole = tokens[: len(tokens) - 1].mean(axis=0)  # without the end token
    np.testing.assert_allclose(raw[8], whole, atol=1e-4)


@pytest.mark.native
def test_a_document_that_is_too_long_goes_in_windows_where_that_is_asked_for(open_model: Open):
    embedder = open_model("qwen3-mean", n_ctx=60)
    n_tokens = int(embedder.count_tokens([DOCUMENT])[0])
    spans = SPANS[:8]
    with pytest.raises(TextTooLong, match=rf"row 0: {n_tokens} tokens"):
        embedder.encode_chunks(DOCUMENT, spans)
    vectors = embedder.encode_chunks(DOCUMENT, spans, windows=True)
    whole = open_model("qwen3-mean").encode_chunks(DOCUMENT, spans)
    # A causal model: what the first window has is what the document has.
    first = 0
    while int(embedder.count_tokens([DOCUMENT[: spans[first][1]]])[0]) <= 60:
        first += 1
    assert 1 < first < len(spans)
    np.testing.assert_allclose(vectors[: first - 1], whole[: first - 1], atol=2e-3)
    # The next one begins where its first span does.
    begin = spans[first][0]
    own = open_model("qwen3-mean").encode_chunks(DOCUMENT[begin:], [(0, spans[first][1] - begin)])
    np.testing.assert_allclose(vectors[first], own[0], atol=2e-3)
    with pytest.raises(TextTooLong):  # one span alone
        embedder.encode_chunks(DOCUMENT, [(0, len(DOCUMENT))], windows=True)
    again = open_model("qwen3-mean").encode_chunks(DOCUMENT, spans, windows=True)
    np.testing.assert_array_equal(again, whole)  # it fits


@pytest.mark.native
def test_a_first_token_model_has_no_chunks(open_model: Open):
    with pytest.raises(BadOption, match="makes a vector of a text's first token"):
        open_model("bert-cls").encode_chunks(DOCUMENT, SPANS)


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([(0, 5), (3, 3)], r"span 1 is \(3, 3\)"),
        ([(-1, 4)], "span 0 is"),
        ([(0, 99)], "within the 9 characters"),
        ([3], r"span 0 is 3; pass \(start, end\)"),
        ([("a", "b")], "pass .start, end."),
        ([(1, 2, 3)], "pass .start, end."),
        ([(2, 4)], r"span 0 \(2, 4\) holds no token of its own"),
    ],
)
def test_what_is_no_span(spans: Any, complaint: str):
    with FakeEmbedder.open() as embedder, pytest.raises(BadInput, match=complaint):
        embedder.encode_chunks("a cat sat", spans)


def test_what_is_no_option():
    with FakeEmbedder.open(n_ctx=8) as embedder:
        with pytest.raises(BadOption, match="would lose chunks"):
            embedder.encode_chunks("a cat", [(0, 1)], truncate="end")
        with pytest.raises(BadOption, match="windows=3"):
            embedder.encode_chunks("a cat", [(0, 1)], windows=3)  # type: ignore[arg-type]
        with pytest.raises(BadText):
            embedder.encode_chunks("a \ud800", [(0, 1)])
        with pytest.raises(BadInput, match="the document is an int"):
            embedder.encode_chunks(3, [(0, 1)])  # type: ignore[arg-type]
        assert embedder.encode_chunks("a cat", []).shape == (0, 64)


class _Failing(FakeBackend):
    def run(self, sequences: Any, **how: Any) -> Outcome:
        return Outcome(vectors=super().run(sequences, **how).vectors, bad=(0,))


def test_a_document_without_vectors():
    with FakeEmbedder.open(backend=_Failing()) as embedder:
        with pytest.raises(NativeFailed, match="row 0"):
            embedder.encode_chunks("a cat", [(0, 1)])
        assert np.isnan(embedder.encode_chunks("a cat", [(0, 1)], on_error="skip")).all()


def test_the_fake_knows_its_words():
    with FakeEmbedder.open() as embedder:
        text = "one two  three\nfour"
        vectors = embedder.encode_chunks(text, [(0, 4), (4, 9), (9, 19)], normalize=False)
        alone = embedder.encode(["one", "two", "three four"], normalize=False)
        np.testing.assert_allclose(vectors[0], alone[0] * (vectors[0].max() / 1), atol=0.01)
        assert (vectors.argmax(axis=1) == alone.argmax(axis=1)).all()


# A tokenizer whose tokens depend on what is around them: a blank joins the word after it, and pairs
# of equal letters are one token.
def ends_of_tokens(text: str) -> list[int]:
    ends = [0]
    while ends[-1] < len(text):
        at = ends[-1]
        pair = text[at] == " " or text[at] == text[at + 1 : at + 2]
        ends.append(min(at + 1 + pair, len(text)))
    return ends[1:]


def tokenize(text: str) -> Tokens:
    ends = ends_of_tokens(text)
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return np.array([hash(piece) & 0x7FFFFFFF for piece in pieces], np.int32)


@given(st.text("ab \n", max_size=200), st.data())
def test_tokens_are_found_whatever_they_hang_on(text: str, data: st.DataObject):
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    found = token_places(tokenize(text), text, places, tokenize)
    ends = ends_of_tokens(text)
    for place in places:
        cut = place if place in (0, len(text)) else len(text[:place].rstrip(" \t"))
        assert found[place] == sum(end <= cut for end in ends)


def test_a_place_that_only_seems_to_begin_anew():
    """Tokens that change 70 characters after a "q": what follows it looks as it does by itself."""

    def tokenize(text: str) -> Tokens:
        ids = [
            ord(each) + 1000 * text[: max(at - 70, 0)].count("q") for at, each in enumerate(text)
        ]
        return np.array(ids, np.int32)

    text = "q" + "abcdefgh" * 20
    found = token_places(tokenize(text), text, [5, 100], tokenize)
    assert (found[5], found[100]) == (5, 100)
