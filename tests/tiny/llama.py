"""Tiny encoders built like Llama: EuroBERT, and a Llama that sees both sides."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tiny.decoders import DecoderShape, decoder_weights, decoder_writer
from tiny.file import Array, Pooling, TinyModel, write_tensors
from tiny.vocabulary import EUROBERT, LLAMA3, add_bpe, byte_level_bpe

_SHAPE = DecoderShape(
    n_embd=96,
    n_head=3,
    n_head_kv=1,
    head_dim=32,
    n_ff=160,
    n_ctx=512,
    rope_theta=250_000.0,
    norm_eps=1e-5,
)
# Of the length that a model was trained with before it was stretched, as Llama 3.1 was. Short, so
# that it changes positions that the texts have.
_STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": _SHAPE.rope_theta,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_eurobert(
    path: Path, *, seed: int = 0, outtype: str = "F32", pooling: Pooling = Pooling.MEAN
) -> TinyModel:
    """A EuroBERT: Llama's layers, which see both sides."""
    writer = decoder_writer(path, "eurobert", _SHAPE, outtype)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    vocab = byte_level_bpe(EUROBERT)
    add_bpe(writer, vocab, EUROBERT)
    weights = decoder_weights(_SHAPE, vocab, seed, qkv_bias=False, qk_norm=False)
    write_tensors(writer, path, weights, outtype)
    return TinyModel(
        path=path,
        weights=weights,
        config=_config("eurobert", len(vocab.tokens), {"rope_type": "default"})
        | {"mask_token_id": 0},
        tokenizer=vocab.json,
        pooling=pooling,
    )


def write_llama_embed(path: Path, *, seed: int = 0, outtype: str = "F32") -> TinyModel:
    """A Llama 3.1 that sees both sides, MEAN pooling (the shape of llama-embed-nemotron).

    Its converter writes no `attention.causal`, and puts the rows of queries and keys in the order
    in which llama.cpp turns neighbouring numbers.
    """
    writer = decoder_writer(path, "llama-embed", _SHAPE, outtype)
    writer.add_rope_dimension_count(_SHAPE.head_dim)
    writer.add_pooling_type(Pooling.MEAN)
    vocab = byte_level_bpe(LLAMA3)
    add_bpe(writer, vocab, LLAMA3)
    weights = decoder_weights(_SHAPE, vocab, seed, qkv_bias=False, qk_norm=False)
    stored = dict(weights)
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.reshape(-1, 2, _SHAPE.head_dim // 2, weight.shape[1])
            stored[name] = halves.swapaxes(1, 2).reshape(weight.shape)
    extra = {"rope_freqs.weight": _stretch()}
    write_tensors(writer, path, stored, outtype, extra=extra)
    return TinyModel(
        path=path,
        weights=weights,
        config=_config("llama", len(vocab.tokens), _STRETCHED),
        tokenizer=vocab.json,
        pooling=Pooling.MEAN,
    )


def _config(model_type: str, n_vocab: int, rope: dict[str, object]) -> dict[str, object]:
    return {
        "model_type": model_type,
        "vocab_size": n_vocab,
        "hidden_size": _SHAPE.n_embd,
        "intermediate_size": _SHAPE.n_ff,
        "num_hidden_layers": _SHAPE.n_layer,
        "num_attention_heads": _SHAPE.n_head,
        "num_key_value_heads": _SHAPE.n_head_kv,
        "head_dim": _SHAPE.head_dim,
        "max_position_embeddings": _SHAPE.n_ctx,
        "rms_norm_eps": _SHAPE.norm_eps,
        "rope_parameters": {"rope_theta": _SHAPE.rope_theta, **rope},
        "bos_token_id": n_vocab - 2,
        "eos_token_id": n_vocab - 1,
        "pad_token_id": n_vocab - 1,
    }


def _stretch() -> Array:
    """By what llama.cpp divides each frequency, as its converter computes it."""
    low, high = _STRETCHED["low_freq_factor"], _STRETCHED["high_freq_factor"]
    n_ctx, factor = _STRETCHED["original_max_position_embeddings"], _STRETCHED["factor"]
    divisors: list[float] = []
    for i in range(0, _SHAPE.head_dim, 2):
        wavelength = 2 * math.pi * _SHAPE.rope_theta ** (i / _SHAPE.head_dim)
        smooth = min(max((n_ctx / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)
