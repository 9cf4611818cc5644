"""Which files may reach native code, and whose vocabulary llama.cpp can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_embed.catalog import catalog
from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.check import check_embedder, needs_pooling
from gguf_embed.gguf.cursor import ArraySummary, MetaValue
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.gguf.vocabulary import PRE_TOKENIZERS, check_vocabulary
from gguf_embed.vectors import Pooling

pytestmark = [pytest.mark.native, pytest.mark.branches]

Write = Callable[..., Path]
Changes = dict[str, MetaValue | None]
KINDS = ("qwen3", "qwen3_reranker", "qwen2_bidirectional", "bert", "xlmr")


def changed(header: Header, changes: Changes) -> Header:
    """The header with other metadata; `*` stands for the architecture, None removes a key."""
    renamed = {key.replace("*", header.architecture): value for key, value in changes.items()}
    metadata = {**header.metadata, **renamed}
    return replace(header, metadata={k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outtype", ["F32", "F16", "Q8_0"])
def test_files_as_they_are_made_pass(tiny_model: Write, kind: str, outtype: str):
    header = read_header(tiny_model(kind, outtype=outtype), keep_arrays=True)
    check_embedder(header)
    check_vocabulary(header)
    check_embedder(read_header(tiny_model(kind, outtype=outtype)))


def test_the_built_in_file_passes():
    header = read_header(catalog.builtin_path(), keep_arrays=True)
    check_embedder(header)
    check_vocabulary(header)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        *(
            ("bert", {"*.attention.layer_norm_epsilon": value}, rf"epsilon is {value!r}, must be")
            for value in (-1e-5, 0.0, float("nan"), float("inf"), 1)
        ),
        ("qwen3", {"*.attention.layer_norm_rms_epsilon": -1.0}, "rms_epsilon is -1.0"),
        (
            "qwen3",
            {"*.rope.dimension_count": 32},
            "count is 32, the model has heads of 64",
        ),
        (
            "bert",
            {"*.rope.dimension_count": 34},
            "count is 34, the model has heads of 32",
        ),
        ("bert", {"*.rope.dimension_count": 7}, "dimension_count is 7"),
        ("qwen3", {"*.attention.value_length": 32}, "value_length is 32, .*key_length of 64"),
        ("qwen3", {"*.rope.scaling.type": "dynamic"}, "'dynamic', llama.cpp knows none, linear"),
        ("qwen3", {"*.rope.scaling.type": 1}, "rope.scaling.type is 1"),
        ("qwen3", {"*.expert_count": 8}, "expert_used_count is 0, the model has 8 experts"),
        ("qwen3", {"*.expert_count": 8, "*.expert_used_count": 9}, "used_count is 9"),
        ("qwen3", {"*.expert_used_count": 2}, "used_count is 2, the model has 0 experts"),
        ("qwen3", {"*.expert_count": 2000, "*.expert_used_count": 2}, "takes up to 1024"),
        ("qwen3", {"*.expert_group_count": 2}, "group_count is 2, the model has 0 experts"),
        (
            "qwen3",
            {"*.expert_count": 8, "*.expert_used_count": 2, "*.expert_group_count": 3},
            "group_used_count is 0, the model has 3 groups of 8 experts",
        ),
        ("qwen3", {"*.nextn_predict_layers": 2}, "layers is 2, the model has 2 layers"),
        ("qwen3", {"*.attention.head_count_kv": 3}, "kv is 3, the model has 8 heads"),
        ("qwen3", {"*.block_count": 513}, "block_count is 513, llama.cpp takes up to 512"),
        ("qwen3", {"tokenizer.ggml.model": "novel"}, "model is 'novel', which llama.cpp does not"),
        ("qwen3", {"tokenizer.ggml.pre": "novel"}, "pre is 'novel', which llama.cpp does not"),
        ("qwen3", {"tokenizer.ggml.tokens": None}, "tokens holds None values of type none"),
        ("qwen3", {"tokenizer.ggml.tokens": ()}, "tokens holds 0 values"),
        ("qwen3", {"tokenizer.ggml.tokens": (1, 2)}, "tokens holds 2 values of type i32"),
        ("qwen3", {"tokenizer.ggml.token_type": (1, 1)}, "token_type holds 2 of type i32 for"),
        ("qwen3", {"tokenizer.ggml.merges": None}, "merges holds None of type none"),
        ("xlmr", {"tokenizer.ggml.scores": None}, "scores is missing, a 't5' vocabulary needs"),
        ("xlmr", {"tokenizer.ggml.scores": ("a",)}, "scores holds 1 of type str"),
        ("xlmr", {"tokenizer.ggml.token_type": None}, "token_type is missing"),
        *(
            ("bert", {f"tokenizer.ggml.{name}_token_id": 1 << 30}, f"{name}_token_id is 10737")
            for name in ("bos", "eos", "unknown", "seperator", "cls")
        ),
        ("qwen3", {"tokenizer.ggml.bos_token_id": True}, "bos_token_id is True, there are"),
        (
            "xlmr",
            {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
            "bos_token_id is missing, the begin token is to be added",
        ),
        (
            "qwen3",
            {
                "tokenizer.ggml.bos_token_id": None,
                "tokenizer.ggml.pre": "glm4",
                "tokenizer.ggml.add_bos_token": True,
            },
            "bos_token_id is missing",
        ),
    ],
)
def test_what_llama_cpp_would_abort_for_is_refused(
    tiny_model: Write, kind: str, changes: Changes, message: str
):
    header = read_header(tiny_model(kind))
    with pytest.raises(BadModelFile, match=message):
        check_embedder(changed(header, changes))


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_norm.weight", "output_norm.weight", "token_types.weight", "blk.1.attn_q.bias"],
)
@pytest.mark.parametrize("kind", ["I8", "Q8_0", "F16"])
def test_what_is_added_must_be_floats(tiny_model: Write, name: str, kind: str):
    header = read_header(tiny_model("qwen3"))
    extra = replace(header.tensors[0], name=name, type=kind)
    with pytest.raises(BadModelFile, match=f"{name} is {kind}, llama.cpp computes"):
        check_embedder(replace(header, tensors=(*header.tensors, extra)))


@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"])
def test_matrices_that_ggml_cannot_multiply_are_refused(tiny_model: Write, kind: str):
    header = read_header(tiny_model("qwen3"))
    extra = replace(header.tensors[0], name="blk.0.attn_q.weight", shape=(256, 32), type=kind)
    with pytest.raises(BadModelFile, match=f"blk.0.attn_q.weight is a matrix of {kind}, with"):
        check_embedder(replace(header, tensors=(*header.tensors, extra)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3", {"tokenizer.ggml.tokens": ("a", "b", "a")}, "tokens holds 'a' twice, as 0 and 2"),
        ("qwen3", {"tokenizer.ggml.merges": ("a b", "ab")}, "merges holds 'ab' as number 1"),
        ("qwen3", {"tokenizer.ggml.merges": (" a",)}, "no pair of tokens"),
        ("xlmr", {"tokenizer.ggml.scores": float("nan")}, "scores of token 0 is nan"),
        ("xlmr", {"tokenizer.ggml.model": "llama"}, "has no token for the byte 0x00"),
    ],
)
def test_faults_of_single_tokens(tiny_model: Write, kind: str, changes: Changes, message: str):
    header = read_header(tiny_model(kind), keep_arrays=True)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    if tokens_changed := changes.get("tokenizer.ggml.tokens"):
        assert isinstance(tokens_changed, tuple)
        changes = {**changes, "tokenizer.ggml.token_type": (1,) * len(tokens_changed)}
    if isinstance(changes.get("tokenizer.ggml.scores"), float):
        changes = {"tokenizer.ggml.scores": (changes["tokenizer.ggml.scores"],) * len(tokens)}  # type: ignore[dict-item]
    with pytest.raises(BadModelFile, match=message):
        check_vocabulary(changed(header, changes))


def test_empty_tokens_and_bytes_that_are_no_text_are_no_twins(tiny_model: Write):
    header = read_header(tiny_model("qwen3"), keep_arrays=True)
    tokens = ("", "", "\ufffd", "\ufffd", "a")
    changes: Changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": (1,) * 5}
    check_vocabulary(changed(header, changes))


def test_every_pre_tokenizer_is_one_of_this_build(tiny_model: Write, tmp_path: Path):
    """llama.cpp opens the vocabulary with each of the names, and with no other."""
    raw = tiny_model("qwen3").read_bytes()
    key, old = b"tokenizer.ggml.pre", b"qwen2"
    at = raw.index(key) + len(key) + 4
    assert raw[at + 8 : at + 8 + len(old)] == old

    def opens(pre: str) -> bool:
        path = tmp_path / "m.gguf"
        name = pre.encode()
        padded = raw[:at] + len(name).to_bytes(8, "little") + name + raw[at + 8 + len(old) :]
        path.write_bytes(padded + bytes(64))
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if model:
            llama_cpp.llama_model_free(model)
        return bool(model)

    assert [pre for pre in sorted(PRE_TOKENIZERS) if not opens(pre)] == []
    assert not opens("novel")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 64),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers() | st.floats() | st.text() | st.booleans(), max_size=4).map(tuple),
    st.builds(ArraySummary, type=st.sampled_from(("str", "i32", "f32")), length=st.integers(0, 9)),
)


@pytest.mark.parametrize("kind", ["qwen3", "bert", "xlmr"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_metadata_is_taken_or_refused(tiny_model: Write, kind: str, data: st.DataObject):
    header = read_header(tiny_model(kind), keep_arrays=True)
    keys = sorted(
        {*header.metadata, *(f"{kind}.{name}" for name in ("expert_count", "rope.scaling.type"))}
    )
    odd = changed(header, data.draw(st.dictionaries(st.sampled_from(keys), ODD, max_size=3)))
    refusals: list[str] = []
    for check in (check_embedder, check_vocabulary, needs_pooling):
        try:
            check(odd)
        except BadModelFile as error:
            refusals.append(str(error))
    assert all(refusal.startswith(header.source) for refusal in refusals)


def test_a_file_that_says_no_pooling_is_told_what_to_pass(tiny_model: Write):
    header = read_header(tiny_model("bert", pooling=Pooling.NONE))
    assert "pass pooling MEAN or CLS" in (needs_pooling(header) or "")
