"""Vectors of a few texts from a file that nobody has proved yet, made in a child process.

The file may make llama.cpp abort its process: then it is the child's that ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import open_file
from gguf_embed.errors import BadModelFile, DoesNotFit, GgufEmbedError, NativeFailed
from gguf_embed.plan.settings import Settings
from gguf_embed.system.child import Child, take_job, tell
from gguf_embed.vectors import Vectors

# llama.cpp's own pooling without what makes it fast: the vectors that every fast path must give.
_PLAIN: Final = Settings(
    flash_attn=False, repack=False, accelerator=False, tap=False, n_contexts=1, tune=False
)


def canary_vectors(
    path: Path, card: ModelCard | None, texts: Sequence[str], *, plain: bool
) -> Vectors:
    """Vectors (len(texts), dim), each text embedded alone: quantized weights differ in company.

    `plain`: by the plainest path, not the one that is fast here. Raises BadModelFile where the
    file kills its process, and what opening and embedding raise.
    """
    job = {
        "path": str(path.absolute()),
        "card": card.id if card else None,
        "texts": list(texts),
        "plain": plain,
    }
    answer: dict[str, Any] | None = None
    with Child("gguf_embed.bundle.canary_child", job) as child:
        for said in child.answers():
            if "failure" in said:
                raise _error(said)
            answer = said
        ending = child.ending
    if answer is not None and ending.ok:
        return np.array(answer["vectors"], np.float32)
    if ending.crashed:
        raise BadModelFile(
            f"{path.name}: llama.cpp dies of this file: {ending.reason}; do not use it. "
            "gguf-embed doctor tells whether llama.cpp works here"
        )
    raise NativeFailed(f"{path.name}: its process gave no vectors: {ending.reason or 'none said'}")


def _error(said: Mapping[str, Any]) -> GgufEmbedError:
    """The error that the child met."""
    message = str(said["failure"])
    if said["kind"] == "DoesNotFit":
        needed, free = int(said["needed_bytes"]), int(said["free_bytes"])
        return DoesNotFit(message, needed_bytes=needed, free_bytes=free)
    return BadModelFile(message) if said["kind"] == "BadModelFile" else NativeFailed(message)


def _work(job: Mapping[str, Any]) -> dict[str, Any]:
    """In the child: the vectors, or the error."""
    path, settings = Path(job["path"]), _PLAIN if job["plain"] else Settings(tune=False)
    card = catalog.find(job["card"]) if job["card"] else None
    try:
        with Embedder(open_file(path, card, settings)) as embedder:
            vectors = np.stack([embedder.encode(text, truncate="end") for text in job["texts"]])
    except GgufEmbedError as error:
        numbers: dict[str, Any] = {}
        if isinstance(error, DoesNotFit):
            numbers = {"needed_bytes": error.needed_bytes, "free_bytes": error.free_bytes}
        return {"failure": str(error), "kind": type(error).__name__, **numbers}
    return {"vectors": vectors.tolist()}


if __name__ == "__main__":
    tell(_work(take_job()))
