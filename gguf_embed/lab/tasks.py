"""What quality is measured on: passages, queries, and which passages answer which query.

Three sources, none of which needs a network: docstrings of the standard library, made into a
retrieval task at run time (`docstring_task`); sentences in seven languages, written for this
project (`parallel_sentences`); folders and files of the caller's (`read_folder`, `join`), in the
format of BEIR and MTEB. How each is made is told in docs/evaluation.md.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import compress
from pathlib import Path
from typing import cast

import numpy as np

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.lab.metrics import rank
from gguf_embed.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Passages to search and queries to search them with.

    `qrels[i]` maps positions of passages to their relevance for query i, at least one of them
    above 0; None: which passages answer is not known.
    """

    name: str
    passages: tuple[str, ...]
    queries: tuple[str, ...]
    qrels: tuple[Mapping[int, float], ...] | None
    remarks: tuple[str, ...] = ()  # what was left out, for the reader of a report

    @property
    def sha256(self) -> str:
        """Fingerprint of passages, queries and qrels: equal ones make figures comparable."""
        judged = None if self.qrels is None else [sorted(row.items()) for row in self.qrels]
        content = json.dumps([self.passages, self.queries, judged], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def limited(task: Task, limit: int) -> Task:
    """At most `limit` passages and queries of a task, the same ones every time, in their order.

    Queries come first, with the passages that answer them; others fill up what is left. Raises
    BadOption where not even one query's passages fit.
    """
    if len(task.passages) <= limit and len(task.queries) <= limit:
        return task
    queries = _least(range(len(task.queries)), task.queries)[:limit]
    passages: set[int] = set()
    if task.qrels is not None:
        for n_taken, query in enumerate(queries):
            wanted = passages.union(task.qrels[query])
            if len(wanted) > limit:
                queries = queries[:n_taken]
                break
            passages = wanted
        if task.queries and not queries:
            raise BadOption(
                f"a limit of {limit} texts is too low for {task.name}: the passages judged for "
                "one query are more; raise it"
            )
    others = (i for i in range(len(task.passages)) if i not in passages)
    passages.update(_least(others, task.passages)[: limit - len(passages)])
    place = {old: new for new, old in enumerate(sorted(passages))}
    queries.sort()
    left = f"{len(place):,} of {len(task.passages):,} passages"
    left += f" and {len(queries):,} of {len(task.queries):,} queries" if task.queries else ""
    return replace(
        task,
        passages=tuple(task.passages[i] for i in place),
        queries=tuple(task.queries[i] for i in queries),
        qrels=None
        if task.qrels is None
        else tuple({place[p]: g for p, g in task.qrels[i].items()} for i in queries),
        remarks=(*task.remarks, f"a sample: {left}"),
    )


def _least(positions: Iterable[int], texts: Sequence[str]) -> list[int]:
    """Positions by the SHA-256 of their texts: an order that favours nothing and never changes."""
    return sorted(positions, key=lambda i: hashlib.sha256(texts[i].encode()).digest())


# ---------------------------------------------------------------------------------------------
# Docstrings

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


# ---------------------------------------------------------------------------------------------
# Sentences in seven languages


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Sentences with their translations: `sentences[language][i]` all say the same."""

    sentences: Mapping[str, tuple[str, ...]]  # by language code: en, zh, ar, hi, ru, es, de

    @property
    def texts(self) -> tuple[str, ...]:
        """All sentences, language after language."""
        return tuple(text for column in self.sentences.values() for text in column)


def parallel_sentences() -> Parallel:
    """The sentences that ship with this package (data/parallel.tsv)."""
    lines = (files("gguf_embed") / "data" / "parallel.tsv").read_text("utf-8").splitlines()
    languages, *rows = (line.split("\t") for line in lines)
    columns = zip(*rows, strict=True)
    return Parallel(sentences=dict(zip(languages, columns, strict=True)))


def matching_accuracy(vectors: Vectors, languages: Sequence[str]) -> dict[tuple[str, str], float]:
    """Accuracy@1 from each language to each other: how often the nearest sentence is the right one.

    `vectors` has shape (languages x sentences, dim), in the order of `Parallel.texts`.
    """
    of = dict(zip(languages, np.split(vectors, len(languages)), strict=True))
    right = np.arange(len(vectors) // len(languages))
    return {
        (a, b): float((rank(of[a], of[b], k=1)[:, 0] == right).mean())
        for a in languages
        for b in languages
        if a != b
    }


# ---------------------------------------------------------------------------------------------
# The caller's files, as BEIR and MTEB have them


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A passage or a query under the name that qrels know it by."""

    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One line of a qrels file."""

    query_id: str
    passage_id: str
    relevance: float
    line: int


def is_folder(path: Path) -> bool:
    """Whether a directory is a data set of that kind."""
    return (path / "corpus.jsonl").is_file()


def read_folder(path: Path) -> Task:
    """A data set on disk: corpus.jsonl, queries.jsonl, and qrels/test.tsv or qrels.tsv.

    Queries without a relevant passage are left out, as BEIR does: its files hold the queries of
    all splits. Raises BadInput.
    """
    candidates = (path / "qrels" / "test.tsv", path / "qrels.tsv")
    qrels = next((candidate for candidate in candidates if candidate.is_file()), None)
    if qrels is None:
        raise BadInput(
            f"{path}: has neither qrels/test.tsv nor qrels.tsv; add the one or the other"
        )
    return join(
        str(path),
        passages=read_jsonl(path / "corpus.jsonl"),
        queries=read_jsonl(path / "queries.jsonl"),
        qrels=read_qrels(qrels),
    )


def read_jsonl(path: Path) -> list[Text]:
    """The texts of a JSON-lines file: `text`, a `title` in front, `_id` or `id`, else the line.

    Raises BadInput with file and line.
    """
    texts: list[Text] = []
    for line, content in _lines(path):
        where = f"{path}, line {line}"
        try:
            row: object = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not JSON: {error}; one object per line is wanted") from error
        fields = cast("dict[str, object]", row) if isinstance(row, dict) else {}
        text, title = fields.get("text"), fields.get("title", "")
        name = fields.get("_id", fields.get("id", line))
        if not isinstance(text, str) or not isinstance(title, str):
            have = ", ".join(map(repr, fields)) or "none"
            raise BadInput(
                f"{where}: no field 'text' (and, if you like, 'title') with a text; "
                f'the fields are: {have}; write {{"_id": "...", "text": "..."}}'
            )
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise BadInput(f"{where}: the id {name!r} is neither a text nor a whole number")
        texts.append(Text(id=str(name), text=f"{title} {text}".strip()))
    return texts


def read_qrels(path: Path) -> list[Judgement]:
    """The judgements of a qrels file: query id, passage id, relevance, with tabs between them.

    A first line whose relevance is no number is a header. Raises BadInput with file and line.
    """
    judgements: list[Judgement] = []
    for line, content in _lines(path):
        cells = content.split("\t")
        relevance = _number(cells[2]) if len(cells) == 3 else None
        if relevance is not None:
            judgements.append(
                Judgement(query_id=cells[0], passage_id=cells[1], relevance=relevance, line=line)
            )
        elif line > 1 or len(cells) != 3:
            raise BadInput(
                f"{path}, line {line}: {content[:60]!r} is not query id, passage id and relevance "
                "(a number) with tabs between them"
            )
    return judgements


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with something on them, numbered from 1. Raises BadInput."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 ({error.reason}); convert it with iconv") from error


def join(
    name: str,
    *,
    passages: Sequence[Text],
    queries: Sequence[Text] = (),
    qrels: Sequence[Judgement] | None = None,
) -> Task:
    """Texts and judgements as a Task; blank texts are left out.

    Raises BadInput for ids that occur twice, for qrels that name ids which do not exist (all are
    counted, some named), and where nothing is left to measure.
    """
    remarks: list[str] = []
    place = _places(passages, "passages", name, remarks)
    asked = _places(queries, "queries", name, remarks)
    kept = [query for query in queries if query.text.strip()]
    judged: list[dict[int, float]] | None = None
    if not place:
        raise BadInput(f"{name}: no text to measure on; name files with texts in them")
    if qrels is not None:
        if not kept:
            raise BadInput(f"{name}: qrels without queries; name the queries too (--queries)")
        _check_ids(qrels, passages, queries, name)
        judged = [{} for _ in kept]
        for one in qrels:
            if one.query_id in asked and one.passage_id in place:
                judged[asked[one.query_id]][place[one.passage_id]] = one.relevance
        answered = [any(relevance > 0 for relevance in row.values()) for row in judged]
        if n_without := answered.count(False):
            remarks.append(f"queries without a relevant passage, left out: {n_without:,}")
        kept = list(compress(kept, answered))
        judged = list(compress(judged, answered))
        if not kept:
            raise BadInput(f"{name}: no query has a relevant passage; look at the qrels")
    return Task(
        name=name,
        passages=tuple(passage.text for passage in passages if passage.id in place),
        queries=tuple(query.text for query in kept),
        qrels=None if judged is None else tuple(judged),
        remarks=tuple(remarks),
    )


def _places(texts: Sequence[Text], kind: str, name: str, remarks: list[str]) -> dict[str, int]:
    """Position of each id among the texts that are not blank."""
    place: dict[str, int] = {}
    seen: set[str] = set()
    for text in texts:
        if text.id in seen:
            raise BadInput(f"{name}: two {kind} have the id {text.id!r}; ids must differ")
        seen.add(text.id)
        if text.text.strip():
            place[text.id] = len(place)
    if n_blank := len(texts) - len(place):
        remarks.append(f"blank {kind}, left out: {n_blank:,}")
    return place


def _check_ids(
    qrels: Sequence[Judgement], passages: Sequence[Text], queries: Sequence[Text], name: str
) -> None:
    """Refuse qrels that name what does not exist: the figures would be lower for no reason."""
    for kind, texts, ids in (
        ("queries", queries, [one.query_id for one in qrels]),
        ("passages", passages, [one.passage_id for one in qrels]),
    ):
        known = {text.id for text in texts}
        missing = [(one.line, id) for one, id in zip(qrels, ids, strict=True) if id not in known]
        if missing:
            shown = ", ".join(f"{id!r} (line {line})" for line, id in missing[:5])
            more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
            has = ", ".join(repr(text.id) for text in texts[:3])
            raise BadInput(
                f"{name}: {len(missing):,} of {len(qrels):,} qrels name {kind} that do not exist: "
                f"{shown}{more}; the ids of the {len(texts):,} {kind} are like {has}"
            )
