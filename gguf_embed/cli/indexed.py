"""`gguf-embed search --index`: options, and the search in what was embedded before."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_embed.cli import console, options
from gguf_embed.cli.hits import ShownHit, near
from gguf_embed.errors import BadInput, BadOption, counted

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.reranker import Reranker
    from gguf_embed.index.facts import IndexFacts
    from gguf_embed.index.index import Hit, Index

# Options of a search without an index.
_OF_FILES = ("field", "id_field", "prose", "include", "cache")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--index, and what is for it alone."""
    group = parser.add_argument_group("index")
    group.add_argument(
        "--index", metavar="NAME|PATH", help="search what `gguf-embed index` has embedded"
    )
    group.add_argument(
        "--by",
        choices=("both", "meaning", "words"),
        default="both",
        help="rank by meaning and words together (default), or by one of them; words need no model",
    )
    options.add_path(group)
    group.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="in files with such metadata only: lang=en, 'date>=2024-05', 'date<=2024'; may be "
        "repeated, and all must hold",
    )
    group.add_argument("--all", action="store_true", help="all results, not --top of them")
    group.add_argument(
        "--min-score", type=float, metavar="X", help="only results with at least this score"
    )
    group.add_argument(
        "--files", action="store_true", help="the files with their best scores, not the passages"
    )
    group.add_argument(
        "--context", type=int, metavar="N", help="whole passages, with N lines around each"
    )
    group.add_argument(
        "--open",
        action="store_true",
        help="open the best result in $VISUAL or $EDITOR, at its line",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that contradict one another. Raises BadOption."""
    if args.index is None:
        if not args.inputs:
            raise BadOption(
                "the following arguments are required: INPUT; see gguf-embed search --help"
            )
        given = [name for name in ("path", "where", "all", "files", "open") if getattr(args, name)]
        given += ["min_score"] if args.min_score is not None else []
        given += ["context"] if args.context is not None else []
        given += ["by"] if args.by != "both" else []
        if given:
            option = given[0].replace("_", "-")
            raise BadOption(f"--{option}: is for a search with --index NAME; leave it out")
        return
    if args.inputs:
        raise BadOption(
            f"{args.inputs[0]}: with --index only what is in it is searched; leave the input out, "
            f"or choose files of the index with --path {shlex.quote(args.inputs[0])}"
        )
    if others := [name for name in _OF_FILES if getattr(args, name)]:
        option = others[0].replace("_", "-")
        raise BadOption(f"--{option}: is for a search without --index; leave it out")
    if args.context is not None and args.context < 0:
        raise BadOption(f"--context {args.context}: give a number of lines, from 0")


def search(args: argparse.Namespace, reranker: Reranker | None) -> int:
    """Print the best passages of the index; returns 0, also when there is none."""
    from gguf_embed.index.index import Index

    with Index.open(args.index) as index:
        if args.by == "words":
            found = _found(index, None, args, reranked=reranker is not None)
        else:
            with open_for(index.facts, args) as embedder:
                found = _found(index, embedder, args, reranked=reranker is not None)
        hits = _judged(found, reranker, args)
        status = index.status()
        if status.unfinished and not args.quiet:
            console.say(
                f"{args.index}: {counted(status.unfinished, 'file')} not yet in the index: its "
                f"update runs, or was cut off: gguf-embed index -o {shlex.quote(args.index)}"
            )
        if args.json:
            about: dict[str, object] = {
                "query": args.query,
                "index": args.index,
                "by": args.by,
                "model": index.facts.space.model_id,
                "quant": index.facts.space.quant,
            }
            about |= {"reranker": reranker.model_id} if reranker else {}
            results = [shown.as_dict() for _, shown in hits]
            console.print_json(
                "search", {**about, "n_passages": status.n_passages, "results": results}
            )
        else:
            _print(index, hits, args)
    if not hits:
        console.say(f"no passage in {args.index} for this question")
    elif args.open:
        open_in_editor(hits[0][0].path, hits[0][0].passage.first_line)
    return 0


def open_for(facts: IndexFacts, args: argparse.Namespace) -> Embedder:
    """The embedder of an index, or the one that the user names."""
    settings = options.settings(args)
    if args.model is None and settings.quant is None:
        settings = replace(settings, quant=_quant_of(facts))
    return options.open_embedder(args.model or facts.space.model, settings, quiet=args.quiet)


def _quant_of(facts: IndexFacts) -> str | None:
    """The quantization to ask for: a file has its own."""
    return None if facts.space.model.lower().endswith(".gguf") else facts.space.quant


def _found(
    index: Index, embedder: Embedder | None, args: argparse.Namespace, *, reranked: bool
) -> list[Hit]:
    top: int | None = args.top
    if reranked:
        top = max(args.top, args.candidates)
    elif args.all:
        top = None
    found = index.search(
        args.query,
        embedder,
        top=None if args.files else top,
        by=args.by,
        paths=args.path,
        where=args.where,
        min_score=None if reranked else args.min_score,
    )
    if args.files:
        best: dict[Path, Hit] = {}
        for hit in found:
            best.setdefault(hit.path, hit)
        found = list(best.values())
    return found if top is None else found[:top]


def _judged(
    found: list[Hit], reranker: Reranker | None, args: argparse.Namespace
) -> list[tuple[Hit, ShownHit]]:
    if reranker is None:
        return [(hit, ShownHit.of_index(hit, hit.score)) for hit in found]
    ranked = reranker.rank(
        args.query, [hit.passage.text for hit in found], top=None if args.all else args.top
    )
    least: float = -1.0 if args.min_score is None else args.min_score
    return [
        (
            found[each.index],
            ShownHit.of_index(
                found[each.index], each.score, fused=round(found[each.index].score, 6)
            ),
        )
        for each in ranked
        if each.score >= least
    ]


def _print(index: Index, hits: list[tuple[Hit, ShownHit]], args: argparse.Namespace) -> None:
    for rank, (hit, shown) in enumerate(hits, 1):
        if args.files:
            place = console.linked(near(hit.path), hit.path)
            about = f"  [{console.plain(hit.folder.about)}]" if hit.folder.about else ""
            console.out(f"{rank:>2}  {shown.score:.3f}  {place}{about}")
            continue
        excerpt = None
        if args.context is not None:
            first = max(1, hit.passage.first_line - args.context)
            excerpt = index.lines(str(hit.path), first, hit.passage.last_line + args.context)
        shown.print(rank, excerpt)


def open_in_editor(path: Path, line: int) -> None:
    """Open a file at a line in the user's editor, and wait for it. Raises BadInput."""
    from gguf_embed.system.child import run_for_user

    editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "")
    if not editor:
        raise BadInput("--open: no editor is known; set EDITOR, such as: export EDITOR=vi")
    name = Path(editor[0]).stem
    place = [f"+{line}", str(path)]  # what most editors take
    if name in ("code", "codium", "cursor"):
        place = ["--goto", f"{path}:{line}"]
    elif name in ("subl", "zed", "hx"):
        place = [f"{path}:{line}"]
    if run_for_user([*editor, *place]) is None:
        raise BadInput(f"--open: {editor[0]} does not start; set EDITOR to one that does")
