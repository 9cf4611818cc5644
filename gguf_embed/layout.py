"""The tensor table that llama.cpp's converter and quantizer give a model of a known shape."""

from __future__ import annotations

from dataclasses import dataclass


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
    tied_embeddings: bool = True  # False: the file has its own output.weight
    n_cls_out: int = 0  # rows of a reranker's cls.output.weight; 0: none
