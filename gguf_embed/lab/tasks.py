"""What quality is measured on: passages, queries, and which passages answer which query.

How each task is made is told in docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from gguf_embed.errors import BadInput, BadOption


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
