"""Whether llama.cpp can tokenize with a file's vocabulary: lengths and types, ids, each token.

Checked against llama.cpp 0c1e57098, llama_vocab::impl::load in src/llama-vocab.cpp. Most of these
faults abort the process, some of them only at the first text; the others give wrong tokens.
"""

from __future__ import annotations

import math
from typing import Final

from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.cursor import ArraySummary, Scalar
from gguf_embed.gguf.header import Header

# `tokenizer.ggml.model`: with the ids of the begin and the end token that llama.cpp takes where
# the file names none, and whether it adds them.
_BPE: Final = ("gpt2", "hybriddna", "whitespace")
_DEFAULTS: Final[dict[str, tuple[int | None, bool, int | None, bool]]] = {
    "llama": (1, True, 2, False),
    "bert": (101, True, 102, True),  # the end token is the separator
    "gpt2": (11, False, 11, False),
    "hybriddna": (11, False, 11, False),
    "whitespace": (11, False, 11, False),
    "t5": (None, False, 1, True),
    "rwkv": (None, False, None, False),
    "plamo2": (1, False, 2, False),
    "gemma4": (None, True, None, False),
}
# `tokenizer.ggml.pre` of byte-level BPE vocabularies: how text is split before it is merged.
_PRE_TOKENIZERS: Final = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe
    command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone
    exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o
    gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan
    hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de
    jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe
    llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2
    modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
    seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken
    tiny_aya trillion ufakzeka viking whitespace youtu
"""
PRE_TOKENIZERS: Final = frozenset(_PRE_TOKENIZERS.split())
# Those with which llama.cpp adds the begin token unasked.
_ADD_BOS: Final = """
    chameleon falcon-h1 falcon3 gemma4 granite-embed-multi-311m jina-v5-nano lfm2 llama-bpe
    llama-v3 llama3 midm-2.0 pixtral tekken
