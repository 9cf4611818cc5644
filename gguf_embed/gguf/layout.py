"""The tensor table that llama.cpp's converter and quantizer give a model of a known shape.

It answers "how large is this model in that quantization, layer by layer" before any file is
fetched. Names, types and order are those of llama.cpp (src/llama-quant.cpp, without an
importance matrix); the sizes of the published Qwen3-Embedding files follow to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gguf_embed.errors import BadOption
from gguf_embed.gguf import quants
from gguf_embed.gguf.header import Header
from gguf_embed.gguf.quants import BLOCK
from gguf_embed.gguf.tensors import TensorInfo, tensor_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers that decide a model's tensors and its cache; `architecture` as in GGUF."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int  # for learned positions (bert): the rows of the position table
    n_token_types: int = 2  # bert only: 2 for BERT, 1 for XLM-R
    n_cls_out: int = 0  # rows of a reranker's cls.output.weight; 0: an embedder


ARCHITECTURES: Final = ("bert", "qwen2", "qwen3")

QUANTS: Final = tuple(name for name, quant in quants.QUANTS.items() if quant.mix_known)


def shape_of(header: Header) -> Shape:
    """The shape that a file's header tells. Raises BadModelFile."""
    return Shape(
        architecture=header.architecture,
        n_layer=header.n_layer,
        n_embd=header.n_embd,
        n_head=header.n_head,
        n_head_kv=header.n_head_kv,
        head_dim=max(header.key_length, header.value_length),
        n_ff=header.n_ff,
        n_vocab=header.n_vocab,
        n_ctx_train=header.n_ctx_train,
    )


def tensors(shape: Shape, quant: str) -> tuple[TensorInfo, ...]:
    """Every tensor of the model in that quantization, in llama-quantize's order; offsets are 0.

    Raises BadOption for a quantization or an architecture whose layout is not known here.
    """
    if quant not in QUANTS:
        raise BadOption(f"no layout for quantization {quant!r}; known: {', '.join(QUANTS)}")
    if shape.architecture not in ARCHITECTURES:
        raise BadOption(
            f"no layout for architecture {shape.architecture!r} (known: "
            f"{', '.join(ARCHITECTURES)}); read the header of the model's file instead"
        )
    return tuple(
        _tensor(name, dims, layer, shape, quant) for name, dims, layer in _named_shapes(shape)
    )


def _tensor(name: str, dims: tuple[int, ...], layer: int, shape: Shape, quant: str) -> TensorInfo:
    while len(dims) > 1 and dims[-1] == 1:
        dims = dims[:-1]  # ggml does not store them, and what is left is no matrix
    type_name = _type(name, dims, layer, shape, quant)
    return TensorInfo(
        name=name, shape=dims, type=type_name, offset=0, n_bytes=tensor_bytes(type_name, dims)
    )


