"""Tiny ModernBERTs, with either of the activations that published ones have."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf

from tiny.file import Array, Draw, Pooling, TinyModel, open_writer, write_tensors
from tiny.vocabulary import MODERNBERT, add_bpe, byte_level_bpe

Activation = Literal["gelu", "silu"]

_N_EMBD, _N_HEAD, _N_FF, _N_CTX, _N_LAYER = 96, 3, 128, 512, 4
_EVERY = 3  # layers 0 and 3 see the whole text
_WINDOW = 16  # the others see eight tokens on each side
_GLOBAL_THETA, _LOCAL_THETA = 160_000.0, 10_000.0
_NORM_EPS = 1e-5


def write_modernbert(
    path: Path,
    *,
    seed: int = 0,
    outtype: str = "F32",
    activation: Activation = "gelu",
    pooling: Pooling = Pooling.MEAN,
) -> TinyModel:
    """A ModernBERT whose sliding window is shorter than most texts.

    GELU is that of ModernBERT itself, SiLU that of Granite Embedding R2's small models.
    """
    vocab = byte_level_bpe(MODERNBERT)
    writer = _writer(path, outtype)
    writer.add_string("modern-bert.hidden_activation", activation)
    writer.add_pooling_type(pooling)
    writer.add_vocab_size(len(vocab.tokens))
    add_bpe(writer, vocab, MODERNBERT)
    weights = _weights(seed, len(vocab.tokens))
    write_tensors(writer, path, weights, outtype)
    config = {
        "model_type": "modernbert",
        "vocab_size": len(vocab.tokens),
        "hidden_size": _N_EMBD,
        "intermediate_size": _N_FF,
        "num_hidden_layers": _N_LAYER,
        "num_attention_heads": _N_HEAD,
        "hidden_activation": activation,
        "max_position_embeddings": _N_CTX,
        "norm_eps": _NORM_EPS,
        "global_attn_every_n_layers": _EVERY,
        "local_attention": _WINDOW,
        "global_rope_theta": _GLOBAL_THETA,
        "local_rope_theta": _LOCAL_THETA,
        "bos_token_id": vocab.tokens.index("[CLS]"),
        "cls_token_id": vocab.tokens.index("[CLS]"),
        "eos_token_id": vocab.tokens.index("[SEP]"),
        "sep_token_id": vocab.tokens.index("[SEP]"),
        "pad_token_id": vocab.tokens.index("[PAD]"),
    }
    return TinyModel(
        path=path, weights=weights, config=config, tokenizer=vocab.json, pooling=pooling
    )


def _weights(seed: int, n_vocab: int) -> dict[str, Array]:
    draw = Draw(seed)

    def norm(name: str) -> None:
        draw.vector(f"{name}.weight", _N_EMBD, mean=1.0, spread=0.1)

    draw.matrix("embeddings.tok_embeddings.weight", n_vocab, _N_EMBD, rms=1.0)
    norm("embeddings.norm")
    for layer in range(_N_LAYER):
        block = f"layers.{layer}"
        if layer:  # the first takes the embeddings as they are
            norm(f"{block}.attn_norm")
        draw.dense(f"{block}.attn.Wqkv.weight", 3 * _N_EMBD, _N_EMBD, gain=1.5)
        draw.dense(f"{block}.attn.Wo.weight", _N_EMBD, _N_EMBD)
        norm(f"{block}.mlp_norm")
        draw.dense(f"{block}.mlp.Wi.weight", 2 * _N_FF, _N_EMBD, gain=1.5)
        draw.dense(f"{block}.mlp.Wo.weight", _N_EMBD, _N_FF)
    norm("final_norm")
    return draw.weights


def _writer(path: Path, outtype: str) -> gguf.GGUFWriter:
    writer = open_writer(path, "modern-bert", outtype)
    writer.add_block_count(_N_LAYER)
    writer.add_context_length(_N_CTX)
    writer.add_embedding_length(_N_EMBD)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(_N_HEAD)
    writer.add_layer_norm_eps(_NORM_EPS)
    writer.add_causal_attention(False)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_freq_base(_GLOBAL_THETA)
    writer.add_rope_freq_base_swa(_LOCAL_THETA)
    writer.add_sliding_window(_WINDOW)
    writer.add_sliding_window_pattern(_EVERY)
    return writer
