"""A retrieval task without any download: find a docstring's body by its summary."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.lab.tasks import Task, limited

MIN_QUERY_WORDS, MAX_QUERY_WORDS = 4, 30
MIN_BODY_WORDS = 12
MAX_BODY_CHARS = 2000
SHINGLE_WORDS = 5
SAME_SHINGLES = 0.5  # share of the shorter body's shingles from which two bodies are one

_END_OF_SENTENCE = re.compile(r"\n\s*\n|(?<=[.!?])\s+(?=[A-Z])")

# Tests, demonstrations and copies of other projects say little of their own.
_SKIPPED = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two parts of one docstring: the summary that asks and the body that answers."""

    source: str  # "asyncio/tasks.py:432"
    summary: str
    body: str


def docstring_task(*, limit: int | None = None, packages: Sequence[str] = ()) -> Task:
    """Find a docstring's body by its summary, from the standard library and installed `packages`.

    The same Python version gives the same task. Raises BadInput where there is no source code,
    BadOption for a package that is not installed.
    """
    pairs = distinct(pair for root, path in _sources(packages) for pair in read_pairs(path, root))
    version = ".".join(map(str, sys.version_info[:3]))
    task = Task(
        name=" and ".join((f"docstrings of Python {version}", *packages)),
        passages=tuple(pair.body for pair in pairs),
        queries=tuple(pair.summary for pair in pairs),
        qrels=tuple({position: 1.0} for position in range(len(pairs))),
    )
    return task if limit is None else limited(task, limit)


def _sources(packages: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """(root, source file), sorted: of the standard library, then of each package."""
    root = Path(sysconfig.get_path("stdlib"))
    n_found = 0
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        for path in (root / f"{name}.py", *_below(root / name)):
            if path.is_file() and _SKIPPED.isdisjoint(path.relative_to(root).parts):
                n_found += 1
                yield root, path
    if not n_found:
        raise BadInput(
            f"{root}: no source code of the standard library there, so no built-in texts; "
            "name texts of your own with --texts"
        )
    for package in packages:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise BadOption(f"package {package!r} is not installed here, or is a single file")
        folder = Path(spec.submodule_search_locations[0])
        for path in _below(folder):
            if _SKIPPED.isdisjoint(path.relative_to(folder).parts):
                yield folder.parent, path


def _below(folder: Path) -> list[Path]:
    """Source files in order of their names, which is the same on every system."""
    return sorted(folder.rglob("*.py"), key=lambda path: path.as_posix())


def read_pairs(path: Path, root: Path) -> Iterator[Pair]:
    """The usable docstrings of a source file, by line; none where it is no Python for us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates, code for other versions
            return
    shown = path.relative_to(root).as_posix()
    docstrings: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            line = 1 if isinstance(node, ast.Module) else node.lineno
            docstrings.append((line, ast.get_docstring(node) or ""))
    for line, docstring in sorted(docstrings):
        if pair := split(docstring, f"{shown}:{line}"):
            yield pair


def split(docstring: str, source: str) -> Pair | None:
    """Summary (the first sentence, on one line) and body (the rest); None if not fit for a pair.

    The summary must be a sentence and no signature, the body long enough to answer, and it must
    not repeat the summary, or finding it would be a search for equal words.
    """
    first, *rest = _END_OF_SENTENCE.split(docstring, maxsplit=1)
    summary, body = " ".join(first.split()), _shorter("".join(rest).strip())
    n_summary = len(re.findall(r"[^\W\d_]{2,}", summary))
    n_body = len(re.findall(r"[^\W\d_]{2,}", body))
    if not (MIN_QUERY_WORDS <= n_summary <= MAX_QUERY_WORDS and n_body >= MIN_BODY_WORDS):
        return None
    if "->" in summary or re.match(r"[\w.]+\(", summary):
        return None
    if f" {' '.join(_words(summary))} " in f" {' '.join(_words(body))} ":
        return None
    if any("\ud800" <= character <= "\udfff" for character in docstring):
        return None
    return Pair(source=source, summary=summary, body=body)


def _shorter(body: str) -> str:
    """At most MAX_BODY_CHARS of it, cut between words."""
    if len(body) <= MAX_BODY_CHARS:
        return body
    return body[: MAX_BODY_CHARS + 1].rsplit(None, 1)[0]


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs without near-duplicates of an earlier one, in order.

    Two are near-duplicates if their summaries have the same words in the same order, or if at
    least half of the five-word shingles of the shorter body are in the other (case, punctuation
    and line ends aside): asynchronous twins, copied methods, inherited texts.
    """
    kept: list[Pair] = []
    n_shingles: list[int] = []
    having: dict[tuple[str, ...], list[int]] = defaultdict(list)  # shingle -> positions in kept
    summaries: set[tuple[str, ...]] = set()
    for pair in pairs:
        summary = tuple(_words(pair.summary))
        if summary in summaries:
            continue
        words = _words(pair.body)
        shingles = set(zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False))
        shared = Counter(position for s in shingles for position in having.get(s, ()))
        if any(
            n >= SAME_SHINGLES * min(len(shingles), n_shingles[position])
            for position, n in shared.items()
        ):
            continue
        for shingle in shingles:
            having[shingle].append(len(kept))
        summaries.add(summary)
        n_shingles.append(len(shingles))
        kept.append(pair)
    return kept


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
