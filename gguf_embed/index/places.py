"""Where indexes are: by name in the user's data folder, or anywhere by path."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.system.files import printable
from gguf_embed.system.paths import data_home

POINTER = "index.json"  # in the folder of an index: which of its generations counts
_NAME = re.compile(r"[^\W_][\w.-]{0,99}")


def place_of(name: str) -> Path:
    """The folder of an index: `handbook` by name, `./handbook` or `handbook.index` by path."""
    if not name:
        raise BadOption("the name of the index is empty")
    if "/" in name or "\\" in name or name.endswith(".index"):
        return Path(name).absolute()
    if not _NAME.fullmatch(name):
        raise BadOption(
            f"{name!r} is no name for an index; use letters, digits, - and _, or a path such as "
            f"./{name}"
        )
    return indexes_home() / name


def existing(name: str) -> Path:
    """The folder of an index that is there. Raises BadInput, which names what is near."""
    place = place_of(name)
    if (place / POINTER).is_file():
        return place
    names = named_indexes()
    near = difflib.get_close_matches(name, names, n=3) or names[:5]
    known = f"; there are {', '.join(near)}" if near else ""
    raise BadInput(
        f"{name}: no index in {printable(place)}{known}; make it: gguf-embed index FOLDER -o {name}"
    )


def named_indexes() -> list[str]:
    """The names of the indexes in the data folder."""
    try:
        folders = sorted(indexes_home().iterdir())
    except OSError:
        return []
    return [folder.name for folder in folders if (folder / POINTER).is_file()]


def indexes_home() -> Path:
    """Where indexes with a name are."""
    return data_home() / "indexes"
