"""Libraries that an extra brings, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from gguf_embed.errors import BadInput

INSTALL = "pip install 'gguf-embed[arrow]'"


def import_pyarrow(name: str) -> Any:
    """pyarrow, which reads and writes `name`. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise BadInput(f"{name}: takes pyarrow: {INSTALL}") from error
