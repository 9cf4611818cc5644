"""An index that is open for questions. It sees what an update has finished, and never a half.

with Index.open("handbook") as index, Embedder.open(index.facts.space.model) as embedder:
    for hit in index.search("how do refunds work?", embedder, top=5):
        print(hit.score, hit.path, hit.passage.first_line, hit.passage.text)
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from gguf_embed.errors import BadInput, BadOption, TextTooLong
from gguf_embed.index.duplicates import near_groups
from gguf_embed.index.facts import (
    Folder,
    IndexFacts,
    IndexStatus,
    KnownFile,
    Passage,
    Ranking,
    short_id,
)
from gguf_embed.index.generations import (
    generation_folder,
    open_parts,
    read_facts,
    read_pointer,
    vectors_of,
)
from gguf_embed.index.metadata import files_that_hold, parse_conditions
from gguf_embed.index.passages import lines_of
from gguf_embed.index.places import existing
from gguf_embed.index.ranking import Scored, bonus_of, by_meaning, by_words, fused
from gguf_embed.index.rows import digests_between
from gguf_embed.index.snapshot import Snapshot
from gguf_embed.index.tables import Tables
from gguf_embed.index.vector_file import joined
from gguf_embed.io.record import check_unicode
from gguf_embed.system.closing import Closes
from gguf_embed.system.files import printable
from gguf_embed.vectors import Vectors

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder

RANKINGS: Final[tuple[Ranking, ...]] = ("both", "meaning", "words")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A passage that answers a question."""

    id: str
    path: Path
    folder: Folder
    passage: Passage
    score: float
    similarity: float | None  # the cosine; None where only words were asked for
    words: float | None  # BM25 as a share of the best


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """Lines of a document, as the index has them."""

    path: Path
    folder: Folder
    first_line: int
    lines: tuple[str, ...]
    headings: tuple[str, ...]  # at the first passage
    id: str  # of the passage that was asked for, else ""
    stale: bool  # the file has another size or time now


