"""What a vector space is: vectors with equal fingerprints may be compared, others may not."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from gguf_embed.errors import OutputFailed
from gguf_embed.store.local import SHA256, file_sha256
from gguf_embed.system.files import write_whole
from gguf_embed.system.paths import home

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """All that decides what a vector means."""

    sha256: str  # of the model file
    pooling: str
    causal: bool
    special_tokens: tuple[int, ...]  # those around every text
    prompt: str  # in front of every text
    dim: int  # after a cut
    normalized: bool

    @property
    def id(self) -> str:
        """16 hex digits: the same for the same vector space, on any machine."""
        facts = json.dumps(asdict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, object]:
        """The id and the facts, for metadata; fits into JSON."""
        return {"id": self.id, **asdict(self), "special_tokens": list(self.special_tokens)}


def known_sha256(path: Path) -> str:
    """The hash of a model file: computed once, and kept for as long as the file is the same."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    kept = _kept()
    if key in kept:
        return kept[key]
    sha256 = file_sha256(path)
    # Only the newest of each path: an older one is of bytes that are gone.
    others = {k: v for k, v in kept.items() if not k.startswith(f"{path.resolve()}|")}
    try:
        write_whole(_hashes(), json.dumps({**others, key: sha256}, indent=1), make_folder=True)
    except OutputFailed as error:
        _log.info("the hash is computed again next time: %s", error)
    return sha256


def _hashes() -> Path:
    return home() / "hashes.json"


def _kept() -> Mapping[str, str]:
    """What was computed before; {} where there is nothing, or nothing that can be read."""
    try:
        kept: Any = json.loads(_hashes().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict):
        return {}
    items = cast("dict[object, object]", kept).items()
    return {
        key: value
        for key, value in items
        if isinstance(key, str) and isinstance(value, str) and SHA256.fullmatch(value)
    }
