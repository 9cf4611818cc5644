"""Tiny Nomic embedders: BERT with rotated positions, gated or with a mixture of experts."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tiny.file import Array, Draw, Pooling, TinyModel, open_writer, write_tensors
from tiny.vocabulary import add_unigram, add_wordpiece, unigram, wordpiece

_N_EMBD, _N_HEAD, _N_FF, _N_CTX, _N_LAYER = 96, 3, 160, 512, 2
_N_EXPERT, _N_EXPERT_USED = 4, 2
_THETA = 1000.0
_MOE_THETA = 10_000.0


def write_nomic_bert(path: Path, *, seed: int = 0, outtype: str = "F32") -> TinyModel:
    """A nomic-embed-text-v1.5: gated SiLU, no biases but those of norms."""
    vocab = wordpiece()
    writer = _writer(path, "nomic-bert", outtype, n_types=2, theta=_THETA, norm_eps=1e-12)
    add_wordpiece(writer, vocab)
    weights = _weights(seed, len(vocab.tokens), n_types=2, biases=False)
    stored = _stored(weights)
    for layer in range(_N_LAYER):
        for theirs, ours in (("up_proj", "up"), ("gate_proj", "gate"), ("down_proj", "down")):
            mlp = weights[f"layers.{layer}.mlp.{theirs}.weight"]
            stored[f"blk.{layer}.ffn_{ours}.weight"] = mlp
    write_tensors(writer, path, {}, outtype, extra=stored)
    config = _config("nomic_bert", len(vocab.tokens), n_types=2, theta=_THETA, norm_eps=1e-12)
    return TinyModel(
        path=path,
        weights=weights,
        config=config | {"hidden_act": "silu", "pad_token_id": 0},
        tokenizer=vocab.json,
        pooling=Pooling.MEAN,
    )


def write_nomic_bert_moe(path: Path, *, seed: int = 0, outtype: str = "F32") -> TinyModel:
    """A nomic-embed-text-v2-moe: every second layer gives a token to two of four experts.

    The original has a bias after the experts, which llama.cpp's converter leaves out and no GGUF
    can hold; here it is zero.
    """
    vocab = unigram()
    writer = _writer(path, "nomic-bert-moe", outtype, n_types=1, theta=_MOE_THETA, norm_eps=1e-5)
    writer.add_moe_every_n_layers(2)
    writer.add_expert_count(_N_EXPERT)
    writer.add_expert_used_count(_N_EXPERT_USED)
    add_unigram(writer, vocab)
    weights = _weights(seed, len(vocab.tokens), n_types=1, biases=True)
    stored = _stored(weights)
    for layer in range(_N_LAYER):
        mlp = f"layers.{layer}.mlp"
        if layer % 2 == 0:
            for theirs, ours in (("fc1", "up"), ("fc2", "down")):
                for part in ("weight", "bias"):
                    stored[f"blk.{layer}.ffn_{ours}.{part}"] = weights[f"{mlp}.{theirs}.{part}"]
            continue
        stored[f"blk.{layer}.ffn_gate_inp.weight"] = weights[f"{mlp}.gate.weight"]
        for theirs, ours in (("fc1", "up"), ("fc2", "down")):
            experts = [weights[f"{mlp}.experts.{i}.{theirs}.weight"] for i in range(_N_EXPERT)]
            stored[f"blk.{layer}.ffn_{ours}_exps.weight"] = np.stack(experts)
    write_tensors(writer, path, {}, outtype, extra=stored)
    config = _config(
        "nomic-bert-moe", len(vocab.tokens), n_types=1, theta=_MOE_THETA, norm_eps=1e-5
    )
    return TinyModel(
        path=path,
        weights=weights,
        config=config
        | {
            "hidden_act": "gelu",
            "pad_token_id": 1,
            "num_experts": _N_EXPERT,
            "num_experts_per_tok": _N_EXPERT_USED,
        },
        tokenizer=vocab.json,
        pooling=Pooling.MEAN,
    )


def _weights(seed: int, n_vocab: int, *, n_types: int, biases: bool) -> dict[str, Array]:
    draw = Draw(seed)

    def norm(name: str) -> None:
        draw.vector(f"{name}.weight", _N_EMBD, mean=1.0, spread=0.1)
        draw.vector(f"{name}.bias", _N_EMBD, mean=0.0, spread=0.1)

    def dense(name: str, n_out: int, n_in: int, gain: float, *, bias: bool = biases) -> None:
        draw.dense(f"{name}.weight", n_out, n_in, gain=gain)
        if bias:
            draw.vector(f"{name}.bias", n_out, mean=0.0, spread=0.1)

    draw.matrix("embeddings.word_embeddings.weight", n_vocab, _N_EMBD, rms=1.0)
    draw.matrix("embeddings.token_type_embeddings.weight", n_types, _N_EMBD, rms=0.3)
    norm("embeddings.LayerNorm")
    for layer in range(_N_LAYER):
        attn, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        for name, gain in (("q_proj", 1.5), ("k_proj", 1.5), ("v_proj", 1.0), ("o_proj", 2.0)):
            dense(f"{attn}.{name}", _N_EMBD, _N_EMBD, gain)
        norm(f"layers.{layer}.post_attention_layernorm")
        if not biases:
            dense(f"{mlp}.up_proj", _N_FF, _N_EMBD, 1.5)
            dense(f"{mlp}.gate_proj", _N_FF, _N_EMBD, 1.5)
            dense(f"{mlp}.down_proj", _N_EMBD, _N_FF, 1.5)
        elif layer % 2 == 0:
            dense(f"{mlp}.fc1", _N_FF, _N_EMBD, 1.0)
            dense(f"{mlp}.fc2", _N_EMBD, _N_FF, 1.5)
        else:
            dense(f"{mlp}.gate", _N_EXPERT, _N_EMBD, 1.5, bias=False)
            for expert in range(_N_EXPERT):
                dense(f"{mlp}.experts.{expert}.fc1", _N_FF, _N_EMBD, 1.5, bias=False)
                dense(f"{mlp}.experts.{expert}.fc2", _N_EMBD, _N_FF, 3.0, bias=False)
        norm(f"layers.{layer}.post_mlp_layernorm")
    return draw.weights


def _stored(weights: dict[str, Array]) -> dict[str, Array]:
    """All but the feed-forward layers, under GGUF's names: queries, keys and values are one."""
    stored = {
        "token_embd.weight": weights["embeddings.word_embeddings.weight"],
        "token_types.weight": weights["embeddings.token_type_embeddings.weight"],
    }
    for part in ("weight", "bias"):
        stored[f"token_embd_norm.{part}"] = weights[f"embeddings.LayerNorm.{part}"]
        for layer in range(_N_LAYER):
            block, attn = f"blk.{layer}", f"layers.{layer}.self_attn"
            for theirs, ours in (
                ("post_attention_layernorm", "attn_output_norm"),
                ("post_mlp_layernorm", "layer_output_norm"),
            ):
                stored[f"{block}.{ours}.{part}"] = weights[f"layers.{layer}.{theirs}.{part}"]
            if f"{attn}.q_proj.{part}" in weights:
                qkv = [weights[f"{attn}.{name}_proj.{part}"] for name in "qkv"]
                stored[f"{block}.attn_qkv.{part}"] = np.concatenate(qkv)
                stored[f"{block}.attn_output.{part}"] = weights[f"{attn}.o_proj.{part}"]
    return stored


def _writer(
    path: Path, arch: str, outtype: str, *, n_types: int, theta: float, norm_eps: float
) -> gguf.GGUFWriter:
    writer = open_writer(path, arch, outtype)
    writer.add_context_length(_N_CTX)
    writer.add_block_count(_N_LAYER)
    writer.add_embedding_length(_N_EMBD)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(_N_HEAD)
    writer.add_layer_norm_eps(norm_eps)
    writer.add_rope_freq_base(theta)
    writer.add_causal_attention(False)
    writer.add_token_type_count(n_types)
    writer.add_pooling_type(Pooling.MEAN)
    return writer


def _config(
    model_type: str, n_vocab: int, *, n_types: int, theta: float, norm_eps: float
) -> dict[str, object]:
    return {
        "model_type": model_type,
        "vocab_size": n_vocab,
        "hidden_size": _N_EMBD,
        "num_hidden_layers": _N_LAYER,
        "num_attention_heads": _N_HEAD,
        "intermediate_size": _N_FF,
        "max_position_embeddings": _N_CTX,
        "type_vocab_size": n_types,
        "layer_norm_eps": norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
