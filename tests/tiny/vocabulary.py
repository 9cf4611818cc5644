"""Vocabularies of the tiny models: as `tokenizers` JSON, and as GGUF keys."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import gguf
import numpy as np

Token = gguf.TokenType

_SENTENCE = (
    "the of and to in is it for on with as at by from that this was are be not or an "
    "query text search passage answer instruct document given web relevant which "
    "river bank money water boat fish cat dog sat mat bread flour oven house yes no"
)
WORDS = _SENTENCE.split()

# -------------------------------------------------------------------------- tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens with what surrounds them; `json` is what tokenizer.json would hold."""

    tokens: Sequence[str]  # as transformers spells them, in id order
    types: Sequence[int]
    json: Mapping[str, object]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteLevel:
    """What one byte-level BPE tokenizer has of its own."""

    pre: str  # llama.cpp's name of it
    added: Sequence[tuple[str, bool]]  # text, and whether it is a control token
    bos: str
    eos: str
    pad: str
    split: str | None  # None: GPT-2's, which `ByteLevel` of tokenizers has in itself
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    add_eos: bool = True


_CONTRACTIONS_AND_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EOS = "<|endoftext|>"
QWEN = ByteLevel(
    pre="qwen2",
    added=(
        *((EOS, True), ("<|im_start|>", True), ("<|im_end|>", True)),
        *(("<think>", False), ("</think>", False)),
    ),
    bos=EOS,
    eos=EOS,
    pad=EOS,
    split=_CONTRACTIONS_AND_LETTERS + _REST,
)
LLAMA3 = ByteLevel(
    pre="llama-bpe",
    added=(("<|begin_of_text|>", True), ("<|end_of_text|>", True)),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    pad="<|end_of_text|>",
    split=_CONTRACTIONS_AND_LETTERS + "{1,3}" + _REST,
    ignore_merges=True,
    add_bos=True,
    add_eos=False,
)
# Llama 3's, but it ends the text and does not begin it.
EUROBERT = replace(LLAMA3, add_bos=False, add_eos=True)
# That of OLMo: runs of blanks are tokens, and text is brought to NFC.
MODERNBERT = ByteLevel(
    pre="modern-bert",
    added=(
        *(("[UNK]", True), ("[CLS]", True), ("[SEP]", True), ("[PAD]", True), ("[MASK]", True)),
        *((" " * n, False) for n in range(4, 1, -1)),
    ),
    bos="[CLS]",
    eos="[SEP]",
    pad="[PAD]",
    split=None,
    nfc=True,
    add_bos=True,
)


def byte_level_bpe(kind: ByteLevel) -> Vocabulary:
    """256 bytes, prefixes of `WORDS` with and without a space, the tokens added."""
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
    vocab = {token: i for i, token in enumerate(tokens)}
    entries = [
        _added(len(tokens) + i, text, special) for i, (text, special) in enumerate(kind.added)
    ]
    tokens += [text for text, _ in kind.added]
    types += [int(Token.CONTROL if special else Token.USER_DEFINED) for _, special in kind.added]
    split = {"type": "Split", "pattern": {"Regex": kind.split}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pieces = [split | {"invert": False}, byte_level | {"use_regex": False}]
    before, after = [kind.bos] if kind.add_bos else [], [kind.eos] if kind.add_eos else []
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": {"type": "NFC"} if kind.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces}
        if kind.split
        else byte_level | {"use_regex": True},
        "post_processor": _template(tokens, before, after) if before or after else None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return Vocabulary(tokens=tokens, types=types, json=tokenizer, merges=merges)


def add_bpe(writer: gguf.GGUFWriter, vocab: Vocabulary, kind: ByteLevel) -> None:
    """The keys of a vocabulary that `byte_level_bpe` made."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    writer.add_eos_token_id(vocab.tokens.index(kind.eos))
    writer.add_pad_token_id(vocab.tokens.index(kind.pad))
    writer.add_bos_token_id(vocab.tokens.index(kind.bos))
    if "[SEP]" in vocab.tokens:
        writer.add_sep_token_id(vocab.tokens.index("[SEP]"))
    writer.add_add_bos_token(kind.add_bos)
    writer.add_add_eos_token(kind.add_eos)


def sentencepiece_bpe() -> Vocabulary:
    """Gemma's kind: specials, 256 bytes, characters, prefixes of `WORDS`; ranks as scores."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces: list[str] = []
    for word in [*(f"\u2581{word}" for word in WORDS), *WORDS]:
        pieces += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in pieces]
    characters = ["\u2581", *_CHARACTERS, *_CHARACTERS[:26].upper(), *_MARKS, *"éèàüöäßñçø\n"]
    tokens = [*specials, *bytes_, *pieces, *characters]
    types = [int(Token.CONTROL)] * 5 + [int(Token.BYTE)] * 256
    types[3] = int(Token.UNKNOWN)
    types += [int(Token.NORMAL)] * (len(pieces) + len(characters))
    # As transformers reads merges out of sentencepiece: by the rank of what they make.
    rank = {token: i for i, token in enumerate(tokens)}
    merges = [
        f"{piece[:at]} {piece[at:]}"
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in rank and piece[at:] in rank
    ]
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, text, True) for i, text in enumerate(specials)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _template(tokens, ["<bos>"], ["<eos>"]),
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": rank,
            "merges": merges,
        },
    }
    scores = [0.0] * (len(specials) + 256)
    scores += [-float(i) for i in range(len(pieces) + len(characters))]
    return Vocabulary(tokens=tokens, types=types, json=tokenizer, merges=merges, scores=scores)


def add_sentencepiece(writer: gguf.GGUFWriter, vocab: Vocabulary) -> None:
    """The keys of a vocabulary that `sentencepiece_bpe` made."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.tokens)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    writer.add_add_space_prefix(False)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_mask_token_id(4)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_MARKS = ".,:;!?'\"()-"


def wordpiece() -> Vocabulary:
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
    return Vocabulary(tokens=tokens, types=types, json=tokenizer)


def add_wordpiece(writer: gguf.GGUFWriter, vocab: Vocabulary) -> None:
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


def unigram() -> Vocabulary:
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
        "post_processor": _template(tokens, ["<s>"], ["</s>"], between=["</s>", "</s>"]),
        "decoder": metaspace | {"split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [list(pair) for pair in zip(tokens, scores, strict=True)],
            "byte_fallback": False,
        },
    }
    return Vocabulary(tokens=tokens, types=types, json=tokenizer, scores=scores)


def add_unigram(writer: gguf.GGUFWriter, vocab: Vocabulary) -> None:
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
    tokens: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    *,
    between: Sequence[str] = (),
) -> dict[str, object]:
    """tokenizers' TemplateProcessing: `before`, the text, `after`.

    With `between` a pair is `before`, the first, `between`, the second, `after`.
    """
    parts = [{"SpecialToken": {"id": token, "type_id": 0}} for token in (*before, *after)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [*parts[: len(before)], text, *parts[len(before) :]]
    special = {
        token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
        for token in (*before, *after)
    }
    second = {"Sequence": {"id": "B", "type_id": 0}}
    pair = [*single, second]
    if between:
        middle = [{"SpecialToken": {"id": token, "type_id": 0}} for token in between]
        pair = [*parts[: len(before)], text, *middle, second, *parts[len(before) :]]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }
