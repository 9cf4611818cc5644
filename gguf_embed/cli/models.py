"""`gguf-embed models`: what is known, and what is on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console
from gguf_embed.cli.commands import COMMANDS

if TYPE_CHECKING:
    from gguf_embed.catalog.card import ModelCard
    from gguf_embed.store.local import Source

DESCRIPTION = """\
List the known models, and the GGUF files that are here already: in this package, its store, the
Hugging Face cache and Ollama's. No network is used. Any other GGUF embedder works by its path."""

EPILOG = """\
columns:
  dims       length of a vector; where there are several, --dimensions takes a shorter one
  tokens     longest text that it was trained and scored with (max_seq_length)
  at most    longest text that it takes (n_ctx_train), which is what plan and embed use
  here       the quantizations on this machine

examples:
  gguf-embed models
  gguf-embed models --json
  gguf-embed embed notes.txt -o notes.npy --model qwen3-embedding-0.6b"""


def add(commands: Any) -> None:
    """The parser of `models`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "models", help=COMMANDS["models"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("--json", action="store_true", help="everything known, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the models; returns 0."""
    from gguf_embed.catalog import catalog
    from gguf_embed.store import hub
    from gguf_embed.store import local as store

    cards = catalog.cards()
    here = store.local_models(hub.places())
    others = [source for source in here if source.card is None]
    if args.json:
        known = [_card_json(card, here) for card in cards]
        console.print_json("models", {"known": known, "others": [_source_json(s) for s in others]})
        return 0
    columns = ("model", "kind", "parameters", "dims", "tokens", "at most", "licence", "here")
    console.print_table(columns, [_card_row(card, here) for card in cards])
    if others:
        console.out("\nother GGUF files here:")
        rows = [(s.name, s.quant or "", str(s.where or ""), str(s.path)) for s in others]
        console.print_table(("name", "quant", "where", "path"), rows)
    return 0


def _files(card: ModelCard, here: tuple[Source, ...]) -> list[Source]:
    return [source for source in here if source.card is not None and source.card.id == card.id]


def _card_row(card: ModelCard, here: tuple[Source, ...]) -> tuple[str, ...]:
    dims = (card.dim, *card.mrl_dims)
    quants = dict.fromkeys(source.quant or "?" for source in _files(card, here))
    return (
        card.id,
        card.kind,
        "" if card.parameters is None else f"{card.parameters / 1e6:,.0f} M",
        f"{card.mrl_min}-{card.dim}" if card.mrl_min else ", ".join(map(str, dims)),
        f"{card.max_seq_length:,}",
        "" if card.n_ctx_train is None else f"{card.n_ctx_train:,}",
        card.licence if card.commercial else f"{card.licence} (non-commercial)",
        ", ".join(quants),
    )


def _card_json(card: ModelCard, here: tuple[Source, ...]) -> dict[str, object]:
    return {
        "id": card.id,
        "title": card.title,
        "kind": card.kind,
        "names": card.names,
        "parameters": card.parameters,
        "dim": card.dim,
        "mrl_min": card.mrl_min,
        "mrl_dims": card.mrl_dims,
        "max_seq_length": card.max_seq_length,
        "n_ctx_train": card.n_ctx_train,
        "pooling": card.pooling.name.lower(),
        "prompts": dict(card.prompts),
        "languages": card.languages,
        "licence": card.licence,
        "commercial": card.commercial,
        "files": [
            {
                "quant": file.quant,
                "repo": file.repo,
                "name": file.name,
                "n_bytes": file.n_bytes,
                "sha256": file.sha256,
            }
            for file in card.files
        ],
        "here": [_source_json(source) for source in _files(card, here)],
    }


def _source_json(source: Source) -> dict[str, object]:
    return {
        "name": source.name,
        "quant": source.quant,
        "where": source.where,
        "file": str(source.path),
        "n_bytes": source.n_bytes,
    }
