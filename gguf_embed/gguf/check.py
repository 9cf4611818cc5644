"""Whether a file may reach native code: what llama.cpp would abort the process for is refused.

Checked against llama.cpp 0c1e57098: load_hparams in src/llama-model.cpp, the graphs in src/models,
and the types that ggml's CPU kernels take. What cannot be known from a header (weights that are
NaN, say) is not asked here.
"""

from __future__ import annotations

import math
import re
from typing import Final

from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.header import Header, check_size
from gguf_embed.gguf.quants import TENSOR_TYPES
from gguf_embed.gguf.vocabulary import check_special_tokens, check_tokenizer
from gguf_embed.vectors import Pooling

# Their graphs assert that all of a head is rotated.
_WHOLE_ROPE: Final = """
    apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deci deepseek dots1
    dream ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon granite granitemoe granite_swa
    graniteswitch grok grovemoe hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada
    llada-moe llama llama-embed llama4 maincoder mellum mistral3 olmo olmo2 olmoe orion
    paddleocr pangu-embedded plamo qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe rnd1
    seed_oss smallthinker smollm3 starcoder2 talkie xverse
"""
_ROPE_SCALINGS: Final = ("none", "linear", "yarn", "longrope")
_EPSILONS: Final = (
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.group_norm_epsilon",
)
# What is added or multiplied as it lies in the file; the CPU does so in F32 only.
_IN_F32: Final = re.compile(r"(?:.*\.)?(?:\w*norm\w*\.weight|[\w.]+\.bias|token_types\.weight)")
_RERANKER_HEADS: Final = ("cls.output.weight", "cls.weight")


def check_embedder(header: Header, *, pooling: Pooling | None = None) -> None:
    """Raise BadModelFile if text cannot be embedded with this file, saying what it is instead.

    `pooling` is the caller's choice in place of the file's. Whether llama.cpp knows the
    architecture is for llama.cpp to say: a list here would refuse what a newer build runs.
    """
    _check_kind(header)
    for key, value in header.metadata.items():
        check_size(header.source, key, value)
    _check_tokenizer(header)
    _check_layers(header)
    _check_rope(header)
    _check_epsilons(header)
    _check_types(header)
    _check_pooling(header, header.pooling if pooling is None else pooling)


def _check_kind(header: Header) -> None:
    """Refuse what is a GGUF and no whole text model."""
    source, metadata = header.source, header.metadata
    kind = metadata.get("general.type")
    if kind == "adapter" or "adapter.type" in metadata:
        raise BadModelFile(f"{source}: a LoRA adapter; pass the model that it adapts")
    if kind == "mmproj" or metadata.get("general.architecture") == "clip":
        raise BadModelFile(
            f"{source}: the image or audio part of a multimodal model; pass its text model"
        )
    if kind == "imatrix":
        raise BadModelFile(f"{source}: an importance matrix for quantizing; pass a model")
    shard, n_shards = header.split
    if shard > 0:
        raise BadModelFile(
            f"{source}: part {shard + 1} of {n_shards}; pass the first part, its name ends in "
            f"-00001-of-{n_shards:05d}.gguf, with the others beside it"
        )
    if n_shards <= 1 and header.tensor("token_embd.weight") is None:
        holds = f"{len(header.tensors)} tensors" if header.tensors else "a vocabulary only"
        raise BadModelFile(
            f"{source}: no model: it holds {holds} and no token_embd.weight; "
            "pass a text embedding model"
        )


def _check_tokenizer(header: Header) -> None:
    if header.tokenizer_model in (None, "none", "no_vocab"):
        raise BadModelFile(
            f"{header.source}: no tokenizer in the file; convert the model again with its "
            "vocabulary"
        )
    check_tokenizer(header)
    check_special_tokens(header)


