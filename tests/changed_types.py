"""Checks the types of the files that may have changed since they were last right.

    python tests/changed_types.py

A file's types depend on what it says, on the interfaces of what it imports, at any depth, and on
what is installed. Where all of that is as it was when pyright passed, it is not asked again: it
takes half a minute for the whole package and some seconds for what a change touches. `make test`
asks for all.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import sources

ROOT = Path(__file__).parents[1]
RIGHT = ROOT / "build" / "types.json"  # for each file the keys with which its types were right
N_KEPT = 9  # keys of a file, so that one can go back and forth
FACE = "__init__.py"  # whose names are imported from the package itself


def interface(source: str) -> str:
    """What others can see of a source: bodies of functions that say what they return are left out.

    Those that set attributes stay, since the types of attributes may come from there.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            inside = ast.walk(ast.Module(body=node.body, type_ignores=[]))
            if not any(
                isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) for n in inside
            ):
                node.body = []
    return ast.dump(tree)


def _sets_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def keys(files: Mapping[str, str], ground: str) -> dict[str, str]:
    """What the types of each file of a package depend on, as a hash; `ground` is what all do."""
    imports: defaultdict[str, set[str]] = defaultdict(set)
    for path, target in sources.arrows(files):
        imports[path].add(target)
    for path, source in files.items():
        names = [name for name in sources.imports(source) if name.startswith("gguf_embed.")]
        if any(sources.file_of(name, files) is None for name in names):
            imports[path].add(FACE)

    seen_from = {path: interface(source) for path, source in files.items()}

    def key(path: str) -> str:
        seen, waiting = {path}, [path]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        parts = [part for each in sorted(seen) for part in (each, seen_from.get(each, ""))]
        return hashlib.sha256("\0".join([ground, files[path], *parts]).encode()).hexdigest()

    return {path: key(path) for path in files}


def kept() -> dict[str, list[str]]:
    """The keys of earlier times, newest first; none where there were no such times."""
    try:
        return dict(json.loads(RIGHT.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def main() -> int:
    """Pyright's exit code."""
    installed = sorted(f"{each.name} {each.version}" for each in metadata.distributions())
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    now = keys(sources.files(), "\n".join([sys.version, settings, *installed]))
    before = kept()
    changed = sorted(path for path, key in now.items() if key not in before.get(path, []))
    print(f"types: {len(changed)} of {len(now)} files to look at", flush=True)
    if not changed:
        return 0
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    command += [str(sources.PACKAGE / path) for path in changed]
    # With room for young objects, pyright spends a tenth less on clearing them away.
    environment = os.environ | {"NODE_OPTIONS": "--max-semi-space-size=128"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code == 0:
        RIGHT.parent.mkdir(exist_ok=True)
        newest = {path: dict.fromkeys([key, *before.get(path, [])]) for path, key in now.items()}
        right = {path: [*each][:N_KEPT] for path, each in newest.items()}
        RIGHT.write_text(json.dumps(right), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
