"""What llama.cpp's pre-tokenizers do with runs of each class of character.

    python benchmarks/pretokenizers.py llama-vocab.cpp [n characters] [name ...] > table.json

One process a case, since a run can end it: the tokens, the seconds and the bytes of stack that were
touched. llama-vocab.cpp, of llama.cpp's sources, gives the names. Needs Linux.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gguf_embed.engine.stacks import call_with_stack
from gguf_embed.native.model import Model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
tiny: Any = importlib.import_module("tiny")

STACK = 1 << 30
LIMIT_S = 30
UNITS = {
    "lower": "a", "upper": "A", "mixed": "aB", "cyrillic": "ж", "dots": ".", "symbols": "$",
    "digits": "7", "spaces": " ", "tabs": "\t", "newlines": "\n", "crlf": "\r\n",
    "no-break": "\u00a0", "space-dot": " .", "dot-newline": ".\n", "slash-newline": "/\n",
    "apostrophes": "'s", "words": "ab ", "cjk": "中", "kana": "か", "hangul": "한", "emoji": "😀",
    "marks": "\u0301", "letter-mark": "a\u0301", "devanagari": "क्", "control": "\x01",
    "private": "\ue000", "replacement": "\ufffd",
}  # fmt: skip


def measure(path: Path, text: str) -> dict[str, float]:
    model, started = Model(path), time.monotonic()

    def tokenize() -> tuple[int, int]:
        ids = model.tokenize(text.encode())
        return len(ids), touched()

    n_tokens, n_bytes = call_with_stack(STACK, tokenize)
    return {"tokens": n_tokens, "s": round(time.monotonic() - started, 3), "stack_bytes": n_bytes}


def touched() -> int:
    """Resident bytes of the mapping that is as large as our stack."""
    size, most = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            size = int(found[2], 16) - int(found[1], 16)
        elif line.startswith("Rss:") and STACK <= size <= STACK + (4 << 20):
            most = max(most, int(line.split()[1]) << 10)
    return most


def child(path: Path, text: str, answers: Any) -> None:
    answers.send(measure(path, text))


def case(path: Path, text: str) -> dict[str, float | str]:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=child, args=(path, text, sending))
    process.start()
    sending.close()
    try:
        if receiving.poll(LIMIT_S):
            return receiving.recv()
        return {"end": f"more than {LIMIT_S} s"}
    except EOFError:
        process.join()
        return {"end": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def main(source: str, n: str = "30000", *names: str) -> None:
    assert threading.active_count() == 1, "the cases are forked"
    found = re.findall(r'tokenizer_pre == "([^"]*)"', Path(source).read_text())
    table: dict[str, dict[str, dict[str, float | str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or dict.fromkeys(found):
            path = tiny.write_qwen3(Path(folder) / "model.gguf", pre=name).path
            texts = {unit: (UNITS[unit] * int(n))[: int(n)] for unit in UNITS}
            table[name] = {unit: case(path, text) for unit, text in texts.items()}
            print(name, file=sys.stderr)
    print(json.dumps({"characters": int(n), "table": table}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
