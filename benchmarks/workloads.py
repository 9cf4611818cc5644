"""Texts for benchmarks that need no download: English from the docstrings that Python carries.

The sources are the standard library and two packages that this project depends on (numpy,
huggingface_hub), read as text, never imported. The order is a shuffle with a fixed seed, so a
workload is the same for the same versions; `Workload.sha256` tells whether two runs had the
same texts. Every text of a workload is a different one: deduplication must not look like speed.

| workload | texts |
|---|---|
| mixed | docstrings of at least 60 characters, cut at 512 tokens; about 110 tokens on average |
| queries | summary lines of 4 to 16 words, with the Qwen web-search instruction as prompt |
| long | docstrings joined to documents of 2,000 to 8,000 tokens |
| tiny | two or three words |
| single | summary lines without prompt, embedded one call at a time, for latency |
| single-query | the same with the instruction |
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SEED = 20261101
MIN_CHARS = 60
MAX_TOKENS = 512
LONG_TOKENS = (2_000, 8_000)
PACKAGES = ("numpy", "huggingface_hub")
# Test suites say little; the others are copies of code that is elsewhere.
SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages"}
WEB_SEARCH = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)

CountTokens = Callable[[str], int]  # tokens of a text, special tokens included


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What to embed: `prompt` + each of `texts`; `one_by_one`: a call per text, for latency."""

    name: str
    texts: tuple[str, ...]
    prompt: str = ""
    one_by_one: bool = False

    @property
    def sha256(self) -> str:
        """Fingerprint of prompt and texts, in order."""
        return hashlib.sha256("\0".join((self.prompt, *self.texts)).encode()).hexdigest()


def make(name: str, n: int, count_tokens: CountTokens) -> Workload:
    """The first `n` texts of workload `name`; `count_tokens` is the tokenizer that limits are in.

    Raises ValueError if there are not as many different texts.
    """
    return Workload(
        name=name,
        texts=tuple(_take(_MAKERS[name](count_tokens), n, name)),
        prompt=WEB_SEARCH if name in ("queries", "single-query") else "",
        one_by_one=name.startswith("single"),
    )


def _take(texts: Iterator[str], n: int, name: str) -> list[str]:
    taken: dict[str, None] = {}
    for text in texts:
        if len(taken) == n:
            break
        taken[text] = None
    if len(taken) < n:
        raise ValueError(f"workload {name}: {len(taken)} different texts, {n} wanted; ask for less")
    return list(taken)


def cut(text: str, max_tokens: int, count_tokens: CountTokens) -> str:
    """The longest run of leading words of `text` that is at most `max_tokens` tokens."""
    if count_tokens(text) <= max_tokens:
        return text
    words = text.split(" ")
    low, high = 0, len(words)  # words[:low] fits, words[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens(" ".join(words[:middle])) <= max_tokens:
            low = middle
        else:
            high = middle
    return " ".join(words[:low])


def _mixed(count_tokens: CountTokens) -> Iterator[str]:
    for text in docstrings():
        if len(text) >= MIN_CHARS:
            yield cut(text, MAX_TOKENS, count_tokens)


def _summaries(_: CountTokens) -> Iterator[str]:
    for text in docstrings():
        line = text.partition("\n")[0].strip().rstrip(".")
        if 4 <= len(line.split()) <= 16:
            yield line


def _long(count_tokens: CountTokens) -> Iterator[str]:
    rng = random.Random(SEED)
    parts: list[str] = []
    n_tokens, target = 0, rng.randint(*LONG_TOKENS)
    while True:  # there is no end to different joins
        for text in rng.sample(docstrings(), len(docstrings())):
            parts.append(text)
            n_tokens += count_tokens(text)
            if n_tokens >= target:
                yield cut("\n\n".join(parts), target, count_tokens)
                parts, n_tokens, target = [], 0, rng.randint(*LONG_TOKENS)


def _tiny(_: CountTokens) -> Iterator[str]:
    rng = random.Random(SEED)
    words = sorted({w for text in docstrings() for w in text.split() if w.isalpha()})
    while True:
        yield " ".join(rng.choices(words, k=rng.randint(2, 3)))


_MAKERS: dict[str, Callable[[CountTokens], Iterator[str]]] = {
    "mixed": _mixed,
    "queries": _summaries,
    "long": _long,
    "tiny": _tiny,
    "single": _summaries,
    "single-query": _summaries,
}
NAMES = tuple(_MAKERS)


@cache
def docstrings() -> Sequence[str]:
    """Every different docstring of the sources, shuffled; about 10,000."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"package {package} is not installed; pip install {package}")
        roots.append(Path(spec.submodule_search_locations[0]))
    found = sorted({text for root in roots for text in docstrings_below(root)})
    random.Random(SEED).shuffle(found)
    return found


def docstrings_below(root: Path) -> Iterator[str]:
    for path in root.rglob("*.py"):
        if not SKIPPED.isdisjoint(path.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # templates and code for other versions
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and text.isascii():  # English; also keeps lone surrogates out
                    yield text
