"""Tiny models with seeded random weights: a GGUF, and the same weights for transformers.

Each `write_*` returns a `TinyModel`: the GGUF it wrote, the weights under transformers'
names, transformers' configuration and the tokenizer as `tokenizers` JSON, so that one can
run the same model without llama.cpp. A few hundred tokens, two layers, 1 to 5 MB, tens of
milliseconds.

The weights are exact in half precision, so F32 and F16 files hold the same model, and they
are made by correctly rounded operations only, so their hash is the same on every platform.
Their scale keeps what a trained model has: attention that is far from uniform, a residual
stream that a layer changes by as much as it carries. A wrong position, a lost end token or
a wrong mask then moves the vector visibly; tests/reference holds by how much.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Pooling = gguf.PoolingType
Token = gguf.TokenType

# Made by gguf.quants; every other type goes through llama_model_quantize.
WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")

_SENTENCE = (
    "the of and to in is it for on with as at by from that this was are be not or an "
    "query text search passage answer instruct document given web relevant which "
    "river bank money water boat fish cat dog sat mat bread flour oven house yes no"
)
WORDS = _SENTENCE.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A written GGUF and what transformers needs to run the same model."""

    path: Path
    weights: Mapping[str, Array] = field(repr=False)  # transformers' state dict
    config: Mapping[str, Any]  # keywords of transformers' configuration class
    tokenizer: Mapping[str, Any] = field(repr=False)  # what tokenizer.json would hold
    pooling: Pooling | None

    @property
    def weights_sha256(self) -> str:
        """Hash over names, shapes and bytes of all weights, in name order."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            weight = self.weights[name]
            digest.update(f"{name} {weight.shape}\n".encode())
            digest.update(np.ascontiguousarray(weight, dtype="<f4").tobytes())
        return digest.hexdigest()


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
) -> TinyModel:
    """A causal Qwen3 embedder. `pooling=None` writes no pooling key, as a chat model has.

    Every row is a multiple of 256 elements long, so that K-quants apply to all matrices.
    """
    shape = _DecoderShape(n_embd=256, n_head=8, n_head_kv=2, head_dim=64, n_ff=256, n_ctx=n_ctx)
    writer = _decoder_writer(path, "qwen3", shape, outtype)
    return _write_decoder(
        writer, path, shape, seed, outtype, pooling=pooling, add_eos=add_eos, pre=pre
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
    shape = _DecoderShape(n_embd=96, n_head=3, n_head_kv=1, head_dim=32, n_ff=160, n_ctx=512)
    writer = _decoder_writer(path, "qwen2", shape, outtype)
    if causal_key:
        writer.add_causal_attention(False)
    return _write_decoder(writer, path, shape, seed, outtype, pooling=Pooling.LAST, add_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecoderShape:
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
    shape: _DecoderShape,
    seed: int,
    outtype: str,
    *,
    pooling: Pooling | None,
    add_eos: bool,
    pre: str = "qwen2",
) -> TinyModel:
    is_qwen3 = writer.arch == "qwen3"
    vocab = _byte_level_bpe(add_eos=add_eos)
    weights = _decoder_weights(shape, vocab, seed, qkv_bias=not is_qwen3, qk_norm=is_qwen3)
    _add_bpe(writer, vocab, add_eos=add_eos, pre=pre)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    extra: dict[str, Array] = {}
    if pooling is Pooling.RANK:
        writer.add_array("qwen3.classifier.output_labels", ["yes", "no"])
        writer.add_chat_template([{"name": "rerank", "template": RERANK_TEMPLATE}])
        yes_no = [vocab.tokens.index("yes"), vocab.tokens.index("no")]
        extra["cls.output.weight"] = weights["embed_tokens.weight"][yes_no]
    _write(writer, path, weights, outtype, extra=extra)
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


def _decoder_weights(
    shape: _DecoderShape, vocab: _Vocabulary, seed: int, *, qkv_bias: bool, qk_norm: bool
) -> dict[str, Array]:
    draw = _Draw(seed)
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


def _decoder_writer(path: Path, arch: str, shape: _DecoderShape, outtype: str) -> gguf.GGUFWriter:
    writer = _writer(path, arch, outtype)
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


# ---------------------------------------------------------------------------- encoders


def write_bert(
    path: Path, *, seed: int = 0, outtype: str = "F32", pooling: Pooling = Pooling.CLS
) -> TinyModel:
    """A BERT with a lower-casing WordPiece tokenizer; 128 positions."""
    shape = _EncoderShape(n_types=2, norm_eps=1e-12, pad_id=0, first_position=0)
    vocab = _wordpiece()
    writer = _encoder_writer(path, shape, outtype)
    _add_wordpiece(writer, vocab)
    return _write_encoder(writer, path, shape, vocab, seed, outtype, pooling=pooling)


def write_xlmr(
    path: Path, *, seed: int = 0, outtype: str = "F32", pooling: Pooling = Pooling.CLS
) -> TinyModel:
    """An XLM-RoBERTa with a unigram tokenizer; 128 positions.

    transformers counts positions from 2 (after the padding id); the GGUF holds the table
    without its first two rows, as llama.cpp's converter writes it, and counts from 0.
    """
    shape = _EncoderShape(n_types=1, norm_eps=1e-5, pad_id=1, first_position=2)
    vocab = _unigram()
    writer = _encoder_writer(path, shape, outtype)
    _add_unigram(writer, vocab)
    return _write_encoder(writer, path, shape, vocab, seed, outtype, pooling=pooling)


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
    vocab: _Vocabulary,
    seed: int,
    outtype: str,
    *,
    pooling: Pooling,
) -> TinyModel:
    writer.add_pooling_type(pooling)
    weights = _encoder_weights(shape, vocab, seed)
    positions = "embeddings.position_embeddings.weight"
    stored = weights | {positions: weights[positions][shape.first_position :]}
    _write(writer, path, stored, outtype)
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


def _encoder_weights(shape: _EncoderShape, vocab: _Vocabulary, seed: int) -> dict[str, Array]:
    draw, n_embd = _Draw(seed), shape.n_embd

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
    return draw.weights


def _encoder_writer(path: Path, shape: _EncoderShape, outtype: str) -> gguf.GGUFWriter:
    writer = _writer(path, "bert", outtype)
    writer.add_context_length(shape.n_ctx)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(shape.norm_eps)
    writer.add_causal_attention(False)
    writer.add_token_type_count(shape.n_types)
    return writer


# -------------------------------------------------------------------------- tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    tokens: Sequence[str]  # as transformers spells them, in id order
    types: Sequence[int]
    json: Mapping[str, object]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()


# The split of Qwen2 and Qwen3's tokenizer.json.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS = "<|endoftext|>"


def _byte_level_bpe(*, add_eos: bool) -> _Vocabulary:
    """256 bytes, prefixes of `WORDS` with and without a space, Qwen's special tokens."""
    # GPT-2's spelling of bytes: printable Latin-1 as itself, the rest from U+0100 upwards.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (chr(256 + i) for i in range(256))
    tokens = [chr(byte) if byte in printable else next(hidden) for byte in range(256)]
    merges: list[str] = []
    for word in [*(f"Ġ{word}" for word in WORDS), "yes", "no"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    types = [int(Token.NORMAL)] * len(tokens)
    added = [(EOS, True), ("<|im_start|>", True), ("<|im_end|>", True)]
    added += [("<think>", False), ("</think>", False)]
    vocab = {token: i for i, token in enumerate(tokens)}
    entries = [_added(len(tokens) + i, text, special) for i, (text, special) in enumerate(added)]
    tokens += [text for text, _ in added]
    types += [int(Token.CONTROL if special else Token.USER_DEFINED) for _, special in added]
    split = {"type": "Split", "pattern": {"Regex": _QWEN_SPLIT}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "post_processor": _template(tokens, [], [EOS]) if add_eos else None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return _Vocabulary(tokens=tokens, types=types, json=tokenizer, merges=merges)


def _add_bpe(writer: gguf.GGUFWriter, vocab: _Vocabulary, *, add_eos: bool, pre: str) -> None:
    eos = vocab.tokens.index(EOS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos)
    writer.add_bos_token_id(eos)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(add_eos)


_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_MARKS = ".,:;!?'\"()-"


def _wordpiece() -> _Vocabulary:
    """BERT's specials, single characters, `WORDS` and some endings."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*_CHARACTERS, *_MARKS, *(word for word in WORDS if len(word) > 1)]
    pieces += [f"##{end}" for end in (*_CHARACTERS, "ing", "ed", "er", "es", "tion", "able")]
    tokens = specials + pieces
    types = [int(Token.CONTROL)] * len(specials) + [int(Token.NORMAL)] * len(pieces)
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, text, True) for i, text in enumerate(specials)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _template(tokens, ["[CLS]"], ["[SEP]"]),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: i for i, token in enumerate(tokens)},
        },
    }
    return _Vocabulary(tokens=tokens, types=types, json=tokenizer)


def _add_wordpiece(writer: gguf.GGUFWriter, vocab: _Vocabulary) -> None:
    def phantom(token: str, kind: int) -> str:
        """llama.cpp marks the start of a word instead of its continuation."""
        if kind == Token.CONTROL:
            return token
        return token[2:] if token.startswith("##") else "\u2581" + token

    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([phantom(*pair) for pair in zip(vocab.tokens, vocab.types, strict=True)])
    writer.add_token_types(vocab.types)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)


def _charsmap() -> bytes:
    """SentencePiece's normalization table with one rule: tab and line ends become a space.

    Layout: byte length, a double array of that length, the replacements. A unit of the array
    is label | has_leaf << 8 | offset << 10; child = position ^ offset ^ byte.
    """
    units = np.zeros(512, dtype="<u4")
    units[0] = 256 << 10
    for byte in b"\t\n\r":
        units[256 ^ byte] = byte | 1 << 8 | 256 << 10
        units[byte] = 1 << 31  # a leaf: the replacement at position 0
    return np.uint32(units.nbytes).tobytes() + units.tobytes() + b" \0"


_CHARSMAP = _charsmap()


def _unigram() -> _Vocabulary:
    """XLM-R's specials, single characters, `WORDS` and accented pieces, with scores."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["\u2581", *_CHARACTERS, *_CHARACTERS[:26].upper(), *_MARKS, *"éèàüöäßñçø"]
    pieces += [f"\u2581{word}" for word in WORDS]
    pieces += ["ing", "ed", "er", "es", "tion", "\u2581un", "\u2581re", "über", "\u2581la"]
    tokens = [*specials, *pieces, "<mask>"]
    # Longer pieces are likelier than their parts; distinct, so that no two splits tie.
    scores = [0.0] * len(specials)
    scores += [-8.0 + 0.5 * min(len(p), 6) - i / 256 for i, p in enumerate(pieces)] + [0.0]
    types = [int(Token.CONTROL)] * 3 + [int(Token.UNKNOWN)]
    types += [int(Token.NORMAL)] * len(pieces) + [int(Token.CONTROL)]
    special_ids = [*range(len(specials)), len(tokens) - 1]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, tokens[i], True) for i in special_ids],
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(_CHARSMAP).decode(),
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace | {"split": True}],
        },
        "post_processor": _template(tokens, ["<s>"], ["</s>"]),
        "decoder": metaspace | {"split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [list(pair) for pair in zip(tokens, scores, strict=True)],
            "byte_fallback": False,
        },
    }
    return _Vocabulary(tokens=tokens, types=types, json=tokenizer, scores=scores)


