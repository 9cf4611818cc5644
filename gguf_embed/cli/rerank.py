"""`gguf-embed rerank`: the texts of files in the order in which they answer a question."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import TYPE_CHECKING, Any

from gguf_embed.catalog import RERANKER
from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.hits import ShownHit
from gguf_embed.errors import BadInput, BadOption, BadText, NativeFailed, TextTooLong, counted
from gguf_embed.io.best import Best
from gguf_embed.io.flow import Flow, place

if TYPE_CHECKING:
    from gguf_embed.engine.options import Ranked
    from gguf_embed.engine.reranker import Reranker
    from gguf_embed.io.record import Record

WINDOW = 1024  # texts scored together

DESCRIPTION = """\
Order texts by how well they answer a question. A reranker reads question and text together: it
judges better than a comparison of vectors, and takes much longer for each text. Give it what a
search has found, or use `gguf-embed search --rerank`.

Files are read as `gguf-embed embed` reads them: a line of .txt, a passage of .md, a row of .jsonl
or .csv is a text. Scores are from 0 to 1. A text that does not fit beside the question loses its
end, and is counted.

With --isolated the model runs in a child process, and a text that llama.cpp dies of costs itself
only. It is the default from 1 MiB of files on."""

EPILOG = """\
examples:
  gguf-embed rerank "how do refunds work?" candidates.txt
  gguf-embed rerank "late delivery" tickets.csv --field body --id-field number --top 20
  gguf-embed rerank "who wrote this?" found.jsonl --model bge-reranker-v2-m3 --json
  gguf-embed rerank "how do refunds work?" candidates.txt --server http://127.0.0.1:11434
  gguf-embed rerank "is it a bug?" issues.txt --task "Decide whether the text reports a bug\""""


def add(commands: Any) -> None:
    """The parser of `rerank`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "rerank", help=COMMANDS["rerank"], description=DESCRIPTION, epilog=EPILOG
    )
    options.add_query(parser, top=10)
    parser.add_argument(
        "--task", metavar="TEXT", help="what the text is judged by, for a model that is told"
    )
    parser.add_argument(
        "--truncate",
        choices=("end", "error"),
        default="end",
        help="a text that does not fit beside the question: end (default) cuts its end off, error "
        "names every such text",
    )
    options.add_reranker(parser)
    parser.add_argument(
        "--server",
        metavar="URL",
        help="the reranker that `gguf-embed serve` has there, without --model its first one; a key "
        "is taken from GGUF_EMBED_API_KEY",
    )
    parser.add_argument(
        "--isolated",
        action=argparse.BooleanOptionalAction,
        help="the model in a child process (default: from 1 MiB of files on)",
    )
    group = parser.add_argument_group("report")
    group.add_argument("--json", action="store_true", help="results as one JSON document")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the best texts; returns 0, or the code of NativeFailed where texts have no score."""
    from gguf_embed.io.read import given, read
    from gguf_embed.io.record import Reading, check_unicode

    if not args.query.strip():
        raise BadOption("the question is empty; say what to look for")
    (query,) = given([args.query], source="QUERY")
    check_unicode(args.task or "", "--task")
    sources = options.find(args.inputs, args, quiet=args.quiet)
    reading = Reading(field=args.field, id_field=args.id_field, prose=args.prose)
    records = read(sources, reading, stdin=console.stdin())
    total = sources.total_bytes
    with _opened(args, isolated=options.isolated(args, total)) as reranker:
        best: Best[ShownHit] = Best(args.top)
        n_documents = n_truncated = n_scored = 0
        with console.progress("rerank", total, quiet=args.quiet) as progress:
            flow = Flow((each for each in records if each.text.strip()), progress, keep_texts=True)
            texts = flow.texts()
            while window := list(islice(texts, WINDOW)):
                for ranked, record in _scored(reranker, query.text, window, flow, args):
                    n_truncated += ranked.truncated
                    n_scored += 1
                    how = {"n_tokens": ranked.n_tokens, "truncated": ranked.truncated}
                    best.add(ranked.score, ShownHit.of_record(ranked.score, record, **how))
                n_documents += len(window)
        found = [hit for _, hit in best.sorted()]
        code = 0 if n_scored == n_documents else NativeFailed.exit_code
        if args.json:
            console.print_json(
                "rerank",
                {
                    "query": args.query,
                    "model": reranker.model_id,
                    "quant": reranker.quant,
                    "task": args.task or reranker.default_task,
                    "n_documents": n_documents,
                    "n_failed": n_documents - n_scored,
                    "n_truncated": n_truncated,
                    "results": [hit.as_dict() for hit in found],
                },
            )
            return code
    for rank, hit in enumerate(found, 1):
        hit.print(rank)
    if not found:
        console.say(f"no text in {', '.join(args.inputs)}")
    return code


def _opened(args: argparse.Namespace, *, isolated: bool) -> Reranker:
    """The model here, or the one that is served elsewhere."""
    if args.server is not None:
        from gguf_embed.engine.reranker import Reranker

        return Reranker.connect(args.server, args.model)
    model: str = args.model or RERANKER
    return options.open_reranker(model, options.settings(args), quiet=args.quiet, isolated=isolated)


def _scored(
    reranker: Reranker, query: str, texts: list[str], flow: Flow, args: argparse.Namespace
) -> list[tuple[Ranked, Record]]:
    """The texts of a window with their scores; what cannot be scored is told by file and line."""
    try:
        ranked = reranker.rank(
            query,
            texts,
            top=None,
            task=args.task,
            truncate=args.truncate,
            on_progress=flow.advance,
            on_error="skip",
        )
    except BadText as error:
        raise BadInput(f"{place(flow.find([error.row])[0])}: {error}") from error
    except TextTooLong as error:
        long = sorted(error.rows)
        for record, (_, n) in zip(flow.find([row for row, _ in long]), long, strict=True):
            console.say(f"{place(record)}: {n} tokens with the question")
        raise BadInput(
            f"{counted(len(long), 'text')} too long: with the question beside it a text may take "
            f"{error.n_ctx} tokens of {reranker.model_id}; cut with --truncate end, or split"
        ) from error
    records = flow.take(len(texts))
    scored = {each.index for each in ranked}
    for index, record in enumerate(records):
        if index not in scored:
            console.say(f"{place(record)}: no score: llama.cpp gives NaN for it, or dies of it")
    return [(each, records[each.index]) for each in ranked]
