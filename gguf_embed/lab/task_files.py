"""The caller's own texts, queries and qrels, also in folders as BEIR and MTEB have them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.io.lines import json_objects, text_lines
from gguf_embed.io.read import read
from gguf_embed.io.record import Reading
from gguf_embed.io.sources import find
from gguf_embed.lab.docstrings import docstring_task
from gguf_embed.lab.tasks import Judgement, Task, Text, join


def read_task(texts: Path | None, queries: Path | None, qrels: Path | None) -> Task:
    """The caller's texts, or the docstrings where there are none; blank texts are left out.

    `texts` may be a folder as BEIR has it. Ids are those of JSON lines, else line numbers.
    Raises BadInput or BadOption.
    """
    if texts is None:
        if queries or qrels:
            raise BadOption("queries or qrels without texts; name the texts as well (--texts)")
        return docstring_task()
    if is_folder(texts):
        if queries or qrels:
            raise BadOption(f"{texts} has its own queries and qrels; leave out --queries, --qrels")
        return read_folder(texts)
    return join(
        str(texts),
        passages=_read(texts),
        queries=() if queries is None else _read(queries),
        qrels=None if qrels is None else read_qrels(qrels),
    )


def _read(path: Path) -> list[Text]:
    if path.suffix.lower() == ".jsonl":
        return read_jsonl(path)
    sources = find([str(path)])
    records = read(sources, Reading(), stdin=sys.stdin.buffer if sys.stdin else None)
    alone = len(sources) == 1
    return [Text(id=str(r.position) if alone else r.id, text=r.text) for r in records]


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
    for line, fields in json_objects(path):
        where = f"{path}, line {line}"
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
    for line, content in text_lines(path):
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
