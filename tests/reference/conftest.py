"""Tests marked `reference` need torch and transformers: they run with `-m reference` only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tiny` and `reference.make_reference`


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reference: compares with transformers, live (needs torch)")
    if not config.option.markexpr:
        config.option.markexpr = "not reference"
