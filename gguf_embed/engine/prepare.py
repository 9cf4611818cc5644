"""The first half of a text's way: prompt, tokenize, cut. Knows nothing of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.options import OnError, Truncate
from gguf_embed.engine.tokenizer import KillsTokenizer, RunTooLong
from gguf_embed.errors import BadInput, BadText, NativeFailed
from gguf_embed.native.model import Tokens

_Row = TypeVar("_Row", str, bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Texts tokenized together: each different text once, `place` leads back to every row."""

    start: int
    tokens: list[Tokens]  # of the different texts
    first_rows: list[int]  # the row where each was seen first
    place: npt.NDArray[np.intp]  # (n rows,) -> index into tokens; -1: among `untokenized`
    truncated: npt.NDArray[np.bool_]  # (different texts,)
    too_long: tuple[tuple[int, int], ...]  # (row, tokens) of those that may not be cut
    untokenized: tuple[tuple[int, str], ...] = ()  # (row, reason) of those without tokens

    @property
    def token_counts(self) -> npt.NDArray[np.int32]:
        """Of each row, after the cut, shape (n rows,); 0 where it has no tokens."""
        counts = np.zeros(len(self.tokens) + 1, np.int32)  # the last is that of the place -1
        counts[:-1] = list(map(len, self.tokens))
        return counts[self.place]

    @property
    def cut(self) -> npt.NDArray[np.bool_]:
        """Which rows were cut, shape (n rows,)."""
        return np.append(self.truncated, False)[self.place]


