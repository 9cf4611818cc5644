"""Our vectors equal transformers' on tiny models of every kind, whatever the batch around them.

The references are stored (reference/make_reference.py); reference/test_live.py makes them anew
where torch is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.make_reference import CASES, CUT_TO, FAMILY_TEXTS, LONG, PROMPT, load
from tiny import WORDS, Array

from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.options import Truncate
from gguf_embed.plan.settings import Settings

pytestmark = pytest.mark.native

EMBEDDERS = [name for name in CASES if name != "qwen3-reranker"]
FAMILIES = ["qwen3-last", "qwen2-bidirectional", "bert-cls", "xlmr-cls"]
NEWER = [name for name in EMBEDDERS if CASES[name].texts is FAMILY_TEXTS]
OUTTYPES = ["F32", "F16"]


class Open(Protocol):
    """Opens a case's model; the same arguments give the same embedder."""

    def __call__(
        self,
        name: str,
        outtype: str = "F32",
        *,
        n_threads: int = 1,
        n_contexts: int = 1,
        max_batch_tokens: int | None = None,
        n_ctx: int | None = None,
    ) -> Embedder: ...


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def write(name: str, outtype: str) -> Path:
        return CASES[name].write(folder / f"{name}-{outtype}.gguf", outtype=outtype).path

    with ExitStack() as opened, pytest.MonkeyPatch.context() as patch:
        # What the self-test finds stays out of the user's own cache.
        patch.setenv("GGUF_EMBED_HOME", str(folder / "home"))

        @cache
        def open_model(
            name: str,
            outtype: str = "F32",
            *,
            n_threads: int = 1,
            n_contexts: int = 1,
            max_batch_tokens: int | None = None,
            n_ctx: int | None = None,
        ) -> Embedder:
            chosen = Settings(
                n_threads=n_threads,
                n_contexts=n_contexts,
                max_batch_tokens=max_batch_tokens,
                n_ctx=n_ctx,
                tune=False,
            )
            return opened.enter_context(Embedder.open(write(name, outtype), settings=chosen))

        yield open_model


def assert_same(ours: Array, theirs: Array, *, cosine: float) -> None:
    """Both (n, dim) of unit length, row by row at least this near."""
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-5)
    cosines = np.einsum("nd,nd->n", ours, theirs)
    assert cosines.min() >= cosine, f"row {cosines.argmin()}: cosine {cosines.min():.6f}"


# ------------------------------------------------------------- the references themselves


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_one_of_the_reference(name: str, tmp_path: Path) -> None:
    model = CASES[name].write(tmp_path / "model.gguf")
    assert model.weights_sha256 == load(name).weights_sha256, "run reference.make_reference"


@pytest.mark.parametrize("name", EMBEDDERS)
def test_references_tell_texts_apart(name: str) -> None:
    vectors = load(name).vectors
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(cosines.diagonal(), 1.0, atol=1e-5)
    assert (cosines - 2 * np.eye(len(cosines))).max() < 0.99


# --------------------------------------------------------------------- equality with them


@pytest.mark.parametrize("name", EMBEDDERS)
def test_token_ids_are_those_of_tokenizers(name: str, open_model: Open) -> None:
    reference = load(name)
    embedder = open_model(name)
    assert [list(embedder.tokenize(text)) for text in reference.texts] == reference.ids


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", EMBEDDERS)
def test_vectors_are_those_of_transformers(name: str, outtype: str, open_model: Open) -> None:
    reference = load(name)
    vectors = open_model(name, outtype).encode(reference.texts)
    assert vectors.dtype == np.float32
    assert_same(vectors, reference.vectors, cosine=0.9999)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_vectors_alone_are_those_of_transformers(name: str, open_model: Open) -> None:
    reference = load(name)
    alone = np.stack([open_model(name).encode(text) for text in reference.texts])
    assert_same(alone, reference.vectors, cosine=0.9999)


