"""What a job will take: all of its input is read and tokenized, a sample is embedded."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import psutil

from gguf_embed.engine.options import EncodeOptions
from gguf_embed.errors import BadText, NativeFailed
from gguf_embed.io.record import Record
from gguf_embed.io.shards import Rows, ShardFormat
from gguf_embed.jobs.cut import Cut
from gguf_embed.jobs.encode import encode

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder

SAMPLE_TEXTS: Final = 1024
SAMPLE_S: Final = 5.0  # of embedding, to measure the speed
TOGETHER: Final = 256  # texts of a measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A bar of the histogram."""

    most_tokens: int  # of the texts in it
    n_texts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is in the input, and what it will take."""

    n_texts: int
    n_tokens: int  # of all texts, after a cut
    n_computed_tokens: int  # where the same text is computed once in a shard
    most_tokens: int  # of one text
    histogram: tuple[Bin, ...]
    n_too_long: int
    n_unusable: int  # texts without tokens, and rows that cannot be read
    n_shards: int
    tokens_per_s: float  # measured on a sample; 0 without any text
    seconds: float
    memory_bytes: int  # most so far, and for the shards in memory
    result_bytes: int


class Counts:
    """Tokens of texts, counted up."""

    def __init__(self, n_ctx: int, *, cuts: bool) -> None:
        """`cuts`: what is longer than `n_ctx` is cut, else it fails."""
        self._n_ctx = n_ctx
        self._cuts = cuts
        self._bins: dict[int, int] = {}
        self.n_texts = self.n_tokens = self.n_computed = self.most = self.n_too_long = 0

    def add(self, texts: Sequence[str], counts: Sequence[int]) -> None:
        """The texts of one shard with their tokens."""
        seen: set[str] = set()
        for text, n in zip(texts, counts, strict=True):
            self.n_texts += 1
            self.most = max(self.most, n)
            edge = 1 << max(0, n - 1).bit_length()
            self._bins[edge] = self._bins.get(edge, 0) + 1
            if n > self._n_ctx:
                self.n_too_long += 1
                if not self._cuts:
                    continue
                n = self._n_ctx
            self.n_tokens += n
            if text not in seen:
                seen.add(text)
                self.n_computed += n

    @property
    def histogram(self) -> tuple[Bin, ...]:
        """Bins that double in width, from the shortest texts to the longest."""
        if not self._bins:
            return ()
        first, last = min(self._bins).bit_length(), max(self._bins).bit_length()
        edges = [1 << bits for bits in range(first - 1, last)]
        return tuple(Bin(most_tokens=edge, n_texts=self._bins.get(edge, 0)) for edge in edges)


class Sample:
    """Records of which each of the input was as likely to be taken."""

    def __init__(self, size: int = SAMPLE_TEXTS) -> None:
        self._size = size
        self._random = random.Random(0)
        self._n_seen = 0
        self.records: list[Record] = []

    def add(self, record: Record) -> None:
        """Maybe take it, in place of another."""
        self._n_seen += 1
        if len(self.records) < self._size:
            self.records.append(record)
        elif (place := self._random.randrange(self._n_seen)) < self._size:
            self.records[place] = record


def forecast(
    embedder: Embedder, cuts: Iterable[Cut], form: ShardFormat, options: EncodeOptions
) -> Forecast:
    """Read all, embed a sample; nothing is written."""
    counts = Counts(embedder.n_ctx, cuts=options.get("truncate", "error") != "error")
    sample = Sample()
    n_shards = n_unusable = shard_bytes = 0
    for each in cuts:
        n_shards += 1
        texts = [record.text for record in each.records]
        tokens = _counted(embedder, texts, options.get("prompt") or "")
        usable = [(text, n) for text, n in zip(texts, tokens, strict=True) if n is not None]
        counts.add([text for text, _ in usable], [n for _, n in usable])
        n_unusable += len(each.unreadable) + len(texts) - len(usable)
        shard_bytes = max(shard_bytes, sum(map(len, texts)) + 4 * embedder.dim * len(texts))
        for record in each.records:
            sample.add(record)
    speed, bytes_per_row = _measured(embedder, sample.records, form, options)
    n_rows = counts.n_texts + n_unusable
    return Forecast(
        n_texts=counts.n_texts,
        n_tokens=counts.n_tokens,
        n_computed_tokens=counts.n_computed,
        most_tokens=counts.most,
        histogram=counts.histogram,
        n_too_long=counts.n_too_long,
        n_unusable=n_unusable,
        n_shards=n_shards,
        tokens_per_s=speed,
        seconds=counts.n_computed / speed if speed else 0.0,
        # One is computed while the next is read; a written one is there twice.
        memory_bytes=_memory_bytes() + 4 * shard_bytes,
        result_bytes=round(bytes_per_row * n_rows),
    )


def _counted(embedder: Embedder, texts: Sequence[str], prompt: str) -> list[int | None]:
    """Tokens of each text; None where it has none."""
    try:
        counts = embedder.count_tokens([prompt + text for text in texts])
        return cast("list[int | None]", counts.tolist())
    except (BadText, NativeFailed):
        if len(texts) == 1:
            return [None]
        half = len(texts) // 2
        return [
            *_counted(embedder, texts[:half], prompt),
            *_counted(embedder, texts[half:], prompt),
        ]


def _measured(
    embedder: Embedder, records: Sequence[Record], form: ShardFormat, options: EncodeOptions
) -> tuple[float, float]:
    """Tokens per second, and bytes of a row in the result."""
    options = {**options, "on_error": "skip"}
    n_tokens = n_bytes = n_rows = 0
    seconds = 0.0
    for start in range(0, len(records), TOGETHER):
        part = records[start : start + TOGETHER]
        began = time.monotonic()
        encoded = encode(embedder, [record.text for record in part], options)
        seconds += time.monotonic() - began
        n_tokens += encoded.n_computed_tokens
        rows = Rows(records=part, vectors=encoded.vectors, truncated=encoded.truncated.tolist())
        n_bytes += len(form.encode(rows))
        n_rows += len(part)
        if not start and len(records) > len(part):  # the first one warms up
            n_tokens, seconds = 0, 0.0
        elif seconds > SAMPLE_S:
            break
    return (n_tokens / seconds if seconds else 0.0), (n_bytes / n_rows if n_rows else 0.0)


def _memory_bytes() -> int:
    """Of this process and its children."""
    process = psutil.Process()
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