def _named_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, dimensions, layer) in file order: by layer, -1 for none, then by name."""
    whole, block = _bert(shape) if shape.architecture == "bert" else _qwen(shape)
    for name, dims in sorted(whole.items()):
        yield name, dims, -1
    for layer in range(shape.n_layer):
        for name, dims in sorted(block.items()):
            yield f"blk.{layer}.{name}", dims, layer


_Dims = dict[str, tuple[int, ...]]


def _qwen(shape: Shape) -> tuple[_Dims, _Dims]:
    """Qwen2 and Qwen3 with tied embeddings: tensors of the whole, tensors of a block."""
    n, n_ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    whole: _Dims = {"token_embd.weight": (n, shape.n_vocab), "output_norm.weight": (n,)}
    if shape.n_cls_out:
        whole["cls.output.weight"] = (n, shape.n_cls_out)
    block: _Dims = {
        "attn_norm.weight": (n,),
        "attn_q.weight": (n, n_q),
        "attn_k.weight": (n, n_kv),
        "attn_v.weight": (n, n_kv),
        "attn_output.weight": (n_q, n),
        "ffn_norm.weight": (n,),
        "ffn_gate.weight": (n, n_ff),
        "ffn_up.weight": (n, n_ff),
        "ffn_down.weight": (n_ff, n),
    }
    if shape.architecture == "qwen3":
        block |= {"attn_q_norm.weight": (shape.head_dim,), "attn_k_norm.weight": (shape.head_dim,)}
    else:
        block |= {"attn_q.bias": (n_q,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}
    return whole, block


def _bert(shape: Shape) -> tuple[_Dims, _Dims]:
    """BERT and XLM-R, without the unused pooler: tensors of the whole, tensors of a block."""
    n, n_ff = shape.n_embd, shape.n_ff
    whole: _Dims = {
        "token_embd.weight": (n, shape.n_vocab),
        "position_embd.weight": (n, shape.n_ctx_train),
        "token_types.weight": (n, shape.n_token_types),
        "token_embd_norm.weight": (n,),
        "token_embd_norm.bias": (n,),
    }
    if shape.n_cls_out:
        whole |= {
            "cls.weight": (n, n),
            "cls.bias": (n,),
            "cls.output.weight": (n, shape.n_cls_out),
            "cls.output.bias": (shape.n_cls_out,),
        }
    block: _Dims = {}
    for name, dims in {
        "attn_q": (n, n),
        "attn_k": (n, n),
        "attn_v": (n, n),
        "attn_output": (n, n),
        "ffn_up": (n, n_ff),
        "ffn_down": (n_ff, n),
        "attn_output_norm": (n,),
        "layer_output_norm": (n,),
    }.items():
        block |= {f"{name}.weight": dims, f"{name}.bias": dims[-1:]}
    return whole, block


def _type(name: str, dims: tuple[int, ...], layer: int, shape: Shape, quant: str) -> str:
    """The type of one tensor (llama_tensor_get_type)."""
    if name == "cls.output.weight" and len(dims) == 1:
        # A matrix to the converter, which halves it; one row to the quantizer, which leaves it.
        return quant if quant in quants.EXACT else "F16"
    if len(dims) == 1 or name in ("position_embd.weight", "token_types.weight"):
        return "F32"
    mostly = quants.QUANTS[quant].mostly
    if quant in quants.EXACT:
        return mostly
    wanted = _mixed(name, layer, shape, quant) or mostly
    if dims[0] % BLOCK[wanted][0]:
        wanted = quants.TENSOR_TYPES[wanted].fallback or wanted
    return "F16" if dims[0] % BLOCK[wanted][0] else wanted


def _mixed(name: str, layer: int, shape: Shape, quant: str) -> str | None:
    """The type that a mix gives this tensor in place of its usual one (..._get_type_impl)."""
    n_layer = shape.n_layer
    first_eighth = layer < n_layer // 8
    more_bits = first_eighth or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    grouped = shape.n_head // shape.n_head_kv >= 4  # few, hence precious, key-value heads
    match name.removesuffix(".weight").rpartition(".")[2], quant:
        case "token_embd", _:  # also the output matrix: no output.weight in these files
            return None if quant == "Q8_0" else "Q6_K"
        case "attn_v" | "ffn_down", "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if more_bits else None
        case "attn_v", "Q4_K_S":
            return "Q5_K" if layer < 4 else None
        case "ffn_down", "Q4_K_S" | "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if first_eighth else None
        case "attn_v", "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if grouped else None
        case "attn_v" | "ffn_down" | "attn_output", "Q3_K_L":
            return "Q5_K"
        case "attn_v", "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "ffn_down", "Q3_K_M":
            return "Q5_K" if layer < n_layer // 16 else "Q4_K"
        case "attn_output", "Q3_K_M":
            return "Q4_K"
        case "attn_v", "Q2_K":
            return "Q4_K" if grouped else "Q3_K"
        case "ffn_down" | "attn_output", "Q2_K":
            return "Q3_K"
        case _:
            return None
