"""What a model's file does not say: the cards in models/."""

BUILTIN = "all-minilm-l6-v2"  # ships in the package
RERANKER = "qwen3-reranker:0.6b"  # the default: small, and good in many languages
