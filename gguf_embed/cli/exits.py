"""What an exit code means: the one table, shown by every --help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXITS: Final[Mapping[int, str]] = {
    0: "done",
    1: "unexpected, or the answer is no (compare, doctor)",
    2: "bad input or option",
    3: "bad model file",
    4: "no such model",
    5: "too little memory or disk",
    6: "not fetched",
    7: "output not written",
    8: "llama.cpp failed, or texts have no vector",
    75: "terminated; go on with --resume",
    130: "interrupted",
    141: "the reader of standard output went away",
    143: "terminated",
}


def exits_line() -> str:
    """The table as a sentence."""
    return "exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXITS.items()) + "."
