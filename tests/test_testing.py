"""The fake that users' tests may use: what `Embedder` promises, without native code."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gguf_embed import BadInput, BadOption, BadText, Embedder, TextTooLong
from gguf_embed.engine.backend import BatchLimits
from gguf_embed.testing import FakeEmbedder


def test_it_is_an_embedder_with_the_same_vectors_each_time():
    with FakeEmbedder.open() as one, FakeEmbedder.open("any name") as other:
        assert isinstance(one, Embedder)
        texts = ["a cat sits", "", "a cat", "a dog runs"]
        vectors = one.encode(texts)
        assert (vectors.dtype, vectors.shape) == (np.float32, (4, 64))
        np.testing.assert_array_equal(vectors, other.encode(texts))
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
        near, far = one.similarity(vectors[0], vectors[2:])[0]
        assert near > far
        assert repr(one) == "Embedder('fake', quant='F32', dim=64, n_ctx=32, pooling=MEAN)"


def test_prompts_tokens_and_errors_are_those_of_an_embedder():
    with FakeEmbedder.open(dim=16, n_ctx=8, prompts={"query": "q: ", "document": ""}) as embedder:
        np.testing.assert_array_equal(embedder.encode_query("x"), embedder.encode("q: x"))
        np.testing.assert_array_equal(embedder.encode_document("x"), embedder.encode("x"))
        assert embedder.count_tokens(["a b c", ""]).tolist() == [5, 2]
        assert len(embedder.tokenize("a b c")) == 5
        assert embedder.token_vectors("a b c").shape == (5, 16)
        with pytest.raises(TextTooLong, match="row 1: 9 tokens"):
            embedder.encode(["a", "a b c d e f g"])
        (block,) = embedder.stream(["a b c d e f g"], truncate="end")
        assert (block.truncated.tolist(), block.token_counts.tolist()) == ([True], [8])
        (block,) = embedder.stream(["a b c", "a b c d"], truncate="end", max_tokens=5)
        assert (block.truncated.tolist(), block.token_counts.tolist()) == ([False, True], [5, 5])
        with pytest.raises(TextTooLong, match="longer than 5 tokens"):
            embedder.encode("a b c d", max_tokens=5)
        with pytest.raises(BadOption, match=r"max_tokens=9: .* Settings\(n_ctx=9\)"):
            embedder.encode("a", max_tokens=9)
        with pytest.raises(BadText, match="row 0"):
            embedder.encode(["\ud800"])
        with pytest.raises(BadOption, match="no prompt 'poem'"):
            embedder.encode("x", prompt_name="poem")
    with pytest.raises(BadInput, match="is closed"):
        embedder.encode("x")


def test_microbatches_can_be_looked_at():
    limits = BatchLimits(max_tokens=12, max_seqs=4)
    with FakeEmbedder.open(limits=limits) as embedder:
        embedder.encode(["a", "a b", "a b c", "a b c d", "a"])
        assert [[len(ids) for ids in batch] for batch in embedder.backend.microbatches] == [
            [6, 5],
            [4, 3],
        ]


@pytest.mark.slow
def test_no_native_library_is_opened():
    code = (
        "import sys; from gguf_embed.testing import FakeEmbedder; "
        "FakeEmbedder.open().encode('x'); print({'llama_cpp', 'huggingface_hub'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
