"""What decides the vectors of a model, as a value: the user before the catalog before the file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gguf_embed.catalog import catalog
from gguf_embed.errors import BadModelFile, BadOption
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.plan.mode import (
    EmbedMode,
    check_no_reranker,
    embed_mode,
    is_reranker,
    layers_pooling,
)
from gguf_embed.plan.settings import Settings
from gguf_embed.vectors import Pooling

RERANKER = catalog.find("qwen3-reranker:0.6b")
NO_VECTORS = "a reranker scores pairs of texts; it gives no vectors"


@pytest.fixture(scope="module")
def header() -> Header:
    """An encoder whose file says MEAN."""
    return read_header(catalog.builtin_path())


def with_pooling(header: Header, number: int | None) -> Header:
    kept = {k: v for k, v in header.metadata.items() if not k.endswith(".pooling_type")}
    said = {} if number is None else {f"{header.architecture}.pooling_type": number}
    return replace(header, metadata={**kept, **said})


def test_the_user_comes_before_the_catalog_before_the_file(header: Header):
    card = catalog.find(catalog.BUILTIN)
    assert card is not None
    by_first = replace(card, pooling=Pooling.CLS)
    assert embed_mode(header, None, Settings()) == EmbedMode(
        pooling=Pooling.MEAN, causal=False, encoder=True
    )
    assert embed_mode(header, by_first, Settings()).pooling is Pooling.CLS
    asked = Settings(pooling=Pooling.LAST)
    assert embed_mode(header, by_first, asked).pooling is Pooling.LAST


def test_a_model_without_pooling_gives_no_vectors(header: Header):
    with pytest.raises(BadModelFile, match="pool"):
        embed_mode(with_pooling(header, None), None, Settings())
    with pytest.raises(BadModelFile, match="pool"):
        embed_mode(with_pooling(header, Pooling.NONE.value), None, Settings())
    with pytest.raises(BadOption, match="use token_vectors"):
        embed_mode(header, None, Settings(pooling=Pooling.NONE))


def test_a_reranker_is_known_by_the_catalog_or_by_its_file(header: Header):
    head = replace(header.tensors[-1], name="cls.output.weight")
    with_head = replace(header, tensors=(*header.tensors, head))
    scores = with_pooling(with_head, Pooling.RANK.value)
    assert RERANKER is not None
    assert is_reranker(RERANKER, None)
    assert is_reranker(None, scores)
    assert is_reranker(None, with_head)
    assert not is_reranker(None, header)
    assert not is_reranker(None, None)
    assert not is_reranker(catalog.find(catalog.BUILTIN), scores)  # the catalog is believed
    check_no_reranker(None, "a file")
    for card, file in ((RERANKER, with_head), (None, with_head), (None, scores)):
        with pytest.raises(BadModelFile, match=NO_VECTORS):
            embed_mode(file, card, Settings())
    # One that may be read for its layers still has no pooled vector.
    with pytest.raises(BadModelFile, match=NO_VECTORS):
        embed_mode(scores, None, Settings(), rerankers=True)
    assert embed_mode(scores, None, Settings(pooling=Pooling.CLS), rerankers=True).encoder


def test_a_head_reads_the_first_token_of_an_encoder_else_the_last():
    assert layers_pooling(Pooling.RANK, encoder=True) is Pooling.CLS
    assert layers_pooling(Pooling.RANK, encoder=False) is Pooling.LAST
    assert layers_pooling(Pooling.MEAN, encoder=False) is Pooling.MEAN
