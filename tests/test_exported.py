"""What `import gguf_embed` gives: a change here is a change for every user."""

from __future__ import annotations

import inspect

import pytest

import gguf_embed
from gguf_embed import errors

NAMES = {
    *(
        "Embedder",
        "EncodeOptions",
        "FailedRow",
        "Fingerprint",
        "Hit",
        "Index",
        "Settings",
        "Pooling",
        "Priority",
        "Ranked",
        "Reranker",
        "RerankOptions",
        "Block",
        "StoredVectors",
        "read_vectors",
        "__version__",
    ),
    *("GgufEmbedError", "BadInput", "BadText", "TextTooLong", "BadOption", "BadModelFile"),
    *("ModelNotFound", "DoesNotFit", "FetchFailed", "OutputFailed", "NativeFailed"),
}


def test_the_exported_names():
    assert set(gguf_embed.__all__) == NAMES
    assert set(dir(gguf_embed)) == NAMES
    assert gguf_embed.__all__ == sorted(gguf_embed.__all__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_is_there_under_its_own_name(name: str):
    found = getattr(gguf_embed, name)
    assert name == "__version__" or found.__name__ == name


def test_every_error_is_exported():
    classes = inspect.getmembers(errors, inspect.isclass)
    defined = {name for name, found in classes if found.__module__ == errors.__name__}
    assert defined <= NAMES


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        gguf_embed.Embeder  # noqa: B018