class Preparer:
    """Turns texts into rows of tokens. Safe to use from several threads."""

    def __init__(
        self,
        tokenize: Callable[[str], Tokens],
        *,
        specials: frozenset[int],
        n_ctx: int,
        threads: Executor,
        tokenize_many: Callable[[Sequence[str]], list[Tokens]] | None = None,
    ) -> None:
        """`tokenize` gives token ids with the special tokens; `threads` is where it is called.

        `tokenize_many` does so for several texts, where that is faster.
        """
        self._tokenize_many = tokenize_many
        self._tokenize = tokenize
        self._specials = specials
        self.n_ctx = n_ctx
        self._threads = threads

    def ids(self, text: str, row: int, prompt: str = "") -> Tokens:
        """Token ids of one text; raises BadText with its row."""
        try:
            return self._tokenize(prompt + text)
        except UnicodeEncodeError as error:
            raise BadText(
                row,
                f"character {error.start - len(prompt)} is a lone surrogate "
                f"(U+{ord(error.object[error.start]):04X}), which is no text; fix the decoding or "
                "use errors='replace'",
            ) from None
        except RunTooLong as error:
            raise BadText(row, str(error)) from None
        except (KillsTokenizer, NativeFailed) as error:
            raise NativeFailed(f"row {row}: {error}") from error

    def _ids_or_reason(self, text: str, row: int, prompt: str) -> Tokens | str:
        """The same; of a text that kills the tokenizer the reason why it has none."""
        try:
            return self.ids(text, row, prompt)
        except NativeFailed as error:
            if isinstance(error.__cause__, KillsTokenizer):
                return str(error.__cause__)
            raise

    def each(
        self, given: Iterable[str], rows: Sequence[int], *, prompt: str, on_error: OnError
    ) -> list[Tokens | str]:
        """`ids` of each text, computed in several threads.

        With `on_error="skip"` a text that kills the tokenizer has the reason in place of its ids.
        """
        tokenize = self.ids if on_error == "raise" else self._ids_or_reason
        texts = list(given)
        if len(texts) == 1:  # another thread would take as long to begin
            return [tokenize(texts[0], rows[0], prompt)]
        if self._tokenize_many is not None:
            # What is refused is found again below, with its row.
            with suppress(UnicodeEncodeError, BadInput, NativeFailed):
                return [*self._tokenize_many([prompt + text for text in texts])]
        return list(self._threads.map(tokenize, texts, rows, repeat(prompt), chunksize=64))

    def bare(self, text: str) -> Tokens:
        """`ids` without the special tokens at the ends, which belong to a text that is alone."""
        return self.without_ends(self.ids(text, row=0))

    def without_ends(self, ids: Tokens) -> Tokens:
        """The same of ids."""
        start = self.n_before(ids)
        end = len(ids) - (1 if len(ids) > start and int(ids[-1]) in self._specials else 0)
        return ids[start:end]

    def n_before(self, ids: Tokens) -> int:
        """How many special tokens stand in front."""
        return 1 if len(ids) and int(ids[0]) in self._specials else 0

    def count(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Number of tokens of each text, shape (n,)."""
        _check_rows(texts, 0)
        ids = self.each(texts, range(len(texts)), prompt="", on_error="raise")
        return np.fromiter(map(len, ids), np.int32, len(texts))

    def rows(
        self,
        texts: Sequence[str],
        start: int,
        *,
        prompt: str = "",
        truncate: Truncate = "error",
        n_ctx: int | None = None,
        on_error: OnError = "raise",
    ) -> Prepared:
        """Tokenize each different text once, in several threads, and cut what is too long.

        The first of the texts is row `start` of the caller's. `n_ctx` may set a lower limit than
        the model's. A text that kills the tokenizer is an error, or with `on_error="skip"` among
        the `untokenized`.
        """
        _check_rows(texts, start)
        place, first_rows, unique = _unique(texts, start)
        done = self.each(unique, first_rows, prompt=prompt, on_error=on_error)
        tokens, first_rows, place, untokenized = living(done, first_rows, place, start)
        return self._prepared(
            tokens,
            place,
            first_rows,
            start=start,
            prompt=prompt,
            truncate=truncate,
            n_ctx=n_ctx or self.n_ctx,
            untokenized=untokenized,
        )

    def given(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        n_vocab: int,
        truncate: Truncate = "error",
        n_ctx: int | None = None,
    ) -> Prepared:
        """The same for texts that come as token ids of this model.

        The special tokens are put at the ends of those that lack them.
        """
        ends = self.ids("", row=0)
        n_first = sum(int(ids) in self._specials for ids in ends[:1])
        n_last = len(ends) - n_first
        rows: list[bytes] = []
        for row, sequence in enumerate(sequences):
            ids = np.asarray(sequence, np.int64)
            wrong = np.flatnonzero((ids < 0) | (ids >= n_vocab))
            if len(wrong):
                raise BadText(
                    row,
                    f"token {int(ids[wrong[0]])} at {wrong[0]} is none of this model, whose tokens "
                    f"are 0 to {n_vocab - 1}; pass text, or ids that this model's own tokenizer "
                    "gave",
                )
            first, last = ends[:n_first], ends[len(ends) - n_last :]
            if n_first and not np.array_equal(ids[:n_first], first):
                ids = np.concatenate([first, ids])
            if n_last and not (len(ids) > n_first and np.array_equal(ids[-n_last:], last)):
                ids = np.concatenate([ids, last])
            rows.append(ids.astype(np.int32).tobytes())
        place, first_rows, unique = _unique(rows, 0)
        tokens: list[Tokens] = [np.frombuffer(row, np.int32) for row in unique]
        return self._prepared(
            tokens, place, first_rows, truncate=truncate, n_ctx=n_ctx or self.n_ctx
        )

    def _prepared(
        self,
        tokens: list[Tokens],
        place: npt.NDArray[np.intp],
        first_rows: list[int],
        *,
        start: int = 0,
        prompt: str = "",
        truncate: Truncate,
        n_ctx: int,
        untokenized: tuple[tuple[int, str], ...] = (),
    ) -> Prepared:
        for ids, row in zip(tokens, first_rows, strict=True):
            if not len(ids):
                raise BadText(row, "has no token, and this model adds none; leave the row out")
        truncated = np.fromiter((len(ids) > n_ctx for ids in tokens), np.bool_, len(tokens))
        too_long: list[tuple[int, int]] = []
        for index in np.flatnonzero(truncated):
            if truncate == "error":
                rows = np.flatnonzero(place == index)
                too_long.extend((start + int(row), len(tokens[index])) for row in rows)
            else:
                tokens[index] = self._cut(tokens[index], prompt, truncate, n_ctx)
        return Prepared(
            start=start,
            tokens=tokens,
            first_rows=first_rows,
            place=place,
            truncated=truncated,
            too_long=tuple(too_long),
            untokenized=untokenized,
        )

    def _cut(self, tokens: Tokens, prompt: str, truncate: Truncate, n_ctx: int) -> Tokens:
        """Cut to n_ctx from the end or the start of the text; prompt and special tokens stay."""
        tail = 1 if int(tokens[-1]) in self._specials else 0
        if truncate == "end":
            return np.concatenate([tokens[: n_ctx - tail], tokens[len(tokens) - tail :]])
        head = n_agreeing(tokens, self.ids(prompt, row=0)) if prompt else 0
        head = max(head, 1 if int(tokens[0]) in self._specials else 0)
        return np.concatenate([tokens[:head], tokens[len(tokens) - (n_ctx - head) :]])


def _unique(
    rows: Sequence[_Row], start: int
) -> tuple[npt.NDArray[np.intp], list[int], dict[_Row, int]]:
    """For each row which of the different ones it is, where each of those came first, and they."""
    unique: dict[_Row, int] = {}
    place = np.fromiter((unique.setdefault(row, len(unique)) for row in rows), np.intp, len(rows))
    first_rows = [0] * len(unique)
    for row in range(len(rows) - 1, -1, -1):
        first_rows[place[row]] = start + row
    return place, first_rows, unique


def living(
    done: Sequence[Tokens | str],
    first_rows: Sequence[int],
    place: npt.NDArray[np.intp],
    start: int,
) -> tuple[list[Tokens], list[int], npt.NDArray[np.intp], tuple[tuple[int, str], ...]]:
    """Tokens, first rows and places of the texts that have tokens, and (row, reason) of others."""
    tokens = [ids for ids in done if not isinstance(ids, str)]
    if len(tokens) == len(done):
        return tokens, [*first_rows], place, ()
    reasons = {index: ids for index, ids in enumerate(done) if isinstance(ids, str)}
    lives = np.array([index not in reasons for index in range(len(done))])
    untokenized = tuple(
        (start + row, reasons[int(index)]) for row, index in enumerate(place) if index in reasons
    )
    rows = [row for row, alive in zip(first_rows, lives, strict=True) if alive]
    return tokens, rows, np.where(lives, np.cumsum(lives) - 1, -1)[place], untokenized


def _check_rows(texts: Sequence[object], start: int) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadText(start + row, f"is a {type(text).__name__}, not a str")


def n_agreeing(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
