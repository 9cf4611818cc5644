"""Sources of the package and of its tests, each parsed once for all tests that look at them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
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


@cache
def imports(source: str) -> tuple[str, ...]:
    """Absolute names that a source imports, at any depth of nesting; a file or what is in it."""
    names: list[str] = []
    for node in nodes(source):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += (f"{module}.{alias.name}" for alias in node.names)
    return tuple(names)


def file_of(name: str, files: Mapping[str, str]) -> str | None:
    """The file that an imported name of the package lies in."""
    parts = name.split(".")[1:]
    for n in range(len(parts), 0, -1):
        path = "/".join(parts[:n])
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if candidate in files:
                return candidate
    return None


def arrows(files: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(file, file that it imports) inside the package."""
    for path, source in files.items():
        for name in imports(source):
            if name.startswith("gguf_embed."):
                target = file_of(name, files)
                if target is not None and target != path:
                    yield path, target
