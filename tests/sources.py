"""Sources of the package and of its tests, each parsed once for all tests that look at them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gguf_embed"


@cache
def files() -> dict[str, str]:
    """Each source of the package by its path inside it, without the catalog's own."""
    paths = (path for path in PACKAGE.rglob("*.py") if path.parts[-2] != "models")
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in paths}


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a source, at any depth; the module is the first."""
    return tuple(ast.walk(ast.parse(source)))
