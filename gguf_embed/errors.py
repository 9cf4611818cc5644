"""Every error a caller can meet, in one tree.

    GgufEmbedError
    |-- BadInput              what was given cannot be used: rows, files, options
    |   |-- BadText           one row: not a string, not UTF-8, a lone surrogate
    |   |-- TextTooLong       rows longer than the model's context, all of them named
    |   `-- BadOption         an option, prompt name, dimension or file name
    |-- BadModelFile          not a GGUF, damaged, or no embedder
    |-- ModelNotFound         no such model here or on the Hub; names what is near
    |-- DoesNotFit            memory or disk: needed and free bytes
    |-- FetchFailed           network, permission, or a file whose hash is wrong
    |-- OutputFailed          the result could not be written; nothing was replaced
    `-- NativeFailed          llama.cpp refused, crashed in its child, or returned NaN

A message says what, where, the numbers and the next step. `exit_code` is what the
command line returns for it.
"""

from __future__ import annotations

from collections.abc import Sequence


class GgufEmbedError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class BadInput(GgufEmbedError):
    """What the caller gave cannot be used."""

    exit_code = 2


class BadText(BadInput):
    """One text cannot be embedded; `row` is its position in the input."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


class TextTooLong(BadInput):
    """Texts longer than the context; `rows` holds (row, n_tokens) for every one of them."""

    def __init__(self, rows: Sequence[tuple[int, int]], n_ctx: int) -> None:
        shown = ", ".join(f"row {row}: {n} token{'' if n == 1 else 's'}" for row, n in rows[:5])
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        super().__init__(
            f"{counted(len(rows), 'text')} longer than {n_ctx} tokens ({shown}{more}); "
            "split them, or cut them with truncate='end' or 'start' (--truncate end|start)"
        )
        self.rows = tuple(rows)
        self.n_ctx = n_ctx

    def of_question(self, model: str) -> BadInput:
        """The same where the text is the question of a search."""
        return BadInput(
            f"the question has {self.rows[0][1]} tokens, {model} takes {self.n_ctx}; ask a "
            "shorter one"
        )


class BadOption(BadInput):
    """An option or a name that cannot be honoured."""


class BadModelFile(GgufEmbedError):
    """A file that is not a usable GGUF embedder."""

    exit_code = 3


class ModelNotFound(GgufEmbedError):
    """No such model here or on the Hub."""

    exit_code = 4


class DoesNotFit(GgufEmbedError):
    """Too little memory or disk; carries the numbers."""

    exit_code = 5

    def __init__(self, message: str, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class FetchFailed(GgufEmbedError):
    """A download failed or did not match its hash."""

    exit_code = 6


class OutputFailed(GgufEmbedError):
    """The result could not be written; an older file of that name is untouched."""

    exit_code = 7


class NativeFailed(GgufEmbedError):
    """llama.cpp refused, crashed in its child process, or returned NaN."""

    exit_code = 8


def counted(n: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time for people, as rough as they need it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def kind_of(value: object) -> str:
    """ "a float", "an int", "None": what a value is, in words."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def shown(value: object) -> str:
    """A value in a message: shortened, and safe whatever its repr does."""
    try:
        shown = repr(value)
    except Exception:  # a foreign __repr__
        return kind_of(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
