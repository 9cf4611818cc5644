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
from collections.abc import Mapping
from dataclasses import dataclass
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
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            sets = any(map(_sets_attribute, ast.walk(node)))
            node.body = node.body if sets or node.returns is None else []
    return ast.dump(tree)


def _sets_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a source shows to others."""

    interface: str  # as a hash
    imports: tuple[str, ...]  # names of this package

    @classmethod
    def of(cls, source: str) -> Seen:
        """Parses it."""
        names = (name for name in sources.imports(source) if name.startswith("gguf_embed."))
        return cls(interface=_hash(interface(source)), imports=tuple(names))


def keys(files: Mapping[str, str], ground: str, known: dict[str, Seen]) -> dict[str, str]:
    """What the types of each file of a package depend on, as a hash; `ground` is what all do.

    `known` is what sources showed before, by their hashes; it becomes what they show now.
    """
    hashes = {path: _hash(source) for path, source in files.items()}
    shown = {
        content: known.get(content) or Seen.of(files[path]) for path, content in hashes.items()
    }
    known.clear()
    known.update(shown)
    imports = {
        path: {sources.file_of(name, files) or FACE for name in shown[content].imports}
        for path, content in hashes.items()
    }

    def key(path: str) -> str:
        reached, waiting = {path}, [path]
        while waiting:
            more = imports.get(waiting.pop(), set()) - reached
            reached |= more
            waiting += more
        there = sorted(reached & files.keys())
        parts = [f"{each} {shown[hashes[each]].interface}" for each in there]
        return _hash("\n".join([ground, hashes[path], *parts]))

    return {path: key(path) for path in files}


def kept() -> tuple[dict[str, list[str]], dict[str, Seen]]:
    """The keys of earlier times, newest first, and what was seen then; nothing the first time."""
    try:
        said = json.loads(RIGHT.read_text("utf-8"))
        seen = {name: Seen(each[0], tuple(each[1])) for name, each in said["seen"].items()}
        return dict(said["right"]), seen
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return {}, {}


def main() -> int:
    """Pyright's exit code."""
    installed = sorted(f"{each.name} {each.version}" for each in metadata.distributions())
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    before, known = kept()
    now = keys(sources.files(), "\n".join([sys.version, settings, *installed]), known)
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
        seen = {name: [each.interface, each.imports] for name, each in known.items()}
        RIGHT.write_text(json.dumps({"right": right, "seen": seen}), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