def _check_layers(header: Header) -> None:
    """Numbers of layers, heads and experts that contradict each other."""
    n_next = header.number("nextn_predict_layers") or 0
    if n_next >= header.n_layer:
        raise _contradiction(header, "nextn_predict_layers", n_next, f"{header.n_layer} layers")
    per_layer = isinstance(
        header.metadata.get(f"{header.architecture}.attention.head_count"), tuple
    )
    if not per_layer and header.n_head % header.n_head_kv:
        heads = f"{header.n_head} heads, which are no multiple of it"
        raise _contradiction(header, "attention.head_count_kv", header.n_head_kv, heads)
    n_experts, n_used = header.number("expert_count") or 0, header.number("expert_used_count") or 0
    if header.architecture in ("hunyuan-dense", "hunyuan_vl") and n_experts <= 1:
        return  # llama.cpp takes them for a model without experts
    if n_used > n_experts or (n_experts and not n_used):
        raise _contradiction(header, "expert_used_count", n_used, f"{n_experts} experts")
    n_groups = header.number("expert_group_count") or 0
    if n_groups and n_groups >= n_experts:
        raise _contradiction(header, "expert_group_count", n_groups, f"{n_experts} experts")
    if n_groups > 1:
        n_groups_used = header.number("expert_group_used_count") or 0
        if n_experts % n_groups or not 0 < n_groups_used < n_groups:
            has = f"{n_groups} groups of {n_experts} experts"
            raise _contradiction(header, "expert_group_used_count", n_groups_used, has)


def _check_rope(header: Header) -> None:
    """How many elements of a head are rotated, and how positions are scaled."""
    architecture = header.architecture
    scaling = header.metadata.get(f"{architecture}.rope.scaling.type", "linear")
    if scaling not in _ROPE_SCALINGS:
        raise BadModelFile(
            f"{header.source}: {architecture}.rope.scaling.type is {scaling!r}, llama.cpp knows "
            f"{', '.join(_ROPE_SCALINGS)}; get another GGUF of this model"
        )
    rotated = header.number("rope.dimension_count")
    head = header.key_length
    whole = architecture in _WHOLE_ROPE.split()
    if whole and header.value_length != head:
        keys = f"attention.key_length of {head}"
        raise _contradiction(header, "attention.value_length", header.value_length, keys)
    if rotated is None:
        return
    if rotated > head or rotated % 2 or (whole and rotated != head):
        raise _contradiction(header, "rope.dimension_count", rotated, f"heads of {head} elements")


def _check_epsilons(header: Header) -> None:
    for name in _EPSILONS:
        key = f"{header.architecture}.{name}"
        value = header.metadata.get(key)
        if value is None:
            continue
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise BadModelFile(
                f"{header.source}: {key} is {value!r}, must be a small number above 0 such as "
                "1e-06; get another GGUF of this model"
            )


def _check_types(header: Header) -> None:
    for tensor in header.tensors:
        if tensor.type != "F32" and _IN_F32.fullmatch(tensor.name):
            raise BadModelFile(
                f"{header.source}: {tensor.name} is {tensor.type}, llama.cpp computes with it in "
                "F32 only; convert or quantize the model again with a current llama.cpp"
            )
        if len(tensor.shape) > 1 and not TENSOR_TYPES[tensor.type].matrix:
            raise BadModelFile(
                f"{header.source}: {tensor.name} is a matrix of {tensor.type}, with which "
                "llama.cpp does not multiply; convert the model again with a current llama.cpp"
            )


def _check_pooling(header: Header, pooling: Pooling | None) -> None:
    n_shards = header.split[1]
    if pooling is Pooling.RANK and n_shards <= 1 and not any(map(header.tensor, _RERANKER_HEADS)):
        raise BadModelFile(
            f"{header.source}: a reranker without its head (no cls.output.weight), its scores "
            "would be noise; get a GGUF made by a current convert_hf_to_gguf.py"
        )


def _contradiction(header: Header, name: str, number: int, has: str) -> BadModelFile:
    return BadModelFile(
        f"{header.source}: {header.architecture}.{name} is {number}, the model has {has}; "
        "get another GGUF of this model"
    )


def needs_pooling(header: Header) -> str | None:
    """What to tell a user whose file does not say how to pool; None when it does."""
    if header.pooling not in (None, Pooling.NONE):
        return None
    silent = f"{header.source}: the file does not say how token vectors become one"
    if "rerank" in (header.name or "").lower():
        return (
            f"{silent}, and its name is that of a reranker; get a GGUF with cls.output.weight, "
            "made by a current convert_hf_to_gguf.py"
        )
    if header.causal:
        return (
            f"{silent}: a {header.architecture} language model; pass pooling LAST if it was "
            "trained to embed (Qwen3-Embedding and its kin), a chat model is a poor embedder"
        )
    return f"{silent}; pass pooling MEAN or CLS, its model card says which"
