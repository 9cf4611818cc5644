"""Print how near the built-in model is to the reference, in F16 and Q8_0.

    python tests/golden/report.py F16_GGUF

F16_GGUF is made with `python models/build_minilm.py --outtype f16 -o F16_GGUF`. Below the table:
the rows that llama.cpp's own tokenizer splits differently, and why.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import numpy as np
from compare import compare, load

from gguf_embed.catalog.catalog import builtin_path
from gguf_embed.engine.bert_text import bert_normalize, bert_words
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.wordpiece import MAX_WORD
from gguf_embed.native.model import Model
from gguf_embed.plan.settings import Settings


def reason(text: str) -> str:
    """Why llama.cpp's tokenizer differs, by the first rule that applies (README.md has them)."""
    if any(len(word) > MAX_WORD for word in bert_words(text)):
        return f"word of more than {MAX_WORD} characters"
    if any("HANGUL SYLLABLE" in unicodedata.name(char, "") for char in text):
        return "Hangul cut to its first letter"
    if any(unicodedata.category(char)[0] == "M" for char in bert_normalize(text)):
        return "marks dropped that the reference keeps"
    if any(char in text for char in "\x0b\x0c\x85"):
        return "control character taken for a blank"
    if "\u2581" in text:
        return "U+2581 taken for the start of a word"
    return "punctuation or format character newer than Unicode 8"


def main() -> None:
    golden = load()
    n = len(golden.texts)
    print(f"{n} rows, {sum(map(len, golden.ids))} tokens; cosine with the reference")
    print(f"{'':6}{'min':>10}{'p1':>10}{'median':>10}  same token ids")
    for path in (Path(sys.argv[1]), builtin_path()):
        with Embedder.open(path, settings=Settings(tune=False)) as embedder:
            found = compare(embedder, golden)
        low, p1, median = np.quantile(found.cosine, (0, 0.01, 0.5))
        same = n - len(found.other_ids)
        print(f"{embedder.quant:6}{low:10.6f}{p1:10.6f}{median:10.6f}  {same}/{n}")
        for row in found.other_ids:
            print(f"  row {row} ({golden.kinds[row]}): {ascii(golden.texts[row])[:60]}")

    native = Model(builtin_path())
    ids = (native.tokenize(text.encode()).tolist() for text in golden.texts)
    rows = [row for row, got in enumerate(ids) if golden.cut(got) != golden.ids[row]]
    native.close()
    print(f"llama.cpp's own tokenizer: {n - len(rows)}/{n}")
    for row in rows:
        text = golden.texts[row]
        print(f"  row {row} ({golden.kinds[row]}): {reason(text)}: {ascii(text)[:60]}")


if __name__ == "__main__":
    main()
