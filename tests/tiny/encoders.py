"""Tiny encoders with a table of positions: BERT and XLM-RoBERTa."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf

from tiny.file import Array, Draw, Pooling, TinyModel, open_writer, write_tensors
from tiny.vocabulary import Vocabulary, add_unigram, add_wordpiece, unigram, wordpiece

# ---------------------------------------------------------------------------- encoders


def write_bert(
    path: Path, *, seed: int = 0, outtype: str = "F32", pooling: Pooling = Pooling.CLS
) -> TinyModel:
    """A BERT with a lower-casing WordPiece tokenizer; 128 positions."""
    shape = _EncoderShape(n_types=2, norm_eps=1e-12, pad_id=0, first_position=0)
    vocab = wordpiece()
    writer = _encoder_writer(path, shape, outtype)
    add_wordpiece(writer, vocab)
    return _write_encoder(writer, path, shape, vocab, seed, outtype, pooling=pooling)


def write_xlmr(
    path: Path, *, seed: int = 0, outtype: str = "F32", pooling: Pooling = Pooling.CLS
) -> TinyModel:
    """An XLM-RoBERTa with a unigram tokenizer; 128 positions.

    transformers counts positions from 2 (after the padding id); the GGUF holds the table
    without its first two rows, as llama.cpp's converter writes it, and counts from 0.
    """
    shape = _EncoderShape(n_types=1, norm_eps=1e-5, pad_id=1, first_position=2)
    vocab = unigram()
    writer = _encoder_writer(path, shape, outtype)
    add_unigram(writer, vocab)
    return _write_encoder(writer, path, shape, vocab, seed, outtype, pooling=pooling)


def write_xlmr_reranker(path: Path, *, seed: int = 0, outtype: str = "F32") -> TinyModel:
    """An XLM-RoBERTa with the head of bge-reranker-v2-m3: a dense layer, a tanh, one row."""
    return write_xlmr(path, seed=seed, outtype=outtype, pooling=Pooling.RANK)


@dataclass(frozen=True, slots=True, kw_only=True)
class _EncoderShape:
    n_types: int
    norm_eps: float
    pad_id: int
    first_position: int
    n_embd: int = 96
    n_head: int = 3
    n_ff: int = 192
    n_ctx: int = 128
    n_layer: int = 2


def _write_encoder(
    writer: gguf.GGUFWriter,
    path: Path,
    shape: _EncoderShape,
    vocab: Vocabulary,
    seed: int,
    outtype: str,
    *,
    pooling: Pooling,
) -> TinyModel:
    writer.add_pooling_type(pooling)
    weights = _encoder_weights(shape, vocab, seed, ranks=pooling is Pooling.RANK)
    positions = "embeddings.position_embeddings.weight"
    stored = weights | {positions: weights[positions][shape.first_position :]}
    write_tensors(writer, path, stored, outtype)
    config = {
        "model_type": "xlm-roberta" if shape.first_position else "bert",
        "vocab_size": len(vocab.tokens),
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "intermediate_size": shape.n_ff,
        "max_position_embeddings": shape.n_ctx + shape.first_position,
        "type_vocab_size": shape.n_types,
        "layer_norm_eps": shape.norm_eps,
        "hidden_act": "gelu",
        "pad_token_id": shape.pad_id,
    }
    return TinyModel(
        path=path, weights=weights, config=config, tokenizer=vocab.json, pooling=pooling
    )


def _encoder_weights(
    shape: _EncoderShape, vocab: Vocabulary, seed: int, *, ranks: bool
) -> dict[str, Array]:
    draw, n_embd = Draw(seed), shape.n_embd

    def norm(name: str) -> None:
        draw.vector(f"{name}.LayerNorm.weight", n_embd, mean=1.0, spread=0.1)
        draw.vector(f"{name}.LayerNorm.bias", n_embd, mean=0.0, spread=0.1)

    def dense(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        draw.dense(f"{name}.weight", n_out, n_in, gain=gain)
        draw.vector(f"{name}.bias", n_out, mean=0.0, spread=0.1)

    def table(name: str, n_rows: int, rms: float) -> None:
        draw.matrix(f"embeddings.{name}_embeddings.weight", n_rows, n_embd, rms=rms)

    table("word", len(vocab.tokens), rms=1.0)
    table("position", shape.n_ctx + shape.first_position, rms=0.5)
    table("token_type", shape.n_types, rms=0.3)
    norm("embeddings")
    for layer in range(shape.n_layer):
        block = f"encoder.layer.{layer}"
        dense(f"{block}.attention.self.query", n_embd, n_embd, gain=1.5)
        dense(f"{block}.attention.self.key", n_embd, n_embd, gain=1.5)
        dense(f"{block}.attention.self.value", n_embd, n_embd)
        dense(f"{block}.attention.output.dense", n_embd, n_embd, gain=2.0)
        norm(f"{block}.attention.output")
        dense(f"{block}.intermediate.dense", shape.n_ff, n_embd)
        dense(f"{block}.output.dense", n_embd, shape.n_ff, gain=1.5)
        norm(f"{block}.output")
    if ranks:
        dense("classifier.dense", n_embd, n_embd)
        dense("classifier.out_proj", 1, n_embd, gain=4.0)
    return draw.weights


def _encoder_writer(path: Path, shape: _EncoderShape, outtype: str) -> gguf.GGUFWriter:
    writer = open_writer(path, "bert", outtype)
    writer.add_context_length(shape.n_ctx)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(shape.norm_eps)
    writer.add_causal_attention(False)
    writer.add_token_type_count(shape.n_types)
    return writer
