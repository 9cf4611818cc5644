"""The full-text tables of an index, read: which passages hold a word, and how long they are.

Numbers come as one text from SQLite: a row for each of them would take ten times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gguf_embed.index.database import Database

# Words without their English endings, accents and case.
TOKENIZER: Final = "porter unicode61 remove_diacritics 2"
_SCRATCH: Final = (
    ("occurrences", "fts5vocab('main', 'words', 'instance')"),
    ("asked", f"fts5 (text, content='', tokenize=\"{TOKENIZER}\")"),
    ("asked_words", "fts5vocab('temp', 'asked', 'instance')"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How many words each passage has; both ascend by id."""

    ids: npt.NDArray[np.int64]  # of passages
    n_words: npt.NDArray[np.int64]


class WordTables:
    """What one connection sees of the words."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ready = False

    def stems(self, phrases: Sequence[str]) -> list[tuple[str, ...]]:
        """The words of each phrase, as the index has them."""
        self._prepare()
        self._database.do("INSERT INTO temp.asked (asked) VALUES ('delete-all')")
        for number, phrase in enumerate(phrases):
            self._database.do("INSERT INTO temp.asked (rowid, text) VALUES (?, ?)", number, phrase)
        found = self._database.rows("SELECT doc, term FROM temp.asked_words ORDER BY doc, offset")
        return [
            tuple(str(stem) for number, stem in found if number == row)
            for row in range(len(phrases))
        ]

    def has_more(self, phrase: str, n: int) -> bool:
        """Whether more than `n` passages hold a quoted phrase."""
        query = "SELECT rowid FROM words WHERE words MATCH ? LIMIT 1 OFFSET ?"
        return bool(self._database.rows(query, phrase, n))

    def holders(self, stems: Sequence[str]) -> npt.NDArray[np.int64]:
        """The ids of passages that hold a phrase: one for each time, in any order."""
        self._prepare()
        if len(stems) == 1:
            (ids,) = self._numbers(
                "SELECT group_concat(doc) FROM temp.occurrences WHERE term = ?", stems[0]
            )
            return ids
        places: npt.NDArray[np.int64] | None = None
        for position, stem in enumerate(stems):
            ids, columns, offsets = self._numbers(
                "SELECT group_concat(doc), group_concat(CASE col WHEN 'name' THEN 0 "
                "WHEN 'headings' THEN 1 ELSE 2 END), group_concat(offset) "
                "FROM temp.occurrences WHERE term = ?",
                stem,
            )
            # A word of the phrase at its place says where the phrase would begin.
            starts = (ids * 4 + columns) * (1 << 24) + (offsets - position)
            places = starts if places is None else np.intersect1d(places, starts)
        return np.empty(0, np.int64) if places is None else places // (1 << 26)

    def lengths(self) -> Lengths:
        """Of all passages."""
        sizes = "SELECT id, hex(sz) AS sizes FROM words_docsize ORDER BY id"
        ((ids, sizes),) = self._database.rows(
            f"SELECT group_concat(id), group_concat(sizes, '') FROM ({sizes})"
        )
        return Lengths(ids=_parsed(ids), n_words=_three_sizes(bytes.fromhex(sizes or "")))

    def places(self) -> tuple[npt.NDArray[np.int64], ...]:
        """(ids, files, ordinals) of all passages, in any order."""
        return self._numbers(
            "SELECT group_concat(id), group_concat(file), group_concat(ordinal) FROM passages"
        )

    def _numbers(self, query: str, *values: object) -> tuple[npt.NDArray[np.int64], ...]:
        (row,) = self._database.rows(query, *values)
        return tuple(_parsed(text) for text in row)

    def _prepare(self) -> None:
        if not self._ready:
            self._database.rows("PRAGMA temp_store = MEMORY")
            for name, kind in _SCRATCH:
                self._database.rows(f"CREATE VIRTUAL TABLE IF NOT EXISTS temp.{name} USING {kind}")
            self._ready = True


def _parsed(text: str | None) -> npt.NDArray[np.int64]:
    """The numbers of "1,2,3"; of None, which SQLite makes of nothing, none."""
    return np.fromstring(text, np.int64, sep=",") if text else np.empty(0, np.int64)


def _three_sizes(data: bytes) -> npt.NDArray[np.int64]:
    """Of each row the sum of three numbers, written seven bits a byte, high first."""
    digits = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(digits < 128)
    begins = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    numbers = np.zeros(len(ends), np.int64)
    for back in range(int((ends - begins).max(initial=-1)) + 1):
        at = begins + back
        more = at <= ends
        numbers[more] = numbers[more] * 128 + (digits[at[more]] & 127)
    return numbers.reshape(-1, 3).sum(axis=1)
