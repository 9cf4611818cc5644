"""The rooms below are the architecture: a room may import only from rooms above its own.

`pytest -s -k import_table` prints the rooms with their files, lines and arrows.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping

import changed_types
import pytest
from sources import arrows, file_of, files, imports

# From the top. Each has its rule in the docstring of its __init__.py.
ROOMS = (
    *("ground", "system", "gguf", "catalog", "native", "store", "io", "machine", "plan"),
    *("engine", "lab", "bundle", "jobs", "index", "server", "integrations", "cli"),
)
DEPTH = {room: depth for depth, room in enumerate(ROOMS)}
GROUND = {"errors.py", "vectors.py"}  # words that everyone uses
FACES = {"integrations", "cli"}  # nobody imports them
FRONT = {"__init__.py", "__main__.py", "testing.py"}  # the package itself may import everything

# Packages with one door.
ONLY_IN = {
    "llama_cpp": "native/",
    "huggingface_hub": "store/",
    "rich": "cli/console.py",
    "argcomplete": "cli/completion.py",
    "matplotlib": "lab/plots.py",
    "chromadb": "integrations/chroma.py",
    "haystack": "integrations/haystack.py",
    "lancedb": "io/lance.py",
    "langchain_core": "integrations/langchain.py",
    "llama_index": "integrations/llama_index.py",
    "llm": "integrations/llm.py",
    "mteb": "integrations/mteb.py",
    "ray": ("integrations/ray.py", "jobs/ray_"),
    "txtai": "integrations/txtai.py",
    "starlette": "server/",
    "msgspec": "server/",
    "orjson": "server/",
    "prometheus_client": "server/meters.py",
    "pypdf": "io/documents.py",
    "yaml": "io/front_matter.py",
    "watchfiles": "index/watch.py",
    "mcp": "server/agents.py",
    "mcp_types": "server/agents.py",
}

MAX_LINES = 400
# Longer files, each with its reason.
LONG: Mapping[str, str] = {}


def room_of(path: str) -> str:
    """The room of a file, given its path inside the package."""
    first, slash, _ = path.partition("/")
    return first if slash else "ground" if path in GROUND else "front" if path in FRONT else path


def faults(files: Mapping[str, str]) -> list[str]:
    """What the files of a package, by path, break of the architecture."""
    found: list[str] = []
    for path, source in files.items():
        own = room_of(path)
        if own not in DEPTH and own != "front":
            found.append(f"{path}: {own} is no room")
        n_lines = source.count("\n")
        if n_lines > MAX_LINES and path not in LONG:
            found.append(f"{path} has {n_lines} lines, more than {MAX_LINES}, and no reason")
        for name in imports(source):
            top = name.split(".")[0]
            if name.startswith("."):
                found.append(f"{path}: relative import of {name}")
            elif top == "gguf_embed" and file_of(name, files) is None:
                if name not in ("gguf_embed.__version__", "gguf_embed"):
                    found.append(f"{path} imports {name}, which is not there")
            elif top in ONLY_IN and not path.startswith(ONLY_IN[top]):
                found.append(f"{path} imports {top}, which only {ONLY_IN[top]} may")
    for path, target in arrows(files):
        own, other = room_of(path), room_of(target)
        if own == "front" or own not in DEPTH:
            continue
        if other == "front":
            found.append(f"{path} imports the front, {target}")
        elif own != other and (other in FACES or DEPTH.get(other, -1) >= DEPTH[own]):
            found.append(f"{path} imports {target}, which is not above it")
    return found + [f"a circle: {' -> '.join(circle)}" for circle in circles(files)]


def circles(files: Mapping[str, str]) -> list[list[str]]:
    """One circle of imports for each file that is first met inside one."""
    targets: dict[str, list[str]] = {path: [] for path in files}
    for path, target in arrows(files):
        if room_of(path) == room_of(target):
            targets[path].append(target)
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(path: str, trail: list[str]) -> None:
        if path in trail:
            found.append([*trail[trail.index(path) :], path])
        elif path not in done:
            for target in targets[path]:
                visit(target, [*trail, path])
            done.add(path)

    for path in targets:
        visit(path, [])
    return found


FILES = files()


def test_the_house_stands():
    assert faults(FILES) == []


def test_every_reason_for_a_long_file_is_needed():
    assert [path for path in LONG if FILES.get(path, "").count("\n") <= MAX_LINES] == []


def test_every_room_says_its_rule():
    for path, source in FILES.items():
        if path.count("/") == 1 and path.endswith("/__init__.py"):
            assert ast.get_docstring(ast.parse(source)), f"{path} does not say its room's rule"


def test_the_import_table():
    """Printed with `-s`: rooms, files, lines, largest file, and rooms that each one imports."""
    between = Counter({(room_of(a), room_of(b)) for a, b in arrows(FILES)})
    print(f"\n{'room':13}{'files':>6}{'lines':>7}  {'largest file':29}imports")
    for room in (*ROOMS, "front"):
        lines = {path: text.count("\n") for path, text in FILES.items() if room_of(path) == room}
        if lines:
            largest = max(lines, key=lines.__getitem__)
            shown = f"{largest.rpartition('/')[2]} {lines[largest]}"
            others = [other for other in ROOMS if (room, other) in between and other != room]
            print(f"{room:13}{len(lines):6}{sum(lines.values()):7}  {shown:29}{' '.join(others)}")
            assert all(DEPTH[other] < DEPTH.get(room, len(ROOMS)) for other in others)


HOUSE = {
    "errors.py": "",
    "system/files.py": "",
    "gguf/header.py": "from gguf_embed.errors import BadInput",
    "gguf/check.py": "from gguf_embed.gguf.header import Header",
    "engine/embedder.py": "from gguf_embed import __version__",
    "cli/embed.py": "from gguf_embed.cli import console",
    "cli/console.py": "import rich.progress",
}


def test_a_house_without_faults():
    assert faults(HOUSE) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("gguf/header.py", "from gguf_embed.engine.embedder import Embedder", "not above it"),
        ("gguf/header.py", "def f():\n    from gguf_embed.engine import embedder", "not above it"),
        ("gguf/header.py", "if TYPE_CHECKING:\n    import gguf_embed.cli.embed", "not above it"),
        ("engine/embedder.py", "from gguf_embed.cli import console", "not above it"),
        ("cli/embed.py", "from gguf_embed.engine import nothing", "nothing, which is not there"),
        ("novel.py", "", "novel.py is no room"),
        ("attic/trunk.py", "", "attic is no room"),
        ("engine/embedder.py", "from . import runner", "relative import"),
        ("engine/embedder.py", "import llama_cpp", "only native/"),
        ("cli/embed.py", "from rich.table import Table", "only cli/console.py"),
        ("gguf/header.py", "from gguf_embed.gguf.check import f", "a circle"),
        ("errors.py", "x = 1\n" * 401, "401 lines"),
    ],
)
def test_a_planted_fault_is_caught(path: str, source: str, fault: str):
    (found,) = faults({**HOUSE, path: source})
    assert fault in found


@pytest.mark.slow
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


# What `gguf-embed --help` imports of the package.
HELPERS = {"commands", "console", "exits", "layout", "start", "stop"}


@pytest.mark.slow
@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_imports_no_command(word: str):
    """Nor what takes milliseconds of the standard library, nor anybody else's code."""
    code = f"""
import sys
known = {{*sys.modules}}
sys.argv = ["gguf-embed", {word!r}]
from gguf_embed.cli import main
try:
    main()
finally:
    print(*sorted({{*sys.modules}} - known), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    imported = {*done.stderr.split()}
    ours = {name for name in imported if name.startswith("gguf_embed")}
    assert ours == {
        *("gguf_embed", "gguf_embed.cli", "gguf_embed.errors"),
        *(f"gguf_embed.cli.{name}" for name in HELPERS),
    }
    others = {name.partition(".")[0] for name in imported - ours}
    assert others <= sys.stdlib_module_names
    assert not others & {"pathlib", "logging", "json", "shutil", "urllib", "inspect", "dataclasses"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", "parser().format_help()"])
def test_nobody_elses_code_is_imported_before_it_is_needed(command: str):
    """Neither a library that is needed later nor a partner: help comes at once."""
    code = f"""
