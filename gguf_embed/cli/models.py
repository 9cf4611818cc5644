"""`gguf-embed models`: what is known, and what is on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import BadOption

if TYPE_CHECKING:
    from gguf_embed.catalog.card import ModelCard
    from gguf_embed.store.local import Source

DESCRIPTION = """\
List the known models, and the GGUF files that are here already: in this package, its store, the
Hugging Face cache and Ollama's. No network is used. Any other GGUF embedder works by its path.

  list          what is known and what is here (default)
  path NAME     the file of a model that is here
  du            how much disk the files here take, and downloads that were stopped
  rm NAME       remove a model's files from the store and the Hugging Face cache
  default NAME  the model of commands that name none; without NAME, which it is"""

EPILOG = """\
columns:
  dims       length of a vector; where there are several, --dimensions takes a shorter one
  tokens     longest text that it was trained and scored with (max_seq_length)
  at most    longest text that it takes (n_ctx_train), which is what plan and embed use
  here       the quantizations on this machine

The default is kept in the user's settings. Python's Embedder.open() goes on with the built-in one.

examples:
  gguf-embed models
  gguf-embed models --json
  gguf-embed models path qwen3-embedding-0.6b
  gguf-embed models rm bge-m3 --quant F16
  gguf-embed models default qwen3-embedding-0.6b
  gguf-embed models default all-minilm-l6-v2       the built-in one again
  gguf-embed embed notes.txt -o notes.npy --model qwen3-embedding-0.6b"""

ACTIONS = ("list", "path", "du", "rm", "default")


def add(commands: Any) -> None:
    """The parser of `models`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "models", help=COMMANDS["models"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=ACTIONS,
        default="list",
        metavar="ACTION",
        help="one of the list above",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a model, as --model takes it")
    parser.add_argument("--quant", metavar="Q", help="of path and rm: this quantization alone")
    parser.add_argument("--yes", action="store_true", help="of rm: without a question")
    parser.add_argument("--json", action="store_true", help="everything known, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what is asked; returns 0."""
    if (args.name is None) and args.action in ("path", "rm"):
        raise BadOption(f"models {args.action}: name a model; `gguf-embed models` shows them")
    if args.name is not None and args.action in ("list", "du"):
        raise BadOption(f"models {args.action} takes no name")
    actions = dict(zip(ACTIONS, (_list, _path, _du, _rm, _default), strict=True))
    actions[args.action](args)
    return 0


def _list(args: argparse.Namespace) -> None:
    from gguf_embed.catalog import catalog
    from gguf_embed.store import hub, local

    cards = catalog.cards()
    here = local.local_models(hub.places())
    others = [source for source in here if source.card is None]
    if args.json:
        known = [_card_json(card, here) for card in cards]
        console.print_json("models", {"known": known, "others": [_source_json(s) for s in others]})
        return
    columns = ("model", "kind", "parameters", "dims", "tokens", "at most", "licence", "here")
    console.print_table(columns, [_card_row(card, here) for card in cards])
    if others:
        console.out("\nother GGUF files here:")
        rows = [(s.name, s.quant or "", str(s.where or ""), str(s.path)) for s in others]
        console.print_table(("name", "quant", "where", "path"), rows)


def _path(args: argparse.Namespace) -> None:
    from gguf_embed.store import names

    source = names.named_here(args.name, args.quant)[0]
    if args.json:
        console.print_json("models-path", _source_json(source))
    else:
        console.out(str(source.path))


def _du(args: argparse.Namespace) -> None:
    from gguf_embed.store import hub, local
    from gguf_embed.store.removal import unfinished

    places = hub.places()
    here = local.local_models(places)
    stopped = unfinished(places)
    total = sum(s.n_bytes or 0 for s in here) + sum(each.n_bytes for each in stopped)
    if args.json:
        files = [_source_json(source) for source in here]
        files += [
            {"name": e.repo, "quant": None, "where": "unfinished", "file": str(e.path)}
            | {"n_bytes": e.n_bytes}
            for e in stopped
        ]
        console.print_json("models-du", {"files": files, "n_bytes": total})
        return
    rows = [(local.mib(s.n_bytes or 0), s.name, s.quant or "", str(s.where or "")) for s in here]
    rows += [(local.mib(each.n_bytes), each.repo, "", "unfinished") for each in stopped]
    console.print_table(("size", "model", "quant", "where"), rows)
    console.out(f"{local.mib(total)} in all")


def _rm(args: argparse.Namespace) -> None:
    from gguf_embed.store import hub, local, names, removal

    places = hub.places()
    going = removal.owned(names.named_here(args.name, args.quant, at=places), places)
    n_bytes = sum(source.n_bytes or 0 for source in going)
    if not args.yes:
        for source in going:
            console.say(f"{source.label_with_size}: {source.path}")
        console.confirm(f"remove {console.counted(len(going), 'file')}, {local.mib(n_bytes)}?")
    for source in going:
        removal.remove(source, places)
    if args.json:
        removed = [_source_json(source) for source in going]
        console.print_json("models-rm", {"removed": removed, "n_bytes": n_bytes})
    else:
        console.say(f"removed {console.counted(len(going), 'file')}, {local.mib(n_bytes)}")


def _default(args: argparse.Namespace) -> None:
    from gguf_embed.catalog import BUILTIN, catalog
    from gguf_embed.store import names
    from gguf_embed.system import config

    if args.name is not None:
        names.check_name(args.name)
        card = catalog.find(args.name)
        config.choose_default(None if card is not None and card.id == BUILTIN else args.name)
    model = config.default_model()
    if args.json:
        console.print_json(
            "models-default",
            {"model": model or BUILTIN, "chosen": model is not None}
            | {"file": str(config.config_path())},
        )
    elif args.name is None:
        console.out(model or BUILTIN)
    else:
        console.say(f"{model or BUILTIN} is the default from now on ({config.config_path()})")


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
