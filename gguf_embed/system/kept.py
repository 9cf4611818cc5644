"""What we learned and keep in a file of JSON. What is not right in it counts as absent.

    runs = read_kept(path, tuple[MeasuredRun, ...])  # None: absent, damaged, or not of that shape
    keep(path, runs)

A shape is a type: text, numbers, true or false, None, Literal, lists as tuples, objects as mappings
from text or as dataclasses. A dataclass may refuse values in its `__post_init__` with ValueError.
"""

from __future__ import annotations

import json
import logging
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from gguf_embed.errors import OutputFailed
from gguf_embed.system.files import printable, write_whole

_log = logging.getLogger(__name__)

T = TypeVar("T")


def read_kept(path: Path, shape: type[T]) -> T | None:
    """What is kept there; None where there is nothing of that shape. Raises nothing."""
    try:
        return check_kept(path, shape)
    except ValueError as error:
        _log.info("%s: passed over, and measured anew: %s", printable(path), error)
        return None


def check_kept(path: Path, shape: type[T]) -> T | None:
    """What is kept there, None where nothing is; raises ValueError where it is not right."""
    try:
        value: object = json.loads(path.read_text("utf-8"), parse_constant=_refuse)
        return cast("T", _read(value, shape, "the whole"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def keep(path: Path, value: object) -> bool:
    """Keep the value; where it cannot be written the log says so, and False comes back."""
    try:
        text = json.dumps(value, default=_plain, indent=1, allow_nan=False)
        write_whole(path, text + "\n", make_folder=True)
    except (OutputFailed, ValueError) as error:
        _log.info("not kept: %s", error)
        return False
    return True


def remove_damaged(folder: Path, *shapes: Any) -> list[Path]:
    """Remove the JSON files of a folder that are of none of these shapes; returns them."""
    removed: list[Path] = []
    with suppress(OSError):
        for path in sorted(folder.glob("*.json")):
            if not any(_fits(path, shape) for shape in shapes):
                path.unlink()
                removed.append(path)
    return removed


def _fits(path: Path, shape: Any) -> bool:
    try:
        check_kept(path, shape)
    except ValueError:
        return False
    return True


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise ValueError(f"a {type(value).__name__} cannot be kept")


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _read(value: object, shape: Any, where: str) -> object:
    """The value as that shape; raises ValueError."""
    origin, arguments = get_origin(shape), get_args(shape)
    if origin is Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
    elif origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return _read(value, choice, where)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list):
        return tuple(
            _read(item, arguments[0], f"{where}[{i}]")
            for i, item in enumerate(cast("list[object]", value))
        )
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return {key: _read(item, arguments[1], f"{where}.{key}") for key, item in items}
    elif is_dataclass(shape) and isinstance(value, dict):
        return _record(cast("dict[str, object]", value), cast("type", shape), where)
    elif shape is float and isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number of hundreds of digits
            if math.isfinite(value):
                return float(value)
    elif shape in (str, int, bool, types.NoneType) and type(value) is shape:
        return value
    raise ValueError(f"{where} is not as it should be")


def _record(given: dict[str, object], shape: type, where: str) -> object:
    hints = get_type_hints(shape)
    known = {field.name: field for field in fields(shape)}
    if unknown := given.keys() - known.keys():
        raise ValueError(f"{where} has the unknown key {min(unknown)!r}")
    for name, field in known.items():
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and name not in given:
            raise ValueError(f"{where} lacks {name!r}")
    return shape(
        **{name: _read(value, hints[name], f"{where}.{name}") for name, value in given.items()}
    )
