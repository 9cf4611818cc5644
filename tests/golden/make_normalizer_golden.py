"""Write normalizer.json: what the reference does to every code point there is.

    pip install tokenizers
    python tests/golden/make_normalizer_golden.py

Code points that no entry names stay as they are. Hangul and compatibility ideographs change
by the thousand; of those a hash is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

TARGET = Path(__file__).with_name("normalizer.json")
BULK = {
    "ac00-d7a3": (0xAC00, 0xD7A4),
    "f900-faff": (0xF900, 0xFB00),
    "2f800-2fa1f": (0x2F800, 0x2FA20),
}


def code_points() -> Iterator[int]:
    """All but the surrogates, which no UTF-8 text can hold."""
    yield from range(0xD800)
    yield from range(0xE000, 0x110000)


def ranges(codes: Iterable[int]) -> str:
    found: list[list[int]] = []
    for code in codes:
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return " ".join(f"{a:x}" if a == b else f"{a:x}-{b:x}" for a, b in found)


def main() -> None:
    normalize = BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True
    ).normalize_str
    split = BertPreTokenizer().pre_tokenize_str
    removed: list[int] = []
    blank: list[int] = []
    isolated: list[int] = []
    punctuation: list[int] = []
    changed: dict[str, str] = {}
    bulk = {name: hashlib.sha256() for name in BULK}
    for code in code_points():
        char = chr(code)
        result = normalize(char)
        for name, (first, end) in BULK.items():
            if first <= code < end:
                bulk[name].update(f"{result}\n".encode())
                break
        else:
            if not result:
                removed.append(code)
            elif result == " ":
                blank.append(code)
            elif result == f" {char} ":
                isolated.append(code)
            elif result != char:
                changed[f"{code:x}"] = result
            if [word for word, _ in split(f"a{char}b")] == ["a", char, "b"]:
                punctuation.append(code)
    golden = {
        "tokenizers": tokenizers.__version__,
        "removed": ranges(removed),
        "blank": ranges(blank),
        "isolated": ranges(isolated),
        "punctuation": ranges(punctuation),
        "bulk": {name: digest.hexdigest() for name, digest in bulk.items()},
        "changed": changed,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    TARGET.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
