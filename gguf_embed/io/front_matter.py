"""The front matter of Markdown: YAML between two lines of dashes at its top.

---
lang: en
tags: [travel, trains]
---
# Travel
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias, cast

from gguf_embed.errors import BadInput

Metadata: TypeAlias = Mapping[str, tuple[str, ...]]

MOST_CHARACTERS: Final = 1 << 16  # what ends later is no front matter
_BEGIN: Final = re.compile(r"---[ \t]*\n")
_END: Final = re.compile(r"^(?:---|\.\.\.)[ \t]*$", re.MULTILINE)


def front_matter(text: str) -> Metadata:
    """The values by their keys in lower case; empty where a text has none.

    A value is a string, or a list of them; what is nested deeper is passed over. Values stay as
    they are written, for YAML would read `no` as false and `1.10` as 1.1. Raises BadInput with the
    reason for what is no YAML.
    """
    begin = _BEGIN.match(text)
    end = _END.search(text, begin.end(), MOST_CHARACTERS) if begin else None
    if begin is None or end is None:
        return {}
    loaded = _loaded(text[begin.end() : end.start()])
    if not isinstance(loaded, dict):  # prose between two rules
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for key, value in cast("dict[object, object]", loaded).items():
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        said = tuple(each.strip() for each in values if isinstance(each, str) and each.strip())
        if isinstance(key, str) and key.strip() and said:
            found[key.strip().casefold()] = said
    return found


def _loaded(source: str) -> object:
    import yaml

    # BaseLoader makes strings of all values and runs nothing; the one in C is ten times as fast.
    loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        return yaml.load(source, loader)
    except RecursionError as error:
        raise BadInput("its front matter is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        mark: Any = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 2}: "
        reason = getattr(error, "problem", None) or type(error).__name__
        raise BadInput(f"{line}its front matter is no YAML: {reason}") from error
