"""`gguf-embed search`: the passages of files that answer a question best."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from gguf_embed.catalog import RERANKER
from gguf_embed.cli import console, indexed, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.hits import ShownHit
from gguf_embed.errors import BadInput, BadOption, TextTooLong
from gguf_embed.io.best import Best
from gguf_embed.io.flow import Flow

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.options import Block, EncodeOptions
    from gguf_embed.engine.reranker import Reranker
    from gguf_embed.io.record import Record
    from gguf_embed.jobs.cache import VectorCache
    from gguf_embed.plan.settings import Settings

# Models are trained on passages of about this length; longer ones answer less sharply.
PASSAGE_TOKENS = 200
MAX_NAMED = 5  # files that are passed over

DESCRIPTION = """\
Rank passages of files by meaning: the cosine of the question's vector and each passage's, the
query and document prompts of the model included. Without --index nothing is stored:

  .md              sections, cut between paragraphs
  .txt             a passage per line; with --prose paragraphs, as .md
  .jsonl, .csv     a passage per row: --field
  DIR              all such files in it and below;   - is standard input
Texts of more than 200 tokens are cut into several passages; blank ones are passed over. So is a
file in a DIR that holds no such texts, such as a .jsonl of vectors; it is named.

With --index NAME the passages of that index are ranked, which `gguf-embed index` makes: by meaning
and by words together (BM25), or as --by says. The model is that of the index. A result shows its
score, file, lines and id, the headings above it, and what its folder is about. `gguf-embed show ID`
prints it with its surroundings."""

EPILOG = """\
examples:
  gguf-embed search "how do I use this without internet?" README.md docs/
  gguf-embed search "late delivery" tickets.csv --field body --id-field number --top 20
  gguf-embed search "who is to blame?" novel.txt --prose
  gguf-embed search "how do refunds work?" handbook/ --rerank qwen3-reranker:0.6b
  git log --format=%s | gguf-embed search "memory leak" - --json
  gguf-embed search "how do refunds work?" --index handbook
  gguf-embed search "EACCES" --index handbook --by words --path '*.md' --context 3
  gguf-embed search "travel policy" --index handbook --all --min-score 0.5 --files"""


def add(commands: Any) -> None:
    """The parser of `search`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "search", help=COMMANDS["search"], description=DESCRIPTION, epilog=EPILOG
    )
    options.add_query(parser, top=5, may_be_indexed=True)
    parser.add_argument(
        "--rerank",
        metavar="MODEL",
        help=f"order the best passages anew by a reranker, such as {RERANKER}: slower, and "
        "it judges better",
    )
    parser.add_argument(
        "--candidates",
        type=options.positive,
        default=50,
        metavar="N",
        help="passages that --rerank judges (default: %(default)s)",
    )
    indexed.add_options(parser)
    options.add_cache(parser)
    parser.add_argument("--json", action="store_true", help="results as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options.add_model(parser)
    parser.set_defaults(model=None, run=run)


def run(args: argparse.Namespace) -> int:
    """Print the best passages; returns 0, also when there is none."""
    if not args.query.strip():
        raise BadOption("the question is empty; say what to look for")
    indexed.check(args)
    with ExitStack() as held:
        reranker: Reranker | None = None
        if args.rerank:  # first: a wrong name is told before the work
            reranker = held.enter_context(
                options.open_reranker(args.rerank, _rerank_settings(args), quiet=args.quiet)
            )
        if args.index is not None:
            return indexed.search(args, reranker)
        return _search(args, reranker)


def _search(args: argparse.Namespace, reranker: Reranker | None) -> int:
    """Over files that are read and embedded now."""
    from gguf_embed.io.read import given, read
    from gguf_embed.io.record import Reading

    (query,) = given([args.query], source="QUERY")
    bad: list[BadInput] = []  # what is wrong with files of directories
    sources = options.find(args.inputs, args, quiet=args.quiet, on_bad=bad.append)
    reading = Reading(field=args.field, id_field=args.id_field, prose=args.prose)
    records = read(sources, reading, stdin=console.stdin(), on_bad=bad.append)
    with options.open_embedder(
        args.model or options.default_model(), options.settings(args), quiet=args.quiet
    ) as embedder:
        best: Best[Record] = Best(max(args.top, args.candidates) if reranker else args.top)
        with (
            options.opened_cache(args) as cache,
            console.progress("search", sources.total_bytes, quiet=args.quiet) as progress,
        ):
            flow = Flow(_passages(embedder, records), progress, keep_texts=True)
            _nearest(embedder, query.text, flow, best, cache)
        for error in () if args.quiet else bad[:MAX_NAMED]:
            console.say(f"passed over: {error}")
        if len(bad) > MAX_NAMED and not args.quiet:
            console.say(f"passed over: {console.counted(len(bad) - MAX_NAMED, 'other file')}")
        found = best.sorted()
        if reranker is None:
            hits = [ShownHit.of_record(score, record) for score, record in found]
        else:
            ranked = reranker.rank(query.text, [each.text for _, each in found], top=args.top)
            hits = [
                ShownHit.of_record(
                    each.score, found[each.index][1], similarity=round(found[each.index][0], 6)
                )
                for each in ranked
            ]
        if args.json:
            about: dict[str, object] = {
                "query": args.query,
                "model": embedder.model_id,
                "quant": embedder.quant,
            }
            about |= {"reranker": reranker.model_id} if reranker else {}
            results = [hit.as_dict() for hit in hits]
            console.print_json("search", {**about, "n_passages": best.n_seen, "results": results})
            return 0
    for rank, hit in enumerate(hits, 1):
        hit.print(rank)
    if not hits:
        console.say(f"no passage with text in {', '.join(args.inputs)}")
    return 0


def _nearest(
    embedder: Embedder, query: str, flow: Flow, best: Best[Record], cache: VectorCache | None
) -> None:
    """The passages nearest to the question, with their cosines."""
    try:
        question = embedder.encode_query(query)
    except TextTooLong as error:
        raise error.of_question(embedder.model_id) from error
    for block in _blocks(embedder, flow, cache):
        scores = cast(list[float], (block.vectors @ question).tolist())
        for score, record in zip(scores, flow.take(len(scores)), strict=True):
            best.add(score, record)


def _blocks(embedder: Embedder, flow: Flow, cache: VectorCache | None) -> Iterator[Block]:
    """The vectors of the passages."""
    prompt = embedder.prompt("document")
    if cache is None:
        return embedder.stream(flow.texts(), prompt=prompt, on_progress=flow.advance)
    from gguf_embed.jobs.encode import stream

    how: EncodeOptions = {"prompt": prompt}
    return stream(embedder, flow.texts(), how, cache=cache, on_progress=flow.advance)


def _rerank_settings(args: argparse.Namespace) -> Settings:
    """What is said of both models; what is said of one is said of the embedder."""
    return replace(
        options.settings(args),
        quant=None,
        pooling=None,
        n_ctx=None,
        max_batch_tokens=None,
        n_gpu_layers=None,
    )


def _passages(embedder: Embedder, records: Iterator[Record]) -> Iterator[Record]:
    """The records without the blank ones, cut where they are longer than a passage."""
    from gguf_embed.io.chunks import split_to_fit

    prompt = embedder.prompt("document")
    for record in records:
        if record.text.strip():
            for text in split_to_fit(
                record.text,
                count_tokens=lambda text: int(embedder.count_tokens([prompt + text])[0]),
                max_tokens=min(PASSAGE_TOKENS, embedder.n_ctx),
            ):
                yield replace(record, text=text)
