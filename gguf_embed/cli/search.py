"""`gguf-embed search`: the passages of files that answer a question best."""

from __future__ import annotations

import argparse
import heapq
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from gguf_embed.catalog import RERANKER
from gguf_embed.cli import console, layout, options
from gguf_embed.errors import BadInput, BadOption, TextTooLong
from gguf_embed.io.flow import Flow

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.reranker import Reranker
    from gguf_embed.io.read import Record
    from gguf_embed.plan.settings import Settings

# Models are trained on passages of about this length; longer ones answer less sharply.
PASSAGE_TOKENS = 200
MAX_NAMED = 5  # files that are passed over

DESCRIPTION = """\
Rank passages of files by meaning: the cosine of the question's vector and each passage's, the
query and document prompts of the model included. Nothing is stored.

  .md              sections, cut between paragraphs
  .txt             a passage per line; with --prose paragraphs, as .md
  .jsonl, .csv     a passage per row: --field
  DIR              all such files in it and below;   - is standard input
Texts of more than 200 tokens are cut into several passages; blank ones are passed over. So is a
file in a DIR that holds no such texts, such as a .jsonl of vectors; it is named."""

EPILOG = """\
examples:
  gguf-embed search "how do I use this without internet?" README.md docs/
  gguf-embed search "late delivery" tickets.csv --field body --id-field number --top 20
  gguf-embed search "who is to blame?" novel.txt --prose
  gguf-embed search "how do refunds work?" handbook/ --rerank qwen3-reranker:0.6b
  git log --format=%s | gguf-embed search "memory leak" - --json"""


def add(commands: Any) -> None:
    """The parser of `search`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "search", help="the passages that answer a question", description=DESCRIPTION, epilog=EPILOG
    )
    options.add_query(parser, top=5)
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
    parser.add_argument("--json", action="store_true", help="results as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the best passages; returns 0, also when there is none."""
    from gguf_embed.io.read import Reading, given, read

    if not args.query.strip():
        raise BadOption("the question is empty; say what to look for")
    (query,) = given([args.query], source="QUERY")
    bad: list[BadInput] = []  # what is wrong with files of directories
    sources = options.find(args.inputs, args, quiet=args.quiet, on_bad=bad.append)
    reading = Reading(field=args.field, id_field=args.id_field, prose=args.prose)
    records = read(sources, reading, stdin=console.stdin(), on_bad=bad.append)
    with ExitStack() as held:
        reranker: Reranker | None = None
        if args.rerank:  # first: a wrong name is told before the work
            reranker = held.enter_context(
                options.open_reranker(args.rerank, _rerank_settings(args), quiet=args.quiet)
            )
        embedder = held.enter_context(
            options.open_embedder(args.model, options.settings(args), quiet=args.quiet)
        )
        n_best = max(args.top, args.candidates) if reranker else args.top
        with console.progress("search", sources.total_bytes, quiet=args.quiet) as progress:
            flow = Flow(_passages(embedder, records), progress, keep_texts=True)
            found, n_passages = _nearest(embedder, query.text, flow, n_best)
        for error in () if args.quiet else bad[:MAX_NAMED]:
            console.say(f"passed over: {error}")
        if len(bad) > MAX_NAMED and not args.quiet:
            console.say(f"passed over: {console.counted(len(bad) - MAX_NAMED, 'other file')}")
        judged = [Hit(score=score, similarity=score, record=record) for score, record in found]
        if reranker is not None:
            ranked = reranker.rank(query.text, [hit.record.text for hit in judged], top=args.top)
            judged = [replace(judged[each.index], score=each.score) for each in ranked]
        if args.json:
            about: dict[str, object] = {
                "query": args.query,
                "model": embedder.model_id,
                "quant": embedder.quant,
            }
            about |= {"reranker": reranker.model_id} if reranker else {}
            results = [hit.as_dict(reranked=reranker is not None) for hit in judged]
            console.print_json("search", {**about, "n_passages": n_passages, "results": results})
            return 0
    for rank, hit in enumerate(judged, 1):
        print_hit(rank, hit.score, hit.record)
    if not judged:
        console.say(f"no passage with text in {', '.join(args.inputs)}")
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A passage with what it is ordered by."""

    score: float
    similarity: float  # the cosine
    record: Record

    def as_dict(self, *, reranked: bool) -> dict[str, object]:
        """For programs; the cosine is the score where nothing reranked."""
        similarity = {"similarity": round(self.similarity, 6)} if reranked else {}
        return {
            "score": round(self.score, 6),
            **similarity,
            "id": self.record.id,
            "source": self.record.source,
            "position": self.record.position,
            "last_position": self.record.last_position,
            "text": self.record.text,
        }


def _nearest(
    embedder: Embedder, query: str, flow: Flow, n_best: int
) -> tuple[list[tuple[float, Record]], int]:
    """The passages nearest to the question with their cosines, and how many there are in all."""
    try:
        question = embedder.encode_query(query)
    except TextTooLong as error:
        raise BadInput(
            f"the question has {error.rows[0][1]} tokens, {embedder.model_id} takes "
            f"{error.n_ctx}; ask a shorter one"
        ) from error
    # (score, minus the order: among equals the first, the passage)
    best: list[tuple[float, int, Record]] = []
    n_passages = 0
    for block in embedder.stream(
        flow.texts(), prompt=embedder.prompt("document"), on_progress=flow.advance
    ):
        scores = cast(list[float], (block.vectors @ question).tolist())
        for score, record in zip(scores, flow.take(len(scores)), strict=True):
            n_passages += 1
            heapq.heappush(best, (score, -n_passages, record))
            if len(best) > n_best:
                heapq.heappop(best)
    return [(score, record) for score, _, record in sorted(best, reverse=True)], n_passages


def _rerank_settings(args: argparse.Namespace) -> Settings:
    """What is said of both models; what is said of one is said of the embedder."""
    from gguf_embed.plan.settings import Settings

    return Settings(
        prefer=args.prefer,
        memory_bytes=args.memory,
        n_threads=args.threads,
        tune=not args.no_tune,
        exact=args.exact,
        accelerator=args.accelerator,
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


def print_hit(rank: int, score: float, record: Record) -> None:
    """A passage for people: its place, and how it begins."""
    place = f"{record.source}:{record.position}"
    own_id = "" if record.id == place else f"  {record.id}"
    console.out(console.plain(f"{rank:>2}  {score:.3f}  {place}{own_id}"))
    width = min(layout.width(), layout.MAX_HELP_WIDTH)
    for line in textwrap.wrap(
        console.plain(" ".join(record.text.split())),
        width=width,
        initial_indent=" " * 11,
        subsequent_indent=" " * 11,
        max_lines=4,
        placeholder=" ...",
    ):
        console.out(line)
