"""The commands, each with its line in `gguf-embed --help`: that help need import none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COMMANDS: Final[Mapping[str, str]] = {
    "bench": "compare quantization levels",
    "bundle": "carry a model to a machine without internet",
    "cache": "vectors that need not be computed again",
    "cluster": "what an index is about",
    "compare": "are two of them one vector space?",
    "completion": "completion for your shell",
    "dedupe": "passages that are nearly the same",
    "doctor": "what works, what would be faster",
    "embed": "texts to vectors",
    "index": "make folders searchable",
    "map": "an index as a picture",
    "mcp": "an index for agents",
    "models": "what is known and what is here",
    "plan": "what of a model to run here, and why",
    "probe": "what this machine has",
    "pull": "fetch a model, verified",
    "quantize": "a model in fewer bits",
    "rerank": "texts by how well they answer",
    "search": "the passages that answer a question",
    "serve": "vectors over HTTP",
    "show": "a passage in its document",
    "tune": "measure the fastest settings",
    "unbundle": "install a model that was carried here",
}
