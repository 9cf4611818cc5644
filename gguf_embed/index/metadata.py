"""What is said of a file beside its text, and conditions on that. Pure.

Each file has `ext` and `modified`; the front matter of Markdown adds its own, and goes before them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import Final

from gguf_embed.errors import BadOption
from gguf_embed.io.front_matter import Metadata, front_matter
from gguf_embed.io.split import kind_of_file

_CONDITION: Final = re.compile(r"\s*([^<>=]*?)\s*(>=|<=|=)(?![<>=])\s*(.*?)\s*", re.DOTALL)
_DATE: Final = re.compile(r"\d{4}(?:-\d\d(?:-\d\d(?:[T ].+)?)?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a value of a file has to be."""

    key: str
    relation: str  # =, >= or <=
    value: str

    def holds(self, value: str) -> bool:
        """Whether it is so of one value: numbers, dates, or texts without regard to case.

        A date counts as far as the condition goes: 2024-05-31 is 2024-05, and not after it.
        """
        given, wanted = _number(value), _number(self.value)
        if given is not None and wanted is not None:
            return self._ordered(given >= wanted, given <= wanted)
        if _DATE.fullmatch(value) and _DATE.fullmatch(self.value):
            given_date = value.replace(" ", "T")[: len(self.value)]
            wanted_date = self.value.replace(" ", "T")
            return self._ordered(given_date >= wanted_date, given_date <= wanted_date)
        return self.relation == "=" and value.casefold() == self.value.casefold()

    def _ordered(self, at_least: bool, at_most: bool) -> bool:
        return (at_least or self.relation == "<=") and (at_most or self.relation == ">=")


def parse_conditions(where: Sequence[str]) -> tuple[Condition, ...]:
    """Of texts such as "lang=en" and "date>=2024-05". Raises BadOption."""
    conditions: list[Condition] = []
    for text in where:
        found = _CONDITION.fullmatch(text)
        if found is None or not found[1] or not found[3]:
            raise BadOption(
                f"--where {text!r}: write KEY=VALUE, or KEY>=VALUE or KEY<=VALUE, in quotes on a "
                "command line: 'date>=2024-05-01'"
            )
        key, relation, value = found[1].casefold(), found[2], found[3]
        if relation != "=" and _number(value) is None and not _DATE.fullmatch(value):
            raise BadOption(
                f"--where {text!r}: {relation} compares numbers and dates; give one, such as "
                f"'{key}{relation}2024-05-01'"
            )
        conditions.append(Condition(key=key, relation=relation, value=value))
    return tuple(conditions)


def files_that_hold(
    conditions: Iterable[Condition], values_of: Callable[[str], Iterable[tuple[int, str]]]
) -> set[int]:
    """The files of which all conditions hold, each for at least one value; there are conditions.

    `values_of` gives (file, value) of a key.
    """
    return set[int].intersection(
        *({file for file, value in values_of(each.key) if each.holds(value)} for each in conditions)
    )


def has_front_matter(name: str) -> bool:
    """Whether a file of that name may say something of itself."""
    return kind_of_file(name) == "markdown"


def metadata_of(path: PurePath, mtime_ns: int) -> Metadata:
    """What every file has: its ending, and when it was changed, by the clock of this machine."""
    found: dict[str, tuple[str, ...]] = {}
    if ending := path.suffix.lower().removeprefix("."):
        found["ext"] = (ending,)
    with suppress(ValueError, OverflowError, OSError):  # a date that no calendar has
        modified = datetime.fromtimestamp(mtime_ns // 10**9).astimezone()
        found["modified"] = (modified.isoformat(),)
    return found


def own_metadata(path: PurePath, text: str) -> Metadata:
    """What a document says of itself. Raises BadInput with the reason."""
    return front_matter(text) if has_front_matter(path.name) else {}


def _number(text: str) -> float | None:
    with suppress(ValueError):
        number = float(text)
        return number if number == number else None
    return None
