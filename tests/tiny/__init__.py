"""Tiny models with seeded random weights: a GGUF, and the same weights for transformers.

Each `write_*` returns a `TinyModel`: the GGUF it wrote, the weights under transformers'
names, transformers' configuration and the tokenizer as `tokenizers` JSON, so that one can
run the same model without llama.cpp. A few hundred tokens, two to six layers, 1 to 5 MB, tens
of milliseconds.

The weights are exact in half precision, so F32 and F16 files hold the same model, and they
are made by correctly rounded operations only, so their hash is the same on every platform.
Their scale keeps what a trained model has: attention that is far from uniform, a residual
stream that a layer changes by as much as it carries. A wrong position, a lost end token or
a wrong mask then moves the vector visibly; tests/reference holds by how much.
"""

from tiny.decoders import (
    RERANK_TEMPLATE,
    write_qwen2_bidirectional,
    write_qwen3,
    write_qwen3_reranker,
)
from tiny.encoders import write_bert, write_xlmr, write_xlmr_reranker
from tiny.file import WRITABLE, Array, Pooling, TinyModel
from tiny.gemma import write_embeddinggemma
from tiny.llama import write_eurobert, write_llama_embed
from tiny.modernbert import write_modernbert
from tiny.nomic import write_nomic_bert, write_nomic_bert_moe
from tiny.vocabulary import EOS, WORDS

__all__ = [
    "EOS",
    "RERANK_TEMPLATE",
    "WORDS",
    "WRITABLE",
    "Array",
    "Pooling",
    "TinyModel",
    "write_bert",
    "write_embeddinggemma",
    "write_eurobert",
    "write_llama_embed",
    "write_modernbert",
    "write_nomic_bert",
    "write_nomic_bert_moe",
    "write_qwen2_bidirectional",
    "write_qwen3",
    "write_qwen3_reranker",
    "write_xlmr",
    "write_xlmr_reranker",
]
