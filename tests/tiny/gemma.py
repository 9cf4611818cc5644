"""A tiny EmbeddingGemma, with the dense layers that follow the pooling."""

from __future__ import annotations

from pathlib import Path

from tiny.decoders import DecoderShape, decoder_writer
from tiny.file import Array, Draw, Pooling, TinyModel, write_tensors
from tiny.vocabulary import add_sentencepiece, sentencepiece_bpe

_SHAPE = DecoderShape(n_embd=96, n_head=3, n_head_kv=1, head_dim=32, n_ff=160, n_ctx=512, n_layer=6)
_N_DENSE = 192
_WINDOW = 16  # eight tokens on each side; the last layer sees the whole text


def write_embeddinggemma(path: Path, *, seed: int = 0, outtype: str = "F32") -> TinyModel:
    """An EmbeddingGemma: Gemma 3 that sees both sides, MEAN pooling, two dense layers.

    GGUF holds the weights of norms as they multiply; transformers holds them without their 1.
    """
    vocab = sentencepiece_bpe()
    writer = decoder_writer(path, "gemma-embedding", _SHAPE, outtype)
    writer.add_sliding_window(_WINDOW)
    writer.add_pooling_type(Pooling.MEAN)
    writer.add_dense_features_dims("dense_2", _SHAPE.n_embd, _N_DENSE)
    writer.add_dense_features_dims("dense_3", _N_DENSE, _SHAPE.n_embd)
    add_sentencepiece(writer, vocab)
    weights, dense = _weights(seed, len(vocab.tokens))
    stored = {
        name: weight + 1 if name.endswith("norm.weight") else weight
        for name, weight in weights.items()
    }
    after = {f"dense_{i}.weight": weight for i, weight in enumerate(dense, 2)}
    write_tensors(writer, path, stored, outtype, extra=after)
    config = {
        "model_type": "gemma3_text",
        "use_bidirectional_attention": True,
        "vocab_size": len(vocab.tokens),
        "hidden_size": _SHAPE.n_embd,
        "intermediate_size": _SHAPE.n_ff,
        "num_hidden_layers": _SHAPE.n_layer,
        "num_attention_heads": _SHAPE.n_head,
        "num_key_value_heads": _SHAPE.n_head_kv,
        "head_dim": _SHAPE.head_dim,
        "query_pre_attn_scalar": _SHAPE.head_dim,
        "max_position_embeddings": _SHAPE.n_ctx,
        "rms_norm_eps": _SHAPE.norm_eps,
        "sliding_window": _WINDOW,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": _SHAPE.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return TinyModel(
        path=path,
        weights=weights,
        config=config,
        tokenizer=vocab.json,
        pooling=Pooling.MEAN,
        dense=dense,
    )


def _weights(seed: int, n_vocab: int) -> tuple[dict[str, Array], tuple[Array, ...]]:
    draw, n_embd = Draw(seed), _SHAPE.n_embd
    q, kv = _SHAPE.n_head * _SHAPE.head_dim, _SHAPE.n_head_kv * _SHAPE.head_dim

    def norm(name: str, n: int = n_embd, mean: float = 0.0) -> None:
        draw.vector(f"{name}.weight", n, mean=mean, spread=0.1)

    # The network multiplies it by the root of n_embd.
    draw.matrix("embed_tokens.weight", n_vocab, n_embd, rms=0.1)
    for layer in range(_SHAPE.n_layer):
        block = f"layers.{layer}"
        for name, n_out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            draw.dense(f"{block}.self_attn.{name}.weight", n_out, n_embd)
        draw.dense(f"{block}.self_attn.o_proj.weight", n_embd, q)
        norm(f"{block}.self_attn.q_norm", _SHAPE.head_dim, 0.5)
        norm(f"{block}.self_attn.k_norm", _SHAPE.head_dim, 0.5)
        draw.dense(f"{block}.mlp.gate_proj.weight", _SHAPE.n_ff, n_embd)
        draw.dense(f"{block}.mlp.up_proj.weight", _SHAPE.n_ff, n_embd)
        draw.dense(f"{block}.mlp.down_proj.weight", n_embd, _SHAPE.n_ff)
        norm(f"{block}.input_layernorm")
        norm(f"{block}.pre_feedforward_layernorm")
        # What a layer adds is normalized: this is its share of the residual stream.
        norm(f"{block}.post_attention_layernorm", mean=-0.5)
        norm(f"{block}.post_feedforward_layernorm", mean=-0.5)
    norm("norm")
    dense = Draw(seed)
    dense.dense("dense_2", _N_DENSE, n_embd)
    dense.dense("dense_3", n_embd, _N_DENSE)
    return draw.weights, tuple(dense.weights.values())
