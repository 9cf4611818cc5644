"""The tensor tables against llama.cpp's own quantizer and against published file sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.errors import BadOption
from gguf_embed.gguf.header import read_header
from gguf_embed.gguf.layout import QUANTS, Shape, tensors
from gguf_embed.gguf.quants import FILE_TYPES
from gguf_embed.gguf.tensors import TensorInfo

pytestmark = pytest.mark.native

MODELS = Path(__file__).parent.parent / "models"

QWEN3_06B = Shape(
    architecture="qwen3",
    n_layer=28,
    n_embd=1024,
    n_head=16,
    n_head_kv=8,
    head_dim=128,
    n_ff=3072,
    n_vocab=151669,
    n_ctx_train=32768,
)
QWEN3_4B = replace(
    QWEN3_06B, n_layer=36, n_embd=2560, n_head=32, n_ff=9728, n_vocab=151665, n_ctx_train=40960
)
QWEN3_8B = replace(QWEN3_4B, n_embd=4096, n_ff=12288)
BGE_M3 = Shape(
    architecture="bert",
    n_layer=24,
    n_embd=1024,
    n_head=16,
    n_head_kv=16,
    head_dim=64,
    n_ff=4096,
    n_vocab=250002,
    n_ctx_train=8192,
    n_token_types=1,
)
MINILM = Shape(
    architecture="bert",
    n_layer=6,
    n_embd=384,
    n_head=12,
    n_head_kv=12,
    head_dim=32,
    n_ff=1536,
    n_vocab=30522,
    n_ctx_train=512,
)

# Whole-file bytes as listed on huggingface.co, and the header that every file of the
# repository carries: vocabulary, merges and tensor table, the same for all quantizations.
PUBLISHED = {
    "Qwen/Qwen3-Embedding-0.6B-GGUF": (
        QWEN3_06B,
        5_945_536,
        {"Q8_0": 639_150_592, "F16": 1_197_629_632},
    ),
    "mradermacher/Qwen3-Embedding-0.6B-GGUF": (
        QWEN3_06B,
        5_946_016,
        {
            "Q2_K": 296_008_352,
            "Q3_K_M": 346_897_056,
            "Q4_K_M": 396_475_040,
            "Q5_K_M": 444_185_248,
            "Q6_K": 494_877_344,
            "Q8_0": 639_151_072,
            "F16": 1_197_630_112,
        },
    ),
    "ggml-org/Qwen3-Reranker-0.6B-Q8_0-GGUF": (
        replace(QWEN3_06B, n_cls_out=2),
        5_945_952,
        {"Q8_0": 639_153_184},
    ),
    "Qwen/Qwen3-Embedding-4B-GGUF": (
        QWEN3_4B,
        5_948_960,
        {
            "Q4_K_M": 2_496_703_776,
            "Q5_0": 2_823_134_496,
            "Q5_K_M": 2_888_936_736,
            "Q6_K": 3_305_684_256,
            "Q8_0": 4_279_660_224,
            "F16": 8_049_889_824,
        },
    ),
    "Qwen/Qwen3-Embedding-8B-GGUF": (
        QWEN3_8B,
        5_948_960,
        {"Q4_K_M": 4_676_804_928, "Q8_0": 8_047_105_824},
    ),
    "gpustack/bge-m3-GGUF": (
        BGE_M3,
        6_842_656,
        {
            "F16": 1_157_671_200,
            "Q8_0": 634_553_760,
            "Q6_K": 499_415_104,
            "Q5_K_M": 467_662_912,
            "Q5_0": 459_307_072,
            "Q4_K_M": 437_778_496,
            "Q4_0": 421_558_336,
            "Q3_K_M": 402_290_752,
            "Q2_K": 366_114_880,
        },
    ),
    "gpustack/bge-reranker-v2-m3-GGUF": (
        replace(BGE_M3, n_cls_out=1),
        6_845_024,
        {"Q8_0": 635_676_416},
    ),
    "second-state/All-MiniLM-L6-v2-Embedding-GGUF": (
        MINILM,
        362_304,
        {"Q8_0": 25_008_064, "Q4_K_M": 20_999_104},
    ),
}


def padded_bytes(table: tuple[TensorInfo, ...]) -> int:
    """What the tensors take in a file, each on a multiple of 32."""
    return sum(-(-tensor.n_bytes // 32) * 32 for tensor in table)


@pytest.mark.parametrize("repo", PUBLISHED)
def test_sizes_are_those_of_the_published_files(repo: str) -> None:
    shape, header_bytes, files = PUBLISHED[repo]
    sizes = {quant: header_bytes + padded_bytes(tensors(shape, quant)) for quant in files}
    assert sizes == files


def test_the_built_in_model_has_this_table() -> None:
    header = read_header(MODELS / "all-minilm-l6-v2-Q8_0.gguf")
    ours = {tensor.name: tensor for tensor in tensors(MINILM, "Q8_0")}
    assert {tensor.name: replace(tensor, offset=0) for tensor in header.tensors} == ours


def test_parameters_of_qwen3_embedding() -> None:
    """The counts on the model cards (MTEB's n_parameters)."""
    counts = [
        sum(int(np.prod(tensor.shape)) for tensor in tensors(shape, "F16"))
        for shape in (QWEN3_06B, QWEN3_4B, QWEN3_8B)
    ]
    assert counts == [595_776_512, 4_021_774_336, 7_567_295_488]


# Small models that reach every rule: 16 layers for the sixteenths, four query heads to a
# key-value head and two, rows of 256, rows that only fit blocks of 32, rows that fit none.
TINY = {
    "qwen3, grouped": Shape(
        architecture="qwen3",
        n_layer=16,
        n_embd=256,
        n_head=4,
        n_head_kv=1,
        head_dim=64,
        n_ff=512,
        n_vocab=64,
        n_ctx_train=128,
    ),
    "qwen3, reranker of 9 layers": Shape(
        architecture="qwen3",
        n_layer=9,
        n_embd=256,
        n_head=4,
        n_head_kv=2,
        head_dim=128,
        n_ff=256,
        n_vocab=64,
        n_ctx_train=128,
        n_cls_out=2,
    ),
    "qwen2, rows of 32": Shape(
        architecture="qwen2",
        n_layer=8,
        n_embd=288,
        n_head=9,
        n_head_kv=3,
        head_dim=32,
        n_ff=512,
        n_vocab=64,
        n_ctx_train=128,
    ),
    "bert, rows of 32": Shape(
        architecture="bert",
        n_layer=8,
        n_embd=96,
        n_head=4,
        n_head_kv=4,
        head_dim=24,
        n_ff=256,
        n_vocab=64,
        n_ctx_train=40,
    ),
    "bert, rows of no block": Shape(
        architecture="bert",
        n_layer=8,
        n_embd=40,
        n_head=4,
        n_head_kv=4,
        head_dim=10,
        n_ff=128,
        n_vocab=64,
        n_ctx_train=40,
        n_token_types=1,
    ),
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A shape and its F16 file, all weights zero: types do not depend on values."""
    shape = TINY[request.param]
    path = tmp_path_factory.mktemp("tiny") / "f16.gguf"
    write_zeros(path, shape)
    return shape, path


def write_zeros(path: Path, shape: Shape) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-6)
    writer.add_vocab_size(shape.n_vocab)
    for tensor in tensors(shape, "F16"):
        dtype = {"F32": np.float32, "F16": np.float16}[tensor.type]
        writer.add_tensor(tensor.name, np.zeros(tensor.shape[::-1], dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, quant: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = next(number for number, name in FILE_TYPES.items() if name == quant)
    params.nthread = 1
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    assert not failed


@pytest.mark.parametrize("quant", QUANTS)
def test_types_are_those_of_llama_quantize(
    tiny: tuple[Shape, Path], quant: str, tmp_path: Path
) -> None:
    shape, source = tiny
    quantize(source, tmp_path / "out.gguf", quant)
    header = read_header(tmp_path / "out.gguf")
    assert header.quant == quant
    assert tuple(replace(tensor, offset=0) for tensor in header.tensors) == tensors(shape, quant)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_a_head_of_one_row_stays_as_converted(quant: str, tmp_path: Path) -> None:
    shape = replace(TINY["bert, rows of 32"], n_layer=1, n_cls_out=1)
    write_zeros(tmp_path / "f16.gguf", shape)
    quantize(tmp_path / "f16.gguf", tmp_path / "out.gguf", quant)
    header = read_header(tmp_path / "out.gguf")
    assert tuple(replace(tensor, offset=0) for tensor in header.tensors) == tensors(shape, quant)


@given(
    architecture=st.sampled_from(["bert", "qwen2", "qwen3"]),
    n_layer=st.integers(1, 70),
    n_head_kv=st.integers(1, 8),
    n_groups=st.integers(1, 8),
    head_dim=st.integers(1, 128),
    n_ff=st.integers(1, 5000),
    quant=st.sampled_from(QUANTS),
)
def test_any_shape_has_a_table(
    architecture: str,
    n_layer: int,
    n_head_kv: int,
    n_groups: int,
    head_dim: int,
    n_ff: int,
    quant: str,
) -> None:
    """Rows are whole blocks (tensor_bytes asserts it) and nothing outgrows F32."""
    shape = Shape(
        architecture=architecture,
        n_layer=n_layer,
        n_embd=n_head_kv * n_groups * head_dim,
        n_head=n_head_kv * n_groups,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=100,
        n_ctx_train=50,
    )
    table, floats = tensors(shape, quant), tensors(shape, "F32")
    assert len({tensor.name for tensor in table}) == len(table)
    assert [tensor.shape for tensor in table] == [tensor.shape for tensor in floats]
    assert all(0 < t.n_bytes <= f.n_bytes for t, f in zip(table, floats, strict=True))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BadOption, match=r"'Q4_K'.*Q4_K_M"):
        tensors(MINILM, "Q4_K")
    with pytest.raises(BadOption, match=r"'llama'.*bert, qwen2, qwen3"):
        tensors(replace(MINILM, architecture="llama"), "Q8_0")