class Index(Closes):
    """Use `Index.open`. Safe to use from several threads."""

    def __init__(self, place: Path, generation: int, facts: IndexFacts, tables: Tables) -> None:
        self.place = place
        self.facts = facts
        self._generation: int = generation
        self._tables = tables
        self._snapshot: Snapshot | None = None
        self._checked: set[int] = set()  # ids of embedders that may ask
        self._lock = threading.RLock()

    @classmethod
    def open(cls, name: str | Path) -> Index:
        """The index of that name, or at that path. Raises BadInput."""
        place = existing(str(name)) if isinstance(name, str) else name
        pointer = read_pointer(place)
        if pointer is None:
            raise BadInput(f"{printable(place)}: no index there")
        folder = generation_folder(place, pointer.generation)
        facts = read_facts(folder)
        tables, _ = open_parts(folder, facts, writable=False)
        return cls(place, pointer.generation, facts, tables)

    def close(self) -> None:
        """Let go of its files."""
        with self._lock:
            self._snapshot = None
            self._tables.close()

    # -- questions -----------------------------------------------------------------------------

    def search(
        self,
        question: str,
        embedder: Embedder | None = None,
        *,
        top: int | None = 10,
        by: Ranking = "both",
        paths: Sequence[str] = (),
        where: Sequence[str] = (),
        min_score: float | None = None,
    ) -> list[Hit]:
        """The passages that answer best, the best first; `top` None: all of them.

        `by` meaning, words or both; words need no embedder. `paths` are patterns of file names, as
        of `index --include`, `where` conditions on metadata, which must all hold: "lang=en",
        "date>=2024-05". Raises BadInput for an embedder of another vector space.
        """
        if not question.strip():
            raise BadOption("the question is empty; say what to look for")
        check_unicode(question, "the question")
        if by not in RANKINGS:
            raise BadOption(f"by={by!r}: choose {', '.join(RANKINGS)}")
        with self._now() as now:
            files = self._chosen(now, paths, where)
            ranges = now.ranges
            if files is not None:
                chosen = [now.files[id] for id in files]
                ranges = tuple(joined([(f.first_row, f.first_row + f.n_rows) for f in chosen]))
            n = now.n_passages if top is None else top
            scored = self._scored(now, question, embedder, by, n, ranges)
            if min_score is not None:
                scored = [each for each in scored if each.score >= min_score]
            return self._hits(now, scored)

    def _chosen(
        self, now: Snapshot, paths: Sequence[str], where: Sequence[str]
    ) -> list[int] | None:
        """The ids of the files that may answer; None: all. Raises BadInput, BadOption."""
        conditions = parse_conditions(where)
        files = now.chosen(paths)
        if not conditions:
            return files
        keys = self._tables.metadata_keys()
        for each in conditions:
            if each.key not in keys:
                raise BadInput(_no_key(each.key, keys, self.place.name))
        holding = files_that_hold(conditions, self._tables.values_of)
        return [id for id in (now.files if files is None else files) if id in holding]

    def _scored(
        self,
        now: Snapshot,
        question: str,
        embedder: Embedder | None,
        by: Ranking,
        n: int,
        ranges: Sequence[tuple[int, int]],
    ) -> list[Scored]:
        words = np.empty(0, np.float32)
        if by != "meaning":
            words = now.words.scores(question, ranges)
            if by == "words":
                return by_words(words, n)
        if embedder is None:
            raise BadOption("a search by meaning needs the embedder of the index; pass one")
        self._check_space(embedder)
        try:
            asked = embedder.encode_query(question)
        except TextTooLong as error:
            raise error.of_question(embedder.model_id) from error
        if by == "meaning":
            return by_meaning(now.nearness.near(asked, ranges, n), n)
        return fused(now.nearness.near(asked, ranges, n, bonus_of(words)), words, n)

    def _hits(self, now: Snapshot, scored: Sequence[Scored]) -> list[Hit]:
        places = [now.place_of(each.row) for each in scored]
        stored = self._tables.passages_at(places)
        hits: list[Hit] = []
        for each, place in zip(scored, places, strict=True):
            found = stored.get(place)
            if found is None:
                continue
            file = now.files[found.file]
            folder = now.folders[file.folder]
            hits.append(
                Hit(
                    id=found.id,
                    path=folder.path / file.name,
                    folder=folder,
                    passage=found.passage,
                    score=each.score,
                    similarity=each.similarity,
                    words=each.words,
                )
            )
        return hits

    def _check_space(self, embedder: Embedder) -> None:
        if id(embedder) in self._checked:
            return
        asked = embedder.fingerprint(prompt=self.facts.space.prompt)
        if asked.id != self.facts.space.fingerprint:
            name = self.place.name
            raise BadInput(
                f"the index {name} is made by {self.facts.space.shown}, the question would be "
                f"embedded by {embedder.model_id} {embedder.quant} (vector space {asked.id}): "
                "such vectors cannot be compared; leave --model out, or embed the index anew: "
                f"gguf-embed index -o {name} --rebuild --model {embedder.model_id}"
            )
        self._checked.add(id(embedder))

    def duplicates(self, above: float, *, paths: Sequence[str] = ()) -> list[list[Hit]]:
        """Groups of passages that are nearly the same, the largest first: `near_groups`.

        The score of each is its cosine to the first of its group.
        """
        with self._now() as now:
            rows = now.rows_of(paths)
            groups: list[list[Hit]] = []
            for group in near_groups(now.vectors[rows], above):
                members = rows[group]
                nearness = now.vectors[members] @ now.vectors[members[0]]
                scored = [
                    Scored(row=int(row), score=float(cosine), similarity=float(cosine), words=None)
                    for row, cosine in zip(members, nearness, strict=True)
                ]
                groups.append(self._hits(now, scored))
            return sorted(groups, key=len, reverse=True)

    def passages(
        self, *, paths: Sequence[str] = (), most: int | None = None
    ) -> tuple[list[Hit], Vectors]:
        """All passages with their vectors, shape (n, dim); at most so many, spread evenly."""
        with self._now() as now:
            rows = now.rows_of(paths)
            if most is not None and len(rows) > most:
                rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(np.intp)]
            scored = [
                Scored(row=row, score=0, similarity=None, words=None) for row in rows.tolist()
            ]
            hits = self._hits(now, scored)
            assert len(hits) == len(rows), "the tables know each row of a file"
            return hits, now.vectors[rows]

    # -- documents -----------------------------------------------------------------------------

    def passage(self, id: str, *, context: int = 0) -> list[Excerpt]:
        """The passage of an id with so many lines around it; several where files share its text.

        Raises BadInput.
        """
        digits = id.strip().lower().removeprefix("#")
        if not re.fullmatch(r"[0-9a-f]{4,32}", digits):
            raise BadInput(f"{id!r}: is no id of a passage; it has 4 to 32 hexadecimal digits")
        with self._now() as now:
            found = self._tables.passages_with(*digests_between(digits))
            if not found:
                raise BadInput(
                    f"{id}: no passage has this id; its file may have changed since: search again"
                )
            if len({each.passage.digest for each in found}) > 1:
                ids = ", ".join(sorted({each.passage.digest.hex()[:16] for each in found}))
                raise BadInput(f"{id}: several passages begin with it: {ids}; give more digits")
            return [
                self._excerpt(
                    now,
                    now.files[each.file],
                    each.passage.first_line - context,
                    each.passage.last_line + context,
                    short_id(each.passage.digest),
                )
                for each in found
                if each.file in now.files
            ]

    def lines(self, name: str, first: int, last: int) -> Excerpt:
        """Lines of a file, by its path or the end of it. Raises BadInput."""
        with self._now() as now:
            return self._excerpt(now, now.file_named(name), first, last, "")

    def _excerpt(self, now: Snapshot, file: KnownFile, first: int, last: int, id: str) -> Excerpt:
        stored = [
            each
            for each in self._tables.passages_of(file.id)
            if each.passage.last_line >= first and each.passage.first_line <= last
        ]
        lines = lines_of([each.passage for each in stored])
        numbers = [number for number in sorted(lines) if first <= number <= last]
        folder = now.folders[file.folder]
        path = folder.path / file.name
        if not numbers:
            raise BadInput(
                f"{printable(path)}: no lines {first} to {last}; it has "
                f"{self._n_lines(file)} in the index"
            )
        own = next((each for each in stored if each.id == id), stored[0])
        return Excerpt(
            path=path,
            folder=folder,
            first_line=numbers[0],
            lines=tuple(lines[number] for number in numbers),
            headings=own.passage.headings,
            id=id,
            stale=_is_stale(path, file),
        )

    def _n_lines(self, file: KnownFile) -> int:
        last = self._tables.passages_of(file.id, file.n_rows - 1, file.n_rows)
        return last[0].passage.last_line if last else 0

    # -- state ---------------------------------------------------------------------------------

    def status(self) -> IndexStatus:
        """How it stands."""
        with self._now() as now:
            n_bytes = sum(path.stat().st_size for path in self.place.rglob("*") if path.is_file())
            return IndexStatus(
                place=self.place,
                facts=self.facts,
                selection=self._tables.selection(),
                folders=tuple(now.folders.values()),
                files_of=Counter(file.folder for file in now.files.values()),
                n_files=len(now.files),
                n_passages=now.n_passages,
                n_dead_rows=len(now.vectors) - now.n_passages,
                n_bytes=n_bytes,
                updated_at=self._tables.fact("updated_at") or "",
                unfinished=int(self._tables.fact("unfinished") or 0),
                unread=tuple(self._tables.unread()),
                metadata_keys=tuple(self._tables.metadata_keys()),
            )

    @contextmanager
    def _now(self) -> Generator[Snapshot]:
        """What the index holds at this moment: looked at anew where it has been written."""
        with self._lock:
            self._follow()
            with self._tables.reading():
                version = self._tables.version()
                if self._snapshot is None or self._snapshot.version != version:
                    self._snapshot = Snapshot.of(
                        self._tables,
                        vectors_of(generation_folder(self.place, self._generation), self.facts),
                        version,
                    )
                yield self._snapshot

    def _follow(self) -> None:
        """Go to the generation that counts now."""
        pointer = read_pointer(self.place)
        if pointer is not None and pointer.generation != self._generation:
            folder = generation_folder(self.place, pointer.generation)
            facts = read_facts(folder)
            tables, _ = open_parts(folder, facts, writable=False)
            self._tables.close()
            self._tables, self.facts, self._generation = tables, facts, pointer.generation
            self._snapshot = None
            self._checked.clear()


def _no_key(key: str, keys: Sequence[str], name: str) -> str:
    if not keys:
        return (
            f"--where {key}: the index {name} has no metadata, since an earlier version made it; "
            f"bring it up to date, which embeds nothing again: gguf-embed index -o {name}"
        )
    return f"--where {key}: no file of the index has it; there are {', '.join(keys[:20])}"


def _is_stale(path: Path, file: KnownFile) -> bool:
    try:
        status = path.stat()
    except OSError:
        return True
    if status.st_size != file.stamp.n_bytes:
        return True
    return file.stamp.mtime_ns not in (-1, status.st_mtime_ns)