"""
_FORCE_BOS: Final = frozenset(("gemma4", "granite-embed-multi-311m"))  # whatever the file says
_NO_BOS: Final = frozenset(("chatglm-bpe", "glm4", "glm5"))  # no begin token unless named

_KINDS: Final[dict[type, str]] = {str: "str", int: "i32", float: "f32", bool: "bool"}
_AGAIN: Final = "convert the model again, or get another GGUF of it"
_PREFIX: Final = "tokenizer.ggml."


def check_tokenizer(header: Header) -> None:
    """Raise BadModelFile where the kind, a length or the type of a list cannot be right."""
    model = header.tokenizer_model or ""
    if model not in _DEFAULTS:
        raise _unknown(header, "model", model)
    pre = header.metadata.get(f"{_PREFIX}pre", "default") or "default"
    if model in _BPE and pre not in PRE_TOKENIZERS:
        raise _unknown(header, "pre", str(pre))
    kind, n_tokens = _array(header, "tokens")
    if kind != "str" or not n_tokens:
        raise _bad(header, "tokens", f"holds {n_tokens} values of type {kind}, no tokens")
    unigram = model in ("llama", "t5")
    for name, kinds in (("scores", ("f32", "i32")), ("token_type", ("i32",))):
        kind, length = _array(header, name)
        if length is None:
            if unigram:
                raise _bad(header, name, f"is missing, a {model!r} vocabulary needs it")
        elif kind not in kinds or length != n_tokens:
            raise _bad(header, name, f"holds {length} of type {kind} for {n_tokens} tokens")
    if model in (*_BPE, "gemma4") and pre != "kimi-k2":
        kind, length = _array(header, "merges")
        if kind != "str":
            raise _bad(header, "merges", f"holds {length} of type {kind}, BPE needs text")


def check_special_tokens(header: Header) -> None:
    """Raise BadModelFile where an id is no token, or a token is to be added that has no id."""
    n_tokens = _array(header, "tokens")[1] or 0
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "unknown", "seperator", "cls"):
        key = f"{_PREFIX}{name}_token_id"
        value = header.metadata.get(key)
        is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < n_tokens
        if value is not None and not is_id:
            raise _bad(header, f"{name}_token_id", f"is {value!r}, there are {n_tokens} tokens")
        ids[name] = value if isinstance(value, int) else None
    model = header.tokenizer_model or ""
    pre = str(header.metadata.get(f"{_PREFIX}pre", "default"))
    bos, add_bos, eos, add_eos = _DEFAULTS[model]
    if model in _BPE:
        add_bos = pre in _ADD_BOS.split()
        bos = None if pre in _NO_BOS else bos
    if model == "bert":
        add_bos = add_eos = True  # llama.cpp adds both, whatever the file says
        ids["eos"] = ids["seperator"]
    else:
        add_bos = add_bos if header.add_bos is None else header.add_bos
        add_eos = add_eos if header.add_eos is None else header.add_eos
    if model == "gemma4" or pre in _FORCE_BOS:
        add_bos = True
    for name, added, default in (("bos", add_bos, bos), ("eos", add_eos, eos)):
        if added and ids[name] is None and (default is None or default >= n_tokens):
            what = "begin" if name == "bos" else "end"
            raise _bad(header, f"{name}_token_id", f"is missing, the {what} token is to be added")


def check_vocabulary(header: Header) -> None:
    """Raise BadModelFile for a fault of single tokens; `header` was read with `keep_arrays`."""
    check_tokenizer(header)
    tokens = _strings(header, "tokens")
    seen = {*tokens}
    if len(seen) < len(tokens):
        _check_twins(header, tokens)
    scores = header.metadata.get(f"{_PREFIX}scores")
    for i, score in enumerate(scores if isinstance(scores, tuple) else ()):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise _bad(header, "scores", f"of token {i} is {score!r}")
    for i, merge in enumerate(_strings(header, "merges")):
        if " " not in merge[1:]:
            raise _bad(header, "merges", f"holds {merge!r} as number {i}, no pair of tokens")
    if header.tokenizer_model == "llama":
        for byte in range(256):
            if f"<0x{byte:02X}>" not in seen and (byte > 127 or chr(byte) not in seen):
                raise _bad(header, "tokens", f"has no token for the byte {byte:#04x}")


def _check_twins(header: Header, tokens: tuple[str, ...]) -> None:
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        # llama.cpp names empty ones by their number; bytes that are no text look alike here.
        if token and "\ufffd" not in token and seen.setdefault(token, i) != i:
            raise _bad(header, "tokens", f"holds {token!r} twice, as {seen[token]} and {i}")


def _strings(header: Header, name: str) -> tuple[str, ...]:
    values = header.metadata.get(f"{_PREFIX}{name}")
    return tuple(map(str, values)) if isinstance(values, tuple) else ()


def _array(header: Header, name: str) -> tuple[str, int | None]:
    """Element type and length of a list; of one that was kept, the type as far as it shows."""
    value = header.metadata.get(f"{_PREFIX}{name}")
    if isinstance(value, ArraySummary):
        return value.type, value.length
    if value is None:
        return "none", None
    if not isinstance(value, tuple):
        return type(value).__name__, 1
    return (_kind_of(value) if value else "none"), len(value)


def _kind_of(values: tuple[Scalar, ...]) -> str:
    kinds = {type(value) for value in values}
    return _KINDS[kinds.pop()] if len(kinds) == 1 else "mixed"


def _unknown(header: Header, name: str, value: str) -> BadModelFile:
    return BadModelFile(
        f"{header.source}: {_PREFIX}{name} is {value!r}, which llama.cpp does not know; "
        "update gguf-embed and llama-cpp-python, or get another GGUF of this model"
    )


def _bad(header: Header, name: str, what: str) -> BadModelFile:
    return BadModelFile(f"{header.source}: {_PREFIX}{name} {what}; {_AGAIN}")
