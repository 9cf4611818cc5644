"""The scores of one call's pairs, put back in the order of the documents as they are done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np

from gguf_embed.engine import arguments
from gguf_embed.engine.options import FailedRow, OnError, OnProgress, RerankOptions, Scored
from gguf_embed.engine.prepare import Prepared
from gguf_embed.engine.score_head import ScoreHead, logistic
from gguf_embed.engine.stream import no_vector, why_no_vector
from gguf_embed.engine.turns import Done, Priority
from gguf_embed.plan.values import check_switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of one call, checked."""

    task: str | None
    cut: bool  # what is too long
    raw: bool
    priority: Priority
    on_error: OnError
    on_progress: OnProgress | None

    @classmethod
    def of(cls, options: RerankOptions) -> Asked:
        """Raises BadOption."""
        arguments.check_names(options, RerankOptions)
        on_progress = options.get("on_progress")
        arguments.check_callback("on_progress", on_progress)
        truncate = arguments.check_document_truncate(options.get("truncate", "end"))
        return cls(
            task=arguments.check_string("task", options.get("task")),
            cut=truncate == "end",
            raw=check_switch("raw", options.get("raw", False)),
            priority=arguments.check_priority(options.get("priority", Priority.NORMAL)),
            on_error=arguments.check_on_error(options.get("on_error", "raise")),
            on_progress=on_progress,
        )


class Scoring:
    """Of one call; used by one thread at a time."""

    def __init__(self, pairs: Prepared, head: ScoreHead, *, raw: bool, on_error: OnError) -> None:
        """`raw`: logits rather than scores from 0 to 1."""
        self.pairs = pairs
        self._head = head
        self._raw = raw
        self._on_error = on_error
        place, n_different = pairs.place, len(pairs.tokens)
        self._logits = np.full(n_different, np.nan, np.float32)
        self._reasons: dict[int, str] = {}  # why a pair has none
        self._n_same = np.bincount(place[place >= 0], minlength=n_different)

    def add(self, done: Done) -> int:
        """Score some pairs; returns of how many documents they are."""
        rows = np.array(done.rows, np.intp)
        with np.errstate(all="ignore"):  # what is not finite is found below
            self._logits[rows] = self._head.logits(done.vectors)
        bad = {int(row) for row in rows[~np.isfinite(self._logits[rows])]} | set(done.bad)
        for row in bad:
            self._logits[row] = np.nan
            self._reasons[row] = why_no_vector(died=row in done.died)
        return int(self._n_same[rows].sum())

    def scored(self, arrived: Iterable[Done] = ()) -> Scored:
        """All of them, once the last ones are added. Raises NativeFailed for what has no score."""
        for done in arrived:
            self.add(done)
        pairs = self.pairs
        failed = [FailedRow(row=row, n_tokens=None, reason=why) for row, why in pairs.untokenized]
        for index, reason in sorted(self._reasons.items()):
            n = len(pairs.tokens[index])
            if self._on_error == "raise":
                raise no_vector(pairs.first_rows[index], n, reason)
            rows = np.flatnonzero(pairs.place == index).tolist()
            failed += [FailedRow(row=row, n_tokens=n, reason=reason) for row in rows]
        scores = self._logits if self._raw else logistic(self._logits)
        n_tokens = np.fromiter(map(len, pairs.tokens), np.int32, len(pairs.tokens))
        # The last one stands for documents that have no tokens.
        place = pairs.place
        return Scored(
            scores=np.append(scores, np.float32(np.nan))[place],
            n_tokens=cast("list[int]", np.append(n_tokens, 0)[place].tolist()),
            truncated=cast("list[bool]", np.append(pairs.truncated, False)[place].tolist()),
            failed=sorted(failed, key=lambda each: each.row),
        )