@pytest.mark.parametrize("max_batch_tokens", [64, 200, 512])
@pytest.mark.parametrize("name", ["qwen3-last", "qwen3-mean"])
def test_a_text_longer_than_a_microbatch(
    name: str, max_batch_tokens: int, open_model: Open
) -> None:
    reference = load(name)
    assert max(map(len, reference.ids)) > max_batch_tokens
    vectors = open_model(name, max_batch_tokens=max_batch_tokens).encode(reference.texts)
    assert_same(vectors, reference.vectors, cosine=0.9999)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_put_in_front_of_the_text(name: str, open_model: Open) -> None:
    reference = load(name)
    rows = [row for row, text in enumerate(reference.texts) if text.startswith(PROMPT)]
    texts = [reference.texts[row].removeprefix(PROMPT) for row in rows]
    vectors = open_model(name).encode(texts, prompt=PROMPT)
    assert_same(vectors, reference.vectors[rows], cosine=0.9999)


@pytest.mark.parametrize(("truncate", "row"), [("end", 0), ("start", 1)])
@pytest.mark.parametrize("name", EMBEDDERS)
def test_truncation_keeps_the_special_tokens(
    name: str, truncate: Truncate, row: int, open_model: Open
) -> None:
    embedder = open_model(name, n_ctx=CUT_TO)
    vectors = embedder.encode([LONG[0], "a"], truncate=truncate)
    reference = load(name)
    assert_same(vectors[:1], reference.cut[row : row + 1], cosine=0.9999)
    assert_same(vectors[1:], reference.vectors[:1], cosine=0.9999)


# -------------------------------------------------------------- independence of the batch

# Whole words make real tokens; any other characters make bytes and unknowns.
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
other = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
batches = st.lists(st.one_of(words, other), min_size=1, max_size=24)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", [*FAMILIES, *NEWER])
@settings(deadline=None, max_examples=10)
@given(data=st.data(), texts=batches)
def test_a_text_has_one_vector_whatever_is_around_it(
    name: str, outtype: str, open_model: Open, data: st.DataObject, texts: list[str]
) -> None:
    """Alone, in any batch, in any order, with any number of threads and contexts."""
    alone = np.stack([open_model(name, outtype).encode(text) for text in texts])
    order = data.draw(st.permutations(range(len(texts))))
    embedder = open_model(
        name,
        outtype,
        n_threads=data.draw(st.sampled_from([1, 2])),
        n_contexts=data.draw(st.sampled_from([1, 2])),
        max_batch_tokens=data.draw(st.sampled_from([128, 256, None])),
    )
    together = embedder.encode([texts[row] for row in order])
    # A token whose second and third experts are all but equally good may change sides by rounding;
    # seen with shares that differ by 9e-5.
    assert_same(together, alone[order], cosine=0.99 if name == "nomic-bert-moe" else 0.99999)


@settings(deadline=None, max_examples=10)
@given(texts=batches, prompt=words)
def test_a_prompt_is_text(open_model: Open, texts: list[str], prompt: str) -> None:
    """A prefix computed once gives what the whole text gives."""
    embedder = open_model("qwen3-last")
    with_prompt = embedder.encode(texts, prompt=f"{prompt}: ")
    assert_same(
        with_prompt, embedder.encode([f"{prompt}: {text}" for text in texts]), cosine=0.99999
    )


# Least cosine of Q8_0 to float32. Not a bound on quality: random weights suffer more than trained
# ones, and most the first token of four layers.
QUANTIZED = dict.fromkeys(EMBEDDERS, 0.998) | {"modernbert-silu": 0.996}


@pytest.mark.parametrize(("name", "cosine"), QUANTIZED.items())
def test_quantized_vectors_stay_near(name: str, cosine: float, open_model: Open) -> None:
    """It catches a wrong kernel or layout."""
    reference = load(name)
    embedder = open_model(name, "Q8_0")
    assert_same(embedder.encode(reference.texts), reference.vectors, cosine=cosine)
    alone = np.stack([embedder.encode(text) for text in reference.texts])
    assert_same(alone, reference.vectors, cosine=cosine)
