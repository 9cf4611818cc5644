"""GGUF header reader: metadata and tensor table, without loading any weights."""

from __future__ import annotations

from enum import IntEnum


class Pooling(IntEnum):
    """How token vectors become one vector; numbers as in GGUF `{arch}.pooling_type`."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4