def _add_unigram(writer: gguf.GGUFWriter, vocab: _Vocabulary) -> None:
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.tokens)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_precompiled_charsmap(_CHARSMAP)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_sep_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_mask_token_id(len(vocab.tokens) - 1)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def _added(token_id: int, content: str, special: bool) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, "special": special, **flags}


def _template(
    tokens: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> dict[str, object]:
    """tokenizers' TemplateProcessing: `before`, the text, `after`."""
    parts = [{"SpecialToken": {"id": token, "type_id": 0}} for token in (*before, *after)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [*parts[: len(before)], text, *parts[len(before) :]]
    special = {
        token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
        for token in (*before, *after)
    }
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }


# ------------------------------------------------------------------------------ weights


class _Draw:
    """Random weights by name: each depends on the seed and its own name only."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.weights: dict[str, Array] = {}

    def matrix(self, name: str, n_rows: int, n_cols: int, *, rms: float) -> None:
        self.weights[name] = _half(self._bell(name, n_rows, n_cols) * rms)

    def dense(self, name: str, n_out: int, n_in: int, *, gain: float = 1.0) -> None:
        """Input of RMS 1 gives output of RMS `gain`."""
        self.weights[name] = _half(self._bell(name, n_out, n_in) * (gain / np.sqrt(n_in)))

    def vector(self, name: str, n: int, *, mean: float, spread: float) -> None:
        self.weights[name] = _half(mean + self._bell(name, n) * spread)

    def _bell(self, name: str, *shape: int) -> NDArray[np.float64]:
        """Near-normal, mean 0, variance 1: a sum of uniforms.

        RandomState's stream is frozen for good, and sums round the same everywhere, which
        the logarithm in a true normal does not.
        """
        random = np.random.RandomState([self._seed, zlib.crc32(name.encode())])
        a, b, c = random.random_sample((3, *shape))
        return (a + b + c - 1.5) * 2.0


def _half(values: NDArray[np.float64]) -> Array:
    return values.astype(np.float16).astype(np.float32)


# ---------------------------------------------------------------------------- GGUF files


def _writer(path: Path, arch: str, outtype: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"Tiny {arch}")
    stored = outtype if outtype in WRITABLE else "F32"
    ftype = "ALL_F32" if stored == "F32" else f"MOSTLY_{stored}"
    writer.add_file_type(gguf.LlamaFileType[ftype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _write(
    writer: gguf.GGUFWriter,
    path: Path,
    weights: Mapping[str, Array],
    outtype: str,
    *,
    extra: Mapping[str, Array] | None = None,
) -> None:
    """Write all weights under GGUF's names; `extra` are named for GGUF already."""
    names = gguf.get_tensor_name_map(_ARCH[writer.arch], 2)
    stored = outtype if outtype in WRITABLE else "F32"
    tensors = {_gguf_name(names, name): weight for name, weight in weights.items()}
    for name, weight in {**tensors, **(extra or {})}.items():
        # As llama.cpp's converter: vectors, norms and the small tables stay F32.
        small = weight.ndim == 1 or name in ("position_embd.weight", "token_types.weight")
        kind = gguf.GGMLQuantizationType["F32" if small else stored]
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if outtype not in WRITABLE:
        _requantize(path, outtype)


_ARCH = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    for candidate in (name, f"model.{name}"):
        if found := names.get_name(candidate, (".weight", ".bias")):
            return found
    raise KeyError(f"no GGUF name for {name}")


def _requantize(path: Path, outtype: str) -> None:
    """Replace an F32 file by llama-quantize's version of it, e.g. "Q4_K_M"."""
    import llama_cpp.llama_cpp

    llama: Any = llama_cpp.llama_cpp  # its annotations do not cover ctypes.byref
    params = llama.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{outtype}"])
    params.nthread = 1
    made = path.with_suffix(".quantized")
    status = llama.llama_model_quantize(os.fsencode(path), os.fsencode(made), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {outtype}")
    made.replace(path)
