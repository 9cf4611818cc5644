"""What callers may give to an Embedder: checked in one place, before anything is computed.

Whatever is given, only errors of `gguf_embed.errors` come out, and they say what to pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard, cast, get_args

import numpy as np

from gguf_embed.engine.options import EncodeOptions, OnError, RerankOptions, Truncate
from gguf_embed.engine.turns import Priority
from gguf_embed.errors import BadInput, BadOption, kind_of, shown
from gguf_embed.plan.settings import Settings
from gguf_embed.plan.values import check_number, check_switch
from gguf_embed.vectors import Vectors

_TRUNCATE: Final = get_args(Truncate)
_ON_ERROR: Final = get_args(OnError)
_TEXTS: Final = "pass one str, or a list or another iterable of str"
_VECTORS: Final = "pass float arrays of shape (n, dim) or (dim,)"


def check_model(model: object) -> str | Path:
    """The name or path of a model. Raises BadInput."""
    if isinstance(model, str):
        return model
    given = model
    if isinstance(model, os.PathLike):
        path: object = os.fspath(cast("os.PathLike[Any]", model))
        if isinstance(path, str):
            return Path(path)
    raise BadInput(f"model={shown(given)}: pass the name of a model or the path of a GGUF file")


def check_settings(settings: object) -> Settings:
    """Settings. Raises BadOption."""
    if not isinstance(settings, Settings):
        raise BadOption(f"settings={shown(settings)}: pass Settings(...)")
    return settings


def check_opening(
    model: object,
    settings: object,
    isolated: object,
    *,
    on_status: object,
    on_download: object,
) -> tuple[str | Path, Settings, bool]:
    """What opens a model, with the settings that nobody gave. Raises BadInput, BadOption."""
    name = check_model(model)
    check_callback("on_status", on_status)
    check_callback("on_download", on_download)
    given = check_settings(Settings() if settings is None else settings)
    return name, given, check_switch("isolated", isolated)


def check_text(text: object, what: str = "the text") -> str:
    """One text. Raises BadInput."""
    if not isinstance(text, str):
        raise BadInput(f"{what} is {kind_of(text)}; pass one str")
    return text


def check_texts(texts: object) -> Iterator[str]:
    """The texts of a str or an iterable, in order; what each is, is checked when it comes.

    Raises BadInput for what would give something else in silence: the keys of a dict, the column
    names of a table, a set in no order, the numbers of bytes.
    """
    if isinstance(texts, str):
        return iter([texts])
    if isinstance(texts, (bytes, bytearray, memoryview)):
        name = type(cast("object", texts)).__name__
        raise BadInput(f"texts are {name}; decode them, such as by bytes.decode")
    if isinstance(texts, Mapping):
        raise BadInput("texts are a mapping; pass list(texts.values()), or the keys as a list")
    if isinstance(texts, (set, frozenset)):
        raise BadInput("texts are a set, which has no order; pass a list, such as sorted(texts)")
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise BadInput(f"texts are {kind_of(texts)}; pass one column of it")
    shape = getattr(texts, "shape", None)
    if isinstance(shape, tuple) and len(cast("tuple[object, ...]", shape)) != 1:
        raise BadInput(f"texts are an array of shape {shape}; {_TEXTS}")
    try:
        return iter(cast("Iterable[str]", texts))
    except TypeError:
        raise BadInput(f"texts are {kind_of(texts)}; {_TEXTS}") from None


def is_token_ids(text: object) -> TypeGuard[list[int]]:
    """Whether one text came as token ids."""
    ids = cast("list[object]", text) if isinstance(text, list) else []
    return bool(ids) and all(type(each) is int for each in ids)


def check_token_ids(texts: object) -> list[list[int]]:
    """Texts that came as lists of token ids. Raises BadInput."""
    rows: list[list[int]] = []
    for row, text in enumerate(cast("Iterable[object]", texts)):
        ids = [*cast("list[object]", text)] if isinstance(text, (list, tuple)) else []
        if not ids or not all(type(each) is int and abs(each) < 2**31 for each in ids):
            said = shown(cast("object", text))
            raise BadInput(f"row {row} is {said}; pass all texts as str, or all as token ids")
        rows.append(cast("list[int]", ids))
    return rows


def check_names(
    options: Mapping[str, object],
    kind: type[EncodeOptions] | type[RerankOptions] = EncodeOptions,
) -> None:
    """Refuse options that the typed dictionary `kind` does not have. Raises BadOption."""
    known = sorted(kind.__required_keys__ | kind.__optional_keys__)
    for name in options:
        if name not in known:
            raise BadOption(f"there is no option {name!r}; the options are {', '.join(known)}")


def check_string(name: str, value: object) -> str | None:
    """A str or None. Raises BadOption."""
    if value is not None and not isinstance(value, str):
        raise BadOption(f"{name}={shown(value)}: pass a str, or leave it out")
    return value


def check_max_tokens(value: object, n_ctx: int) -> int:
    """Tokens of the longest text of a call. Raises BadOption."""
    if value is None:
        return n_ctx
    number = check_number("max_tokens", value, least=3)  # both ends, and a token of its own
    if number > n_ctx:
        raise BadOption(
            f"max_tokens={number}: this model was opened for n_ctx={n_ctx}; pass less, or open it "
            f"with Settings(n_ctx={number})"
        )
    return number


def check_truncate(value: object) -> Truncate:
    """One of the three. Raises BadOption."""
    if isinstance(value, str) and value in _TRUNCATE:
        return cast("Truncate", value)
    raise BadOption(f"truncate={shown(value)}: choose 'error', 'end' or 'start'")


def check_document_truncate(value: object) -> Literal["end", "error"]:
    """One of the two. Raises BadOption."""
    if value == "end" or value == "error":
        return "end" if value == "end" else "error"
    raise BadOption(f"truncate={shown(value)}: choose 'end' or 'error'")


def check_on_error(value: object) -> OnError:
    """One of the two. Raises BadOption."""
    if isinstance(value, str) and value in _ON_ERROR:
        return cast("OnError", value)
    raise BadOption(f"on_error={shown(value)}: choose 'raise' or 'skip'")


def check_priority(value: object) -> Priority:
    """A Priority. Raises BadOption."""
    if isinstance(value, Priority):
        return value
    names = ", ".join(f"Priority.{priority.name}" for priority in Priority)
    raise BadOption(f"priority={shown(value)}: choose {names}")


def check_callback(name: str, value: object) -> None:
    """A function or None. Raises BadOption."""
    if value is not None and not callable(value):
        raise BadOption(f"{name}={shown(value)}: pass a function, or leave it out")


def check_vectors(a: object, b: object) -> tuple[Vectors, Vectors]:
    """Two sets of vectors of one length, float32 of shape (n, dim). Raises BadInput."""
    left, right = (_matrix(name, value) for name, value in (("a", a), ("b", b)))
    if left.shape[1] != right.shape[1]:
        raise BadInput(
            f"vectors of {left.shape[1]} and of {right.shape[1]} values have no cosine; embed both "
            "with one model and the same dimensions"
        )
    return left, right


def _matrix(name: str, value: object) -> Vectors:
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the conversion of a foreign object raises
        raise BadInput(
            f"{name} is {kind_of(value)} that is no array ({error}); {_VECTORS}"
        ) from None
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or array.shape[-1] == 0:
        raise BadInput(f"{name} is an array of {array.dtype} of shape {array.shape}; {_VECTORS}")
    with np.errstate(all="ignore"):  # too large for float32: found below
        matrix = np.atleast_2d(array).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise BadInput(f"row {bad[0]} of {name} has NaN or an infinite value; embed its text again")
    return matrix
