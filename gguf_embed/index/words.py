"""Words of passages and questions, for the full-text search. Pure.

SQLite's FTS5 makes a word of each run of letters and digits. A run of Chinese, Japanese or Thai has
no spaces between words, so each of its characters becomes a word, and a question's run a phrase.
"""

from __future__ import annotations

import re

# Scripts that are written without spaces: Thai to Myanmar, Khmer, kana, Han, Hangul stays.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_RUN = re.compile(f"[{_UNSPACED}]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"\w+")
MAX_WORDS = 64  # of a question; a longer one says no more


def searchable(text: str) -> str:
    """The text as the full-text index gets it: unspaced scripts spaced, parts of names added."""
    text = _RUN.sub(lambda run: " " + " ".join(run[0]) + " ", text)
    parts = {name for name in _WORD.findall(text) if _CAMEL.search(name)}
    if not parts:
        return text
    return text + "\n" + " ".join(_CAMEL.sub(" ", name) for name in sorted(parts))


def phrases(question: str) -> list[str]:
    """The words of a question, each once, as FTS5 reads them: quoted; a run of Han is a phrase."""
    found: dict[str, None] = {}
    for word in _WORD.findall(question.replace("_", " ")):
        rest = word
        for run in _RUN.findall(word):
            found[" ".join(run)] = None
            rest = rest.replace(run, " ")
        for part in rest.split():
            found[part.casefold()] = None
    return [f'"{each}"' for each in list(found)[:MAX_WORDS]]
