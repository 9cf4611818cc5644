"""An index is brought up to date: what has not changed is not touched, what moved not embedded.

list        io/folder.py      the files of each folder
digest      index/passages.py those whose stamp has changed
compare     index/changes.py  new, changed, moved, touched, deleted
then batch by batch, each whole or not at all:
cut         index/passages.py into passages; index/metadata.py is what a file says of itself
embed       engine            those whose text has no vector yet, here or in the cache of vectors
append      index/vector_file.py, then index/tables.py tells of it
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from gguf_embed.errors import BadInput
from gguf_embed.index.changes import Changes, SeenFile, changes_between
from gguf_embed.index.facts import Folder, IndexFacts, KnownFile, Passage, Selection, Unread
from gguf_embed.index.metadata import has_front_matter, metadata_of, own_metadata
from gguf_embed.index.passages import passages_of, read_file
from gguf_embed.index.tables import Tables
from gguf_embed.index.vector_file import VectorFile
from gguf_embed.io.documents import read_document
from gguf_embed.io.flow import Progress
from gguf_embed.io.folder import Choice, list_folder
from gguf_embed.io.front_matter import Metadata
from gguf_embed.io.globs import compile_globs
from gguf_embed.jobs.cached import Entry, Known, Space, space_of
from gguf_embed.vectors import Vectors

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.options import Block
    from gguf_embed.jobs.cache import VectorCache

BATCH_LEAST, BATCH_MOST = 256, 4096  # passages
BATCH_S: Final = 20.0  # so much work a kill may cost


@dataclass(slots=True, kw_only=True)
class UpdateReport:
    """What an update did."""

    n_new: int = 0
    n_changed: int = 0
    n_moved: int = 0
    n_deleted: int = 0
    n_unchanged: int = 0
    n_embedded: int = 0  # passages
    n_reused: int = 0  # passages of new and changed files whose vectors were there
    n_cached: int = 0  # passages whose vectors the cache knew
    n_tokens: int = 0
    n_passages: int = 0  # of the index, now
    unread: list[tuple[Path, str]] = field(default_factory=list[tuple[Path, str]])
    absent: list[Path] = field(default_factory=list[Path])  # folders; what is known of them stays
    passed_over: Counter[str] = field(default_factory=Counter[str])  # by ending
    n_ignored: int = 0  # files and folders that .gitignore files leave out
    no_vector: list[str] = field(default_factory=list[str])  # place and reason
    no_metadata: list[tuple[Path, str]] = field(default_factory=list[tuple[Path, str]])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """A file in passages, to be written."""

    old: KnownFile | None
    seen: SeenFile
    passages: list[Passage]
    metadata: Metadata


class Update:
    """One update of one generation."""

    def __init__(
        self,
        *,
        tables: Tables,
        vectors: VectorFile,
        facts: IndexFacts,
        embedder: Embedder,
        begun: Callable[[int], Progress] | None = None,
        cache: VectorCache | None = None,
    ) -> None:
        """`begun` gets the number of bytes to read, and gives who is told how far it is.

        `cache`: where vectors of texts that this index does not know may be.
        """
        self._tables = tables
        self._vectors = vectors
        self._facts = facts
        self._embedder = embedder
        self._progress: Progress | None = None
        self._begun = begun
        self._cache = cache
        self._report = UpdateReport()
        self._n_left = 0  # files to do
        self._unread: dict[int, list[Unread]] = {}
        self._folders = {folder.id: folder for folder in tables.folders()}

    def run(self) -> UpdateReport:
        """Do it. Raises OutputFailed, DoesNotFit, NativeFailed; what is done by then stays."""
        changes = self._changes()
        report = self._report
        report.n_new, report.n_changed = len(changes.new), len(changes.changed)
        report.n_moved, report.n_deleted = len(changes.moved), len(changes.deleted)
        report.n_unchanged = len(changes.unchanged) + len(changes.touched)
        todo = [*((None, seen) for seen in changes.new), *changes.changed]
        todo.sort(key=lambda each: (each[1].folder, each[1].name))
        self._n_left = len(todo)
        if self._begun is not None:
            self._progress = self._begun(sum(seen.stamp.n_bytes for _, seen in todo))
        metadata = self._metadata_again(changes)
        with self._tables.writing():
            for file in changes.deleted:
                self._tables.remove_file(file.id)
            for file, seen in (*changes.moved, *changes.touched):
                self._tables.move_file(file.id, seen.folder, seen.name, seen.stamp)
            for id, values in metadata.items():
                self._tables.set_metadata(id, values)
            self._tables.set_fact("unfinished", str(self._n_left))
        self._write_all(todo)
        with self._tables.writing():
            for folder, unread in self._unread.items():
                self._tables.set_unread(folder, unread)
            self._tables.set_fact("unfinished", "0")
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._tables.set_fact("updated_at", now)
            if report.n_new + report.n_changed > report.n_unchanged:
                self._tables.optimize()
        report.n_passages = sum(file.n_rows for file in self._tables.files())
        report.unread = [
            (self._folders[folder].path / each.name, each.reason)
            for folder, unread in self._unread.items()
            for each in unread
        ]
        return report

    # -- what there is to do -------------------------------------------------------------------

    def _changes(self) -> Changes:
        known = self._tables.files()
        own = self._vectors.path.parents[1]
        choice = replace(choice_of(self._tables.selection()), skip=frozenset({own}))
        seen: list[SeenFile] = []
        for folder in self._folders.values():
            files = {file.name: file for file in known if file.folder == folder.id}
            try:
                found = list(self._seen(folder, files, choice))
            except BadInput:  # it may be on a disk that is not there today
                self._report.absent.append(folder.path)
                known = [file for file in known if file.folder != folder.id]
            else:
                seen += found
        return changes_between(known, seen)

    def _seen(
        self, folder: Folder, known: dict[str, KnownFile], choice: Choice
    ) -> Iterator[SeenFile]:
        listing = list_folder(folder.path, choice)
        self._report.passed_over.update(listing.passed_over)
        self._report.n_ignored += listing.n_ignored
        self._unread[folder.id] = [
            Unread(folder=folder.id, name=name, reason=reason)
            for name, reason in listing.unreadable
        ]
        # A file that said nothing last time and has not changed since will say nothing again, but
        # what reads it may have been installed.
        for listed in listing.files:
            old = known.get(listed.name)
            stamp, digest = listed.stamp, old.digest if old else b""
            if old is None or old.stamp != stamp:
                try:
                    now = read_file(listed.path, now_ns=time.time_ns())
                except BadInput as error:
                    self._cannot(folder.id, listed.name, error)
                    continue
                stamp, digest = now.stamp, now.digest
            yield SeenFile(
                folder=folder.id, name=listed.name, path=listed.path, stamp=stamp, digest=digest
            )

    def _cannot(self, folder: int, name: str, error: BadInput) -> None:
        unread = Unread(folder=folder, name=name, reason=str(error))
        self._unread.setdefault(folder, []).append(unread)

    # -- what files say of themselves ----------------------------------------------------------

    def _metadata_again(self, changes: Changes) -> dict[int, Metadata]:
        """By id, of files that keep their vectors: moved, touched, and those without any."""
        places = {old.id: seen.path for old, seen in (*changes.moved, *changes.touched)}
        unknown = self._tables.files_without_metadata()
        for file in changes.unchanged:
            if file.id in unknown:
                places[file.id] = self._folders[file.folder].path / file.name
        found: dict[int, Metadata] = {}
        for id, path in places.items():
            with suppress(OSError, BadInput):  # it has gone since it was listed
                text = ""
                if has_front_matter(path.name):
                    data = read_file(path, now_ns=time.time_ns()).data
                    text = read_document(path, data).text
                found[id] = self._metadata(path, path.stat().st_mtime_ns, text)
        return found

    def _metadata(self, path: Path, mtime_ns: int, text: str) -> Metadata:
        metadata = metadata_of(path, mtime_ns)
        try:
            return {**metadata, **own_metadata(path, text)}
        except BadInput as error:
            self._report.no_metadata.append((path, str(error)))
            return metadata

    # -- doing it ------------------------------------------------------------------------------

    def _write_all(self, todo: Sequence[tuple[KnownFile | None, SeenFile]]) -> None:
        size, batch = BATCH_LEAST, list[_Cut]()
        begin = time.monotonic()
        for old, seen in todo:
            try:
                now = read_file(seen.path, now_ns=time.time_ns())
                document = read_document(seen.path, now.data)
                passages = list(passages_of(document, self._embedder, self._facts))
            except BadInput as error:
                self._cannot(seen.folder, seen.name, error)
                self._n_left -= 1
                if old is None:
                    self._report.n_new -= 1
                else:
                    self._report.n_changed -= 1
                    self._report.n_deleted += 1
                    with self._tables.writing():
                        self._tables.remove_file(old.id)
                continue
            seen = SeenFile(
                folder=seen.folder,
                name=seen.name,
                path=seen.path,
                stamp=now.stamp,
                digest=now.digest,
            )
            metadata = self._metadata(seen.path, now.mtime_ns, document.text)
            batch.append(_Cut(old=old, seen=seen, passages=passages, metadata=metadata))
            if sum(len(each.passages) for each in batch) >= size:
                self._write(batch)
                seconds = time.monotonic() - begin
                size = min(max(int(size * BATCH_S / max(seconds, 1e-3)), BATCH_LEAST), BATCH_MOST)
                batch, begin = [], time.monotonic()
        if batch:
            self._write(batch)

    def _write(self, batch: Sequence[_Cut]) -> None:
        """Files as they are now, in one transaction."""
        n_rows = self._tables.n_rows()
        vectors = self._vectors_of(batch, n_rows)
        self._vectors.append(vectors, n_rows)
        self._n_left -= len(batch)
        with self._tables.writing():
            for cut in batch:
                if cut.old is not None:
                    self._tables.remove_file(cut.old.id)
                file = KnownFile(
                    id=0,
                    folder=cut.seen.folder,
                    name=cut.seen.name,
                    digest=cut.seen.digest,
                    stamp=cut.seen.stamp,
                    first_row=n_rows,
                    n_rows=len(cut.passages),
                )
                id = self._tables.add_file(file, cut.passages)
                self._tables.set_metadata(id, cut.metadata)
                n_rows += len(cut.passages)
            self._tables.set_fact("n_rows", str(n_rows))
            self._tables.set_fact("unfinished", str(self._n_left))

    def _vectors_of(self, batch: Sequence[_Cut], n_rows: int) -> Vectors:
        """A row for each passage: of the same text where there is one, else embedded."""
        places = [(cut, passage) for cut in batch for passage in cut.passages]
        known = self._tables.rows_of_texts([passage.digest for _, passage in places])
        vectors = np.zeros((len(places), self._facts.space.dim), np.float32)
        stored = self._vectors.rows(n_rows)
        missing: list[int] = []
        for position, (_, passage) in enumerate(places):
            row = known.get(passage.digest)
            if row is None:
                missing.append(position)
            else:
                vectors[position] = stored[row]
        self._report.n_reused += len(places) - len(missing)
        texts = [places[position][1].text for position in missing]
        for row, cached in self._cached(texts).items():
            vectors[missing[row]] = cached.vector
            self._report.n_cached += 1
            missing[row] = -1
        missing = [position for position in missing if position >= 0]
        self._report.n_embedded += len(missing)
        n_bytes = sum(cut.seen.stamp.n_bytes for cut in batch)
        if self._progress is not None:
            n_left = len(missing)
            self._progress.advance(0, 0, n_bytes * (len(places) - n_left) // max(len(places), 1))

        def advance(n_texts: int, n_tokens: int) -> None:
            self._report.n_tokens += n_tokens
            if self._progress is not None:
                self._progress.advance(n_texts, n_tokens, n_bytes * n_texts // len(places))

        texts = [places[position][1].text for position in missing]
        for block in self._embedder.stream(
            texts,
            prompt=self._facts.space.prompt,
            on_error="skip",
            on_progress=advance,
        ):
            rows = missing[block.start : block.start + len(block.vectors)]
            vectors[rows] = np.nan_to_num(block.vectors)  # without a direction: found by words only
            for failed in block.failed:
                cut, passage = places[missing[failed.row]]
                self._report.no_vector.append(
                    f"{cut.seen.path}:{passage.first_line}: {failed.reason}"
                )
            self._keep(texts, block)
        return vectors

    def _cached(self, texts: Sequence[str]) -> dict[int, Known]:
        """What the cache knows, by position."""
        if self._cache is None:
            return {}
        return self._cache.find(self._space, texts, max_tokens=self._embedder.n_ctx)

    def _keep(self, texts: Sequence[str], block: Block) -> None:
        if self._cache is None:
            return
        failed = {each.row - block.start for each in block.failed}
        self._cache.keep(
            self._space,
            [
                Entry(
                    text=texts[block.start + row],
                    vector=block.vectors[row],
                    n_tokens=int(block.token_counts[row]),
                )
                for row in range(len(block.vectors))
                if row not in failed and not block.truncated[row]
            ],
        )

    @property
    def _space(self) -> Space:
        return space_of(self._embedder, prompt=self._facts.space.prompt)


def choice_of(selection: Selection) -> Choice:
    """The patterns of a selection, ready for use. Raises BadOption."""
    return Choice(
        include=compile_globs("--include", selection.include),
        exclude=compile_globs("--exclude", selection.exclude),
        gitignore=selection.gitignore,
    )
