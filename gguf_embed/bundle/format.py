"""What lies in a bundle's folder: its files, its description, the vectors that prove it.

    README.md      how to install from the folder
    SHA256SUMS     the hash of every other file, as sha256sum writes and checks it
    check.py       compares the folder with SHA256SUMS, without gguf_embed
    bundle.json    what model it is, where it comes from, who made the folder, sizes
    card.toml      what the catalog knows of the model, where it knows it
    LICENCE.txt    its name and address, and its text where we have it
    canaries.json  texts and the vectors that they had here
    model/         the GGUF
    wheels/        the Python packages

The hashes tell a damaged or changed file, not a forger, who would write new ones: whoever must
rule that out compares the hash of SHA256SUMS, which both commands show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np

from gguf_embed import __version__
from gguf_embed.bundle.check import INSIDE
from gguf_embed.errors import FetchFailed
from gguf_embed.gguf import quants
from gguf_embed.store.local import ORIGIN_KEYS, SHA256, Source
from gguf_embed.store.safe_names import is_safe
from gguf_embed.vectors import Vectors

Status: TypeAlias = Callable[[str], None]

FORMAT: Final = 1
ABOUT: Final = "bundle.json"
CANARIES: Final = "canaries.json"

# Cosine between a text's vectors on two machines. One machine has several paths (flash attention,
# repacked weights, tapped or pooled, alone or in a batch): the least cosine between two of them was
# 0.99999 with weights of 16 and 32 bits, 0.9994 with quantized ones (all-MiniLM-L6-v2 and a random
# Qwen3, Q8_0 to Q2_K). Another CPU or GPU may differ more than ten times as much. Wrong pooling or
# a lost end token gives less than 0.6 with these two models.
_MIN_COSINE_FLOAT: Final = 0.999
_MIN_COSINE_QUANTIZED: Final = 0.99
MOST_BYTES: Final = 64 * 2**20  # that are read into memory of a file from elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What is known of a model's licence; None: not known."""

    name: str | None
    url: str | None
    commercial: bool | None  # whether commercial use is permitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What bundle.json says, checked: it may come from anybody."""

    source: Source  # without its card, and without a place on this machine
    licence: Licence


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Texts and their unit vectors, shape (len(texts), dim), float32."""

    texts: tuple[str, ...]
    vectors: Vectors


def min_cosine(weight_types: Iterable[str]) -> float:
    """What is asked of each canary, by the weights of the model."""
    exact = all(weight_type in quants.EXACT for weight_type in weight_types)
    return _MIN_COSINE_FLOAT if exact else _MIN_COSINE_QUANTIZED


def is_model_name(name: str) -> bool:
    """Whether a model file may be called so: it becomes a file in our store."""
    return is_safe("file", name) and bool(INSIDE.fullmatch(name)) and name.lower().endswith(".gguf")


def write_json(path: Path, value: object) -> None:
    """Write a JSON document, for people to read too."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def description_json(source: Source, licence: Licence) -> dict[str, object]:
    """bundle.json as `read_description` understands it; more may be added."""
    return {
        "format": FORMAT,
        "model": {key: getattr(source, key) for key in ORIGIN_KEYS},
        "licence": {key: getattr(licence, key) for key in ("name", "url", "commercial")},
    }


def read_description(folder: Path) -> Description:
    """What bundle.json says. Raises FetchFailed for what no bundle says."""
    said = _read_json(folder / ABOUT)
    try:
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']!r}, this gguf_embed {__version__} knows 1")
        source = Source(**{key: _origin(key, said["model"][key]) for key in ORIGIN_KEYS})
        licence = said["licence"]
        return Description(
            source=source,
            licence=Licence(
                name=_of_type(licence["name"], str, type(None)),
                url=_of_type(licence["url"], str, type(None)),
                commercial=_of_type(licence["commercial"], bool, type(None)),
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unlike(folder / ABOUT, error) from error


def read_sizes(folder: Path) -> Mapping[str, object]:
    """The bytes that each file should have, for messages only."""
    try:
        sizes = _read_json(folder / ABOUT).get("sizes")
    except FetchFailed:
        return {}
    return cast("dict[str, object]", sizes) if isinstance(sizes, dict) else {}


def read_canaries(folder: Path) -> Canaries:
    """What canaries.json says. Raises FetchFailed for what no bundle says."""
    said = _read_json(folder / CANARIES)
    try:
        texts = tuple(_of_type(text, str) for text in said["texts"])
        vectors = np.array(said["vectors"], np.float64)
        if not texts or vectors.shape[:1] != (len(texts),) or vectors.ndim != 2:
            raise ValueError(f"{len(texts)} canary texts, vectors of shape {vectors.shape}")
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
            raise ValueError("the vector of a canary is not of length 1")
    except (KeyError, TypeError, ValueError) as error:
        raise _unlike(folder / CANARIES, error) from error
    return Canaries(texts=texts, vectors=vectors.astype(np.float32))


_ORIGIN: Final = {
    "name": r"[^\x00-\x1f]{1,300}",
    "quant": quants.PATTERN,
    "sha256": SHA256.pattern,
}
_OPTIONAL: Final = frozenset({"quant", "repo"})


def _origin(key: str, value: object) -> Any:
    """One field of the model's origin: some of them become paths and names on this machine."""
    if key == "n_bytes":
        return _of_type(value, int)
    if value is None and key in _OPTIONAL:
        return None
    text: str = _of_type(value, str)
    if key == "file":
        right = is_model_name(text)
    elif key == "repo":
        right = is_safe("repository", text)
    elif key == "revision":
        right = not text or is_safe("revision", text)  # the built-in file has none
    else:
        right = bool(re.fullmatch(_ORIGIN[key], text, re.ASCII | re.IGNORECASE))
    if not right:
        raise ValueError(f"model.{key} is {value!r}")
    return text


def _of_type(value: Any, *types: type) -> Any:
    """The value, of one of these very types."""
    if type(value) not in types:
        raise TypeError(f"{value!r} is a {type(value).__name__}")
    return value


def _unlike(path: Path, error: Exception) -> FetchFailed:
    return FetchFailed(
        f"{path} is not what bundle writes: {type(error).__name__}: {error}; nothing was installed"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """An object from elsewhere; raises FetchFailed."""
    try:
        if (n_bytes := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{n_bytes} bytes, {MOST_BYTES} at most are read")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FetchFailed(f"{path} cannot be read: {error}; nothing was installed") from error
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FetchFailed(f"{path} is not JSON: {error}; nothing was installed") from error
    if not isinstance(said, dict):
        raise FetchFailed(f"{path} holds no JSON object; nothing was installed")
    return cast("dict[str, Any]", said)
