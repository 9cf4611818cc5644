"""What made vectors, as it stands beside them and in them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_embed import __version__
from gguf_embed.cli import chunking
from gguf_embed.system.files import printable

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.fingerprint import Fingerprint
    from gguf_embed.plan.plan import Plan


def fingerprint(embedder: Embedder, prompt: str, args: argparse.Namespace) -> Fingerprint:
    """The space of the vectors that `embed` makes."""
    made = embedder.fingerprint(
        prompt=prompt, dimensions=args.dimensions, normalize=not args.no_normalize
    )
    if args.late_chunking:  # another space than that of texts alone
        return replace(made, pooling=f"late-{made.pooling}")
    return made


def made_with(
    embedder: Embedder, prompt: str, args: argparse.Namespace, *, chunks: bool
) -> dict[str, object]:
    """The same for the same command, on any machine that runs the same file for as long texts."""
    space = fingerprint(embedder, prompt, args)
    return {
        "format": "gguf-embed-vectors/1",
        "fingerprint": space.id,
        "model": embedder.model_id,
        "quant": embedder.quant,
        "model_file": printable(Path(embedder.path.name)),
        "sha256": space.sha256,
        "pooling": space.pooling,
        "prompt": space.prompt,
        "dim": space.dim,
        "normalized": space.normalized,
        "n_ctx": embedder.n_ctx,
        "exact": args.exact,
        "truncate": args.truncate,
        **(chunking.about(embedder, args) if chunks else {}),
        "gguf_embed": __version__,
    }


def plan_of(plan: Plan) -> dict[str, object]:
    """Why this file, and where it ran."""
    return {
        "reason": plan.reason,
        "where": plan.chosen.where,
        "n_gpu_layers": plan.run.n_gpu_layers,
        "fit": plan.fit,
    }
