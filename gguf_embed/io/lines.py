"""Lines and JSON objects of a file, numbered, for what is no list of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from gguf_embed.errors import BadInput
from gguf_embed.io.read import read
from gguf_embed.io.record import Reading
from gguf_embed.io.sources import TextSource
from gguf_embed.system.files import printable


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with something on them, numbered from 1. Raises BadInput with file, line and byte."""
    source = TextSource(name=printable(path), path=path, kind=".txt", n_bytes=None)
    for record in read([source], Reading()):
        if record.text.strip():
            yield record.position, record.text


def json_objects(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The object on each such line. Raises BadInput with file and line."""
    for number, line in text_lines(path):
        yield number, json_object(line, f"{printable(path)}, line {number}")


def json_object(line: str, where: str) -> Mapping[str, object]:
    """The object that a line holds. Raises BadInput."""
    try:
        row: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {error}; one object per line is wanted") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where}: holds no object with fields; one object per line is wanted")
    return cast("dict[str, object]", row)
