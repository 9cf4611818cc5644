"""A long run: records in, shards out, and what is done stays done.

    cut -> known? -> begin (tokenize) -> start -> result -> encode -> file, then its line

While a shard is computed the next one is read and tokenized.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

from gguf_embed.engine.options import EncodeOptions
from gguf_embed.errors import BadInput, BadText, TextTooLong, counted
from gguf_embed.io.flow import place
from gguf_embed.io.shards import Rows, ShardFormat
from gguf_embed.jobs.cache import VectorCache
from gguf_embed.jobs.cut import Cut
from gguf_embed.jobs.encode import Encoded, Unit, begin
from gguf_embed.jobs.manifest import (
    FailedPlace,
    ShardEntry,
    failed_place,
    unreadable_place,
)
from gguf_embed.jobs.output import JobOutput

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.scheduler import Computed

FIRST: Final = 5  # places that a report names


class Watch(Protocol):
    """Who is told what happens."""

    def advance(self, n_texts: int, n_tokens: int, n_bytes: int) -> None:
        """So many texts, tokens and bytes of input are done since the last call; any thread."""
        ...

    def failed(self, row: FailedPlace) -> None:
        """A row has no vector."""
        ...


@dataclass(slots=True, kw_only=True)
class JobReport:
    """What a run has done so far."""

    n_shards: int = 0
    n_rows: int = 0
    n_tokens: int = 0  # of all texts
    n_truncated: int = 0
    first_truncated: list[str] = field(default_factory=list[str])
    n_failed: int = 0
    first_failed: list[str] = field(default_factory=list[str])
    n_kept_shards: int = 0  # of an earlier run
    n_kept_rows: int = 0
    n_cached_rows: int = 0  # whose vectors the cache knew
    n_computed_tokens: int = 0
    computing_s: float = 0.0  # in which there was something to compute

    def add(self, entry: ShardEntry) -> None:
        """Count a shard."""
        self.n_shards += 1
        self.n_rows += entry.n_rows
        self.n_tokens += entry.n_tokens
        self.n_truncated += entry.n_truncated
        self.n_failed += len(entry.failed)
        self.first_truncated += entry.first_truncated[: FIRST - len(self.first_truncated)]
        left = FIRST - len(self.first_failed)
        self.first_failed += [each.place for each in entry.failed[:left]]

    @property
    def tokens_per_s(self) -> float:
        """While something was computed."""
        return self.n_computed_tokens / self.computing_s if self.computing_s else 0.0


class Job:
    """One run. `report` is right at any moment, also after an interruption."""

    def __init__(
        self,
        embedder: Embedder,
        output: JobOutput,
        form: ShardFormat,
        options: EncodeOptions,
        watch: Watch,
        cache: VectorCache | None = None,
    ) -> None:
        self._embedder = embedder
        self._output = output
        self._form = form
        self._options = options
        self._watch = watch
        self._cache = cache
        self._under_way: tuple[Cut, Unit] | None = None
        self._read_bytes = 0  # of the input that is told as done
        self.report = JobReport()

    def run(self, cuts: Iterable[Cut]) -> JobReport:
        """Make all shards that are not there. Raises OutputFailed, NativeFailed and BadInput."""
        self._embedder.meter.watch(self._computed)
        began = time.monotonic()
        try:
            for each in cuts:
                entry = self._output.known(each.index, each.content)
                if entry is not None:
                    self._collect(None)
                    self._keep(entry, each)
                    began = time.monotonic()
                    continue
                if self._cache is not None:  # which is to know the shard before
                    self._collect(None)
                unit = begun(self._embedder, each, self._options, self._cache)
                self._collect((each, unit))
                self.report.computing_s += time.monotonic() - began
                began = time.monotonic()
            self._collect(None)
            self.report.computing_s += time.monotonic() - began
            self._output.finish()
            return self.report
        finally:
            if self._under_way is not None:
                self._under_way[1].cancel()

    def _collect(self, following: tuple[Cut, Unit] | None) -> None:
        """Wait for the shard under way, write it, and have the following one computed."""
        done = self._under_way
        encoded = None if done is None else done[1].result()
        self._under_way = following
        # Written first: a disk that is full then costs one shard and not two.
        if done is not None and encoded is not None:
            self._write(done[0], encoded)
        if following is not None:
            following[1].submit()

    def _write(self, each: Cut, encoded: Encoded) -> None:
        entry, data = shard_of(each, encoded, self._form)
        for row in entry.failed:
            self._watch.failed(row)
        self._output.add(entry, data)
        self.report.add(entry)
        self.report.n_cached_rows += encoded.n_cached
        self.report.n_computed_tokens += encoded.n_computed_tokens
        self._advance_to(each.read_bytes)

    def _keep(self, entry: ShardEntry, each: Cut) -> None:
        self._output.keep(entry)
        self.report.add(entry)
        self.report.n_kept_shards += 1
        self.report.n_kept_rows += entry.n_rows
        self._advance_to(each.read_bytes)

    def _computed(self, computed: Computed) -> None:
        self._watch.advance(computed.n_texts, computed.n_tokens, 0)

    def _advance_to(self, read_bytes: int) -> None:
        n_bytes, self._read_bytes = read_bytes - self._read_bytes, read_bytes
        self._watch.advance(0, 0, max(0, n_bytes))


def begun(
    embedder: Embedder, each: Cut, options: EncodeOptions, cache: VectorCache | None = None
) -> Unit:
    """The texts of a shard, tokenized. Raises BadInput, which names files and lines."""
    texts = [record.text for record in each.records]
    try:
        return begin(embedder, texts, options, cache=cache)
    except BadText as error:
        raise BadInput(f"{place(each.records[error.row])}: {error.reason}") from error
    except TextTooLong as error:
        shown = ", ".join(
            f"{place(each.records[row])}: {counted(n, 'token')}" for row, n in error.rows[:FIRST]
        )
        raise BadInput(
            f"{counted(len(error.rows), 'text')} longer than the {error.n_ctx} tokens of the "
            f"model, the first of them {shown}; cut them with --truncate end or start, split "
            "them, or go on without them: --on-error skip"
        ) from error


def shard_of(each: Cut, encoded: Encoded, form: ShardFormat) -> tuple[ShardEntry, bytes]:
    """A shard: what the manifest says of it, and its file."""
    rows = Rows(records=each.records, vectors=encoded.vectors, truncated=encoded.truncated.tolist())
    data = form.encode(rows)
    return entry_of(each, encoded, ending=form.ending, n_bytes=len(data)), data


def entry_of(each: Cut, encoded: Encoded, *, ending: str, n_bytes: int) -> ShardEntry:
    """What the manifest says of a shard."""
    records = each.records
    cut_records = (
        record for record, is_cut in zip(records, encoded.truncated, strict=True) if is_cut
    )
    return ShardEntry(
        index=each.index,
        file=f"part-{each.index:05}{ending}",
        content=each.content,
        n_bytes=n_bytes,
        n_rows=len(records),
        n_tokens=int(encoded.token_counts.sum()),
        n_truncated=int(encoded.truncated.sum()),
        first_truncated=tuple(
            f"{record.source}:{record.position}" for record in islice(cut_records, FIRST)
        ),
        failed=(
            *map(unreadable_place, each.unreadable),
            *(failed_place(records[row.row], row) for row in encoded.failed),
        ),
    )
