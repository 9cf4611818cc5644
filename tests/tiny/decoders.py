"""Tiny decoders: Qwen3, as embedder and as reranker, and a Qwen2 that sees both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from tiny.file import Array, Draw, Pooling, TinyModel, open_writer, write_tensors
from tiny.vocabulary import QWEN, Vocabulary, add_bpe, byte_level_bpe

# ---------------------------------------------------------------------------- decoders


def write_qwen3(
    path: Path,
    *,
    seed: int = 0,
    outtype: str = "F32",
    pooling: Pooling | None = Pooling.LAST,
    add_eos: bool = True,
    n_ctx: int = 2048,
    pre: str = "qwen2",
    untied: bool = False,
) -> TinyModel:
    """A causal Qwen3 embedder. `pooling=None` writes no pooling key, as a chat model has.

    `untied` writes the language-model head beside the token table, with the same numbers.

    Every row is a multiple of 256 elements long, so that K-quants apply to all matrices.
    """
    shape = DecoderShape(n_embd=256, n_head=8, n_head_kv=2, head_dim=64, n_ff=256, n_ctx=n_ctx)
    writer = decoder_writer(path, "qwen3", shape, outtype)
    return _write_decoder(
        writer, path, shape, seed, outtype, pooling=pooling, add_eos=add_eos, pre=pre, untied=untied
    )


def write_qwen3_reranker(path: Path, *, seed: int = 0, outtype: str = "F32") -> TinyModel:
    """A Qwen3 reranker: RANK pooling, `cls.output.weight` holds the rows of "yes" and "no".

    No end token is added: the prompt's own last token is the one that is scored.
    """
    return write_qwen3(path, seed=seed, outtype=outtype, pooling=Pooling.RANK, add_eos=False)


# The published prompt of Qwen3-Reranker, as llama.cpp's converter stores it.
RERANK_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
    'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that "
    "answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def write_qwen2_bidirectional(
    path: Path, *, seed: int = 0, outtype: str = "F32", causal_key: bool = True
) -> TinyModel:
    """A Qwen2 whose attention sees both sides, LAST pooling (the shape of gte-Qwen2-instruct).

    `causal_key=False` leaves `attention.causal` out, as files converted in 2024 do.
    """
    shape = DecoderShape(n_embd=96, n_head=3, n_head_kv=1, head_dim=32, n_ff=160, n_ctx=512)
    writer = decoder_writer(path, "qwen2", shape, outtype)
    if causal_key:
        writer.add_causal_attention(False)
    return _write_decoder(writer, path, shape, seed, outtype, pooling=Pooling.LAST, add_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The numbers of a decoder, or of an encoder that is built like one."""

    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ctx: int
    n_layer: int = 2
    rope_theta: float = 1e6
    norm_eps: float = 1e-6


def _write_decoder(
    writer: gguf.GGUFWriter,
    path: Path,
    shape: DecoderShape,
    seed: int,
    outtype: str,
    *,
    pooling: Pooling | None,
    add_eos: bool,
    pre: str = "qwen2",
    untied: bool = False,
) -> TinyModel:
    is_qwen3 = writer.arch == "qwen3"
    kind = replace(QWEN, pre=pre, add_eos=add_eos)
    vocab = byte_level_bpe(kind)
    weights = decoder_weights(shape, vocab, seed, qkv_bias=not is_qwen3, qk_norm=is_qwen3)
    add_bpe(writer, vocab, kind)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    extra: dict[str, Array] = {}
    if pooling is Pooling.RANK:
        writer.add_array("qwen3.classifier.output_labels", ["yes", "no"])
        writer.add_chat_template([{"name": "rerank", "template": RERANK_TEMPLATE}])
        yes_no = [vocab.tokens.index("yes"), vocab.tokens.index("no")]
        extra["cls.output.weight"] = weights["embed_tokens.weight"][yes_no]
    if untied:
        extra["output.weight"] = weights["embed_tokens.weight"]
    write_tensors(writer, path, weights, outtype, extra=extra)
    config = {
        "model_type": writer.arch,
        "is_causal": is_qwen3,
        "vocab_size": len(vocab.tokens),
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.n_ctx,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
    }
    return TinyModel(
        path=path, weights=weights, config=config, tokenizer=vocab.json, pooling=pooling
    )


def decoder_weights(
    shape: DecoderShape, vocab: Vocabulary, seed: int, *, qkv_bias: bool, qk_norm: bool
) -> dict[str, Array]:
    draw = Draw(seed)
    q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    # The residual stream starts at RMS 0.1, so that the tied head's logits are moderate.
    draw.matrix("embed_tokens.weight", len(vocab.tokens), shape.n_embd, rms=0.1)
    for layer in range(shape.n_layer):
        attn, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        for name, n_out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            # Without the norms of q and k, larger matrices make attention choose.
            sharp = 1.5 if name != "v_proj" and not qk_norm else 1.0
            draw.dense(f"{attn}.{name}.weight", n_out, shape.n_embd, gain=sharp)
            if qkv_bias:
                draw.vector(f"{attn}.{name}.bias", n_out, mean=0.0, spread=0.3)
        draw.dense(f"{attn}.o_proj.weight", shape.n_embd, q, gain=0.3)
        if qk_norm:
            draw.vector(f"{attn}.q_norm.weight", shape.head_dim, mean=1.5, spread=0.2)
            draw.vector(f"{attn}.k_norm.weight", shape.head_dim, mean=1.5, spread=0.2)
        draw.dense(f"{mlp}.gate_proj.weight", shape.n_ff, shape.n_embd)
        draw.dense(f"{mlp}.up_proj.weight", shape.n_ff, shape.n_embd)
        draw.dense(f"{mlp}.down_proj.weight", shape.n_embd, shape.n_ff, gain=0.3)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            draw.vector(f"layers.{layer}.{norm}.weight", shape.n_embd, mean=1.0, spread=0.1)
    draw.vector("norm.weight", shape.n_embd, mean=1.0, spread=0.1)
    return draw.weights


def decoder_writer(path: Path, arch: str, shape: DecoderShape, outtype: str) -> gguf.GGUFWriter:
    writer = open_writer(path, arch, outtype)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    return writer
