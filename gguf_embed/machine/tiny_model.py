"""A tiny random model whose matrices are of one weight type."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from gguf_embed.native.quantizer import quantize_rows

# A model that exercises the matrix kernels of one weight type: one llama layer, no tokenizer.
_ROW, _VOCAB = 256, 64  # 256 is the block length of K-quants
_SHAPES = {
    "token_embd.weight": (_VOCAB, _ROW),
    "output_norm.weight": (_ROW,),
    "blk.0.attn_norm.weight": (_ROW,),
    "blk.0.attn_q.weight": (_ROW, _ROW),
    "blk.0.attn_k.weight": (_ROW, _ROW),
    "blk.0.attn_v.weight": (_ROW, _ROW),
    "blk.0.attn_output.weight": (_ROW, _ROW),
    "blk.0.ffn_norm.weight": (_ROW,),
    "blk.0.ffn_gate.weight": (_ROW, _ROW),
    "blk.0.ffn_up.weight": (_ROW, _ROW),
    "blk.0.ffn_down.weight": (_ROW, _ROW),
}
_METADATA: dict[str, int | float | str] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": _ROW,
    "llama.feed_forward_length": _ROW,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.vocab_size": _VOCAB,
    "tokenizer.ggml.model": "no_vocab",
}
_ALIGNMENT = 32


def write_tiny_model(path: Path, weight_type: str) -> None:
    """Write a random model whose matrices are of `weight_type`, a few hundred KB."""
    rng = np.random.default_rng(0)
    infos, data = b"", b""
    for name, shape in _SHAPES.items():
        if len(shape) == 1:
            kind, raw = 0, np.ones(shape, np.float32).tobytes()
        else:
            values = rng.normal(0, _ROW**-0.5, shape).astype(np.float32)
            kind, raw = quantize_rows(values, weight_type)
        infos += _string(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % _ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(_SHAPES), len(_METADATA))
    for key, value in _METADATA.items():
        head += _string(key)
        match value:
            case str():
                head += struct.pack("<I", 8) + _string(value)
            case float():
                head += struct.pack("<If", 6, value)
            case int():
                head += struct.pack("<II", 4, value)
    head += infos
    path.write_bytes(head + b"\0" * (-len(head) % _ALIGNMENT) + data)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
