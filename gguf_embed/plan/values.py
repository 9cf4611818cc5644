"""Single values as a caller may give them, checked in one place: numbers and switches.

Those of numpy are taken too, and come out as Python's own.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from gguf_embed.errors import BadOption, shown


def check_number(
    name: str,
    value: object,
    *,
    least: int | None = None,
    most: int | None = None,
    may_be_open: bool = False,
) -> int:
    """A whole number, also one of numpy's. Raises BadOption."""
    # To Python a bool is an int.
    if isinstance(cast("Any", value), (int, np.integer)) and not isinstance(value, bool):
        number = int(cast("int", value))
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    limits = ("" if least is None else f" from {least}") + ("" if most is None else f" to {most}")
    raise BadOption(f"{name}={shown(value)}: pass a whole number{limits}{_or_not(may_be_open)}")


def check_switch(name: str, value: object, *, may_be_open: bool = False) -> bool:
    """True or False, also numpy's. Raises BadOption."""
    if isinstance(cast("Any", value), (bool, np.bool_)):
        return bool(value)
    raise BadOption(f"{name}={shown(value)}: pass True or False{_or_not(may_be_open)}")


def _or_not(may_be_open: bool) -> str:
    return ", or leave it out" if may_be_open else ""
