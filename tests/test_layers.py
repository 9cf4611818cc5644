"""The order below is the architecture: a module may import only from rows above its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gguf_embed"

LAYERS = (
    {"errors", "paths", "normalizer", "closing"},
    {"pooling"},
    {"gguf"},
    {"schedule", "layout", "passages", "wordpiece", "imatrix", "canaries"},
    {"catalog", "llama"},
    {"selftest", "hardware", "store", "tokenizer"},
    {"measured"},
    {"metrics"},
    {"plan", "hub", "runner", "wheels"},
    {"tune"},
    {"choice"},
    {"engine"},
    {"formats", "quantize", "compare", "bundle", "evaluation"},
    {"judge"},
    {"bench"},
    {"report"},
    {"plots"},
    {"cli", "integrations"},
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# The package itself shows the engine lazily; running it is running the command line.
DEPTH |= {"__init__": len(LAYERS), "__main__": len(LAYERS)}

# Packages with one door, and imports that count as work done (a native library, the network).
ONLY_IN = {
    "llama_cpp": "llama.py",
    "huggingface_hub": "hub.py",
    "rich": "cli/console.py",
    "matplotlib": "plots.py",
    "mteb": "integrations/mteb.py",
}


def imports(source: str) -> Iterator[str]:
    """Absolute names of the modules that a source imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            if module == "gguf_embed":
                yield from (f"gguf_embed.{alias.name}" for alias in node.names)


def faults(path: str, source: str) -> list[str]:
    """What the imports of a module break, given its path inside the package."""
    own = path.split("/")[0].removesuffix(".py")
    if own not in DEPTH:
        return [f"{path}: {own} has no row in LAYERS"]
    found: list[str] = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        module = rest.split(".")[0]
        if top == "":
            found.append(f"{path}: relative import of {name}")
        elif top == "gguf_embed" and module in DEPTH and module != own:
            if DEPTH[module] >= DEPTH[own]:
                found.append(f"{path} imports {module}, which is not above it")
        elif top == "gguf_embed" and module not in {"", own, "__version__"}:
            found.append(f"{path} imports {module}, which has no row in LAYERS")
        elif ONLY_IN.get(top, path) != path:
            found.append(f"{path} imports {top}, which only {ONLY_IN[top]} may")
    return found


MODULES = sorted(str(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", [path for path in MODULES if not path.startswith("models/")])
def test_imports_point_up(path: str):
    assert faults(path, (PACKAGE / path).read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("gguf.py", "from gguf_embed.engine import Embedder", "imports engine"),
        ("gguf.py", "def f():\n    from gguf_embed import engine", "imports engine"),
        ("gguf.py", "if TYPE_CHECKING:\n    import gguf_embed.llama", "imports llama"),
        ("layout.py", "from gguf_embed import schedule", "imports schedule"),  # the same row
        ("engine.py", "from gguf_embed.cli import main", "imports cli"),
        ("engine.py", "from gguf_embed import nothing", "nothing, which has no row"),
        ("novel.py", "", "novel has no row"),
        ("engine.py", "from . import llama", "relative import"),
        ("engine.py", "from .llama import Model", "relative import"),
        ("engine.py", "import llama_cpp", "only llama.py"),
        ("cli/embed.py", "from rich.table import Table", "only cli/console.py"),
        ("store.py", "import huggingface_hub.constants", "only hub.py"),
    ],
)
def test_a_planted_import_is_caught(path: str, source: str, fault: str):
    (found,) = faults(path, source)
    assert fault in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine.py", "from gguf_embed import __version__, llama"),
        ("cli/embed.py", "from gguf_embed.cli import console\nfrom gguf_embed.cli.flow import F"),
        ("cli/console.py", "import rich.progress"),
        ("llama.py", "from llama_cpp import llama_cpp"),
    ],
)
def test_an_import_that_is_allowed_is_let_through(path: str, source: str):
    assert faults(path, source) == []


@pytest.mark.parametrize("module", ["gguf_embed", "gguf_embed.cli", "gguf_embed.cli.embed"])
def test_importing_does_nothing(module: str):
    """No native library, no network client, nothing slow; no environment variable is made."""
    code = f"""
import os, sys
before = dict(os.environ)
import {module}
heavy = {{"llama_cpp", "huggingface_hub", "numpy", "psutil", "rich", "socket", "ssl", "ctypes"}}
print(sorted(heavy & sys.modules.keys()), dict(os.environ) == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


def test_importing_the_engine_opens_no_native_library():
    code = "import sys, gguf_embed.engine; print({'llama_cpp', 'huggingface_hub'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