import sys
known = {{*sys.modules}}
import gguf_embed
if {command!r}:
    from gguf_embed.cli import parser
    {command or "pass"}
new = {{name.partition(".")[0] for name in {{*sys.modules}} - known}}
print(sorted(new - sys.stdlib_module_names), "importlib.metadata" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['gguf_embed'] False\n"


@pytest.mark.slow
def test_importing_the_engine_opens_no_native_library():
    code = (
        "import sys, gguf_embed.engine.embedder; "
        "print({'llama_cpp', 'huggingface_hub'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_types_are_looked_at_again_where_they_may_have_changed():
    files = {
        "errors.py": "x = 1",
        "low.py": "from gguf_embed.errors import x",
        "high.py": "from gguf_embed import low",
        "face.py": "from gguf_embed import Embedder",
        "apart.py": "import json",
        "__init__.py": "from gguf_embed.low import x",
    }
    known: dict[str, changed_types.Seen] = {}
    before = changed_types.keys(files, "python 3", known)

    def changed(path: str, source: str) -> set[str]:
        now = changed_types.keys({**files, path: source}, "python 3", known)
        return {path for path, key in now.items() if before[path] != key}

    assert changed("errors.py", "x = ''") == set(files) - {"apart.py"}
    assert changed("high.py", files["high.py"] + "  # and no other") == {"high.py"}
    assert changed("low.py", "x = ''") == {"low.py", "high.py", "face.py", "__init__.py"}
    assert changed("apart.py", "import re") == {"apart.py"}
    assert set(changed_types.keys(files, "python 4", known).values()).isdisjoint(before.values())


def test_others_see_no_more_than_the_interface():
    def interface(body: str) -> str:
        return changed_types.interface(f"class A:\n    def f(self) -> int:\n        {body}")

    assert interface("return 1") == interface('"""Doc."""; x = 2; return x')
    assert interface("self.x = 1; return 1") != interface("self.x = 2; return 1")
    inferred = changed_types.interface("def f(): return 1")
    assert inferred != changed_types.interface("def f(): return ''")
