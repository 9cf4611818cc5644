"""`gguf-embed embed`: texts from files, vectors to a file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from gguf_embed.cli import bulk, chunking, console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.made_with import made_with, plan_of
from gguf_embed.cli.task import chunked, find_task, opened_model, prompt_of
from gguf_embed.errors import BadInput, BadOption, BadText, NativeFailed, TextTooLong
from gguf_embed.io.flow import Flow, Progress, place

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.options import Block, EncodeOptions, OnError
    from gguf_embed.io.record import Record, UnreadableRow
    from gguf_embed.io.write import Writer
    from gguf_embed.jobs.manifest import FailedPlace


DESCRIPTION = """\
Embed texts: one vector per text, in the order of the input.

what is one text:
  .txt      a line (a blank line too: row i of the output is line i + 1)
  .md       a passage: a section, or part of it, of up to about 800 characters
  .jsonl    a line: an object whose --field holds the text
  .csv      a row under a header line, --field names its column
  .parquet  a row, --field names its column; .arrow, .feather and .ipc likewise (extra: arrow)
  DIR       all such files in it and below, sorted; names that begin with a dot are passed over
  s3://...  such a file, folder or pattern elsewhere; gs://, abfs:// likewise (extra: arrow)
  -         standard input: as .txt, or as .jsonl where --field is given
With --chunk-tokens a file, or the text of a row, is split into several texts; blank ones are left
out. Each line of .jsonl then says where its chunk stands: position and last_position (lines),
start and end (characters), headings (those above it).
Files are UTF-8, and may end in .gz or .zst. Nothing is skipped unasked: a row that cannot be used
stops the run and is named.

Into a folder (-o DIR/) or a table (-o NAME.lance), or with --resume, it is a job: made in shards,
each of which is there whole or not at all. Whatever ends it, the same command with --resume goes
on, and the result is that of an undisturbed run to the bit. Rows that fail are named in
failed.jsonl, and the exit code is 8.

With --isolated the model runs in a child process, and a text that llama.cpp dies of costs itself
only: it is named with its place and its tokens, its vector is NaN (.npy) or null (.jsonl), the
rest is written, and the exit code is 8. Vectors are the same. It takes about half a second at the
start, so it is the default from 1 MiB of files on, which take longer than that by far."""

EPILOG = """\
what comes out (-o):
  NAME.npy    float32 array of shape (texts, dimensions); numpy.load reads it
  NAME.jsonl  one object per text: id, source, position (line), last_position (line on which it
              ends), truncated, vector (null: it failed); with --with-text its text, with
              --keep its fields
  DIR/        shards in Parquet with the same columns, kept fields as columns of their own, and
              manifest.jsonl (extra: arrow)
  DB/NAME.lance  the table NAME of the LanceDB database DB, with the same columns (extra: lancedb)
  -           the same JSON lines on standard output, as they are ready
A file appears only when it is complete: an error, Ctrl-C or a full disk leaves the older one
alone. OUT.meta.json beside it says what made it (model, prompt, pooling, dimensions) and has their
fingerprint: vectors of equal fingerprints can be compared, others cannot.

examples:
  gguf-embed embed notes.txt -o notes.npy
  gguf-embed embed docs/ README.md -o docs.jsonl
  gguf-embed embed notes.txt -o notes.npy --model qwen3-embedding:8b
  gguf-embed embed rows.csv --field body --id-field id -o rows.jsonl --prompt-name document
  gguf-embed embed rows.csv --field body --keep author,year --with-text -o rows.jsonl
  gguf-embed embed rows.parquet --id-field id -o vectors/ --dry-run
  gguf-embed embed rows.parquet --id-field id -o vectors/ --resume
  gguf-embed embed '2026-*.csv.gz' --field body -o vectors/ --resume --vector-type int8
  gguf-embed embed rows.parquet --id-field id --with-text -o db/rows.lance
  gguf-embed embed 's3://texts/rows-*.parquet' --field text -o vectors/ --ray auto
  gguf-embed embed manual/ --include '*.rst' -o manual.jsonl
  gguf-embed embed manual/ --chunk-tokens 256 --overlap 32 --with-text -o chunks.jsonl
  gguf-embed embed manual/ --late-chunking --model qwen3-embedding:0.6b -o chunks.jsonl
  gguf-embed embed letters/ --whole-file --truncate end -o letters.npy
  gguf-embed embed notes.txt -o notes.npy --server http://127.0.0.1:11434
  gguf-embed embed --text "one text" --text "another"
  sort -u words.txt | gguf-embed embed - -o words.npy --json"""


def add(commands: Any) -> None:
    """The parser of `embed`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "embed", help=COMMANDS["embed"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="file, directory or -")
    parser.add_argument(
        "--text", action="append", default=[], help="a text itself; may be repeated"
    )
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="OUT",
        help="NAME.npy, NAME.jsonl, DIR/, NAME.lance or - (default)",
    )
    options.add_fields(parser)
    parser.add_argument(
        "--with-text", action="store_true", help="put each text into its line of the .jsonl output"
    )
    parser.add_argument(
        "--keep",
        metavar="NAME,...",
        help="put these fields of .jsonl or .csv, or all, into the .jsonl output",
    )
    parser.add_argument("--whole-file", action="store_true", help="a .txt or .md file is one text")
    chunking.add_options(parser)
    group = parser.add_argument_group("vectors")
    prompt = group.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt-name", metavar="NAME", help="the model's own prompt, such as query or document"
    )
    prompt.add_argument("--prompt", metavar="TEXT", help="put in front of every text")
    group.add_argument(
        "--dimensions",
        type=options.positive,
        metavar="N",
        help="keep the first N of a model trained for it",
    )
    group.add_argument(
        "--no-normalize", action="store_true", help="leave the length of the vectors as it is"
    )
    group.add_argument(
        "--truncate",
        choices=("error", "end", "start"),
        default="error",
        help="a text longer than the model's context: error (default) names every such text; "
        "end cuts its end off, start its start; cuts are counted",
    )
    bulk.add_options(parser)
    options.add_model(parser)
    parser.set_defaults(model=None)
    parser.add_argument(
        "--server",
        metavar="URL",
        help="the model that `gguf-embed serve` has there, without --model its default one; a key "
        "is taken from GGUF_EMBED_API_KEY",
    )
    parser.add_argument(
        "--isolated",
        action=argparse.BooleanOptionalAction,
        help="the model in a child process (default: from 1 MiB of files on)",
    )
    group = parser.add_argument_group("report")
    group.add_argument(
        "--json",
        action="store_true",
        help="the summary as JSON on standard output (with -o -: on standard error)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Embed all inputs; returns 0, or the code of NativeFailed where rows have no vector."""
    from gguf_embed.io.record import check_unicode
    from gguf_embed.io.write import open_writer
    from gguf_embed.jobs.manifest import unreadable_place

    if not args.inputs and not args.text:
        raise BadOption("nothing to embed: name files or directories, - or --text TEXT")
    check_unicode(args.prompt or "", "--prompt")
    chunks = chunking.wanted(args)
    begin = time.monotonic()
    task = find_task(args, chunks=chunks)
    if bulk.wanted(args):
        return bulk.run(args, task)
    failed: list[FailedPlace] = []

    def refuse(row: UnreadableRow) -> None:
        console.say(str(row))
        failed.append(unreadable_place(row))

    records = task.records(args, refuse if args.on_error == "skip" else None)
    # The output is opened first: a name that cannot be written is told before any work.
    with open_writer(
        args.output, stdout=console.stdout(), inputs=task.sources.files, content=task.content
    ) as writer:
        isolated = options.isolated(args, task.total_bytes)
        with opened_model(args, isolated=isolated) as embedder:
            opened = time.monotonic()
            options.warn_dimensions(embedder, args.dimensions)
            prompt = prompt_of(embedder, args)
            with console.progress("embed", task.total_bytes, quiet=args.quiet) as progress:
                if args.late_chunking:
                    done = _embed_late(
                        embedder, records, writer, prompt, args, progress, isolated=isolated
                    )
                else:
                    rows = chunked(embedder, records, prompt, args) if chunks else records
                    flow = Flow(rows, progress, keep_texts=args.with_text)
                    done = _embed(embedder, flow, writer, prompt, args, failed, isolated=isolated)
            about = {
                **made_with(embedder, prompt, args, chunks=chunks),
                "plan": plan_of(embedder.plan),
                "n_texts": writer.n_rows,
                "n_truncated": done.n_truncated,
                "n_failed": done.n_failed,
            }
        writer.finish(dim=done.dim, about=about)
    seconds = time.monotonic() - opened
    if not args.quiet:
        summary = {
            "file": args.output,
            "shape": [writer.n_rows, done.dim],
            "n_texts": writer.n_rows,
            "n_tokens": done.n_tokens,
            "tokens_per_s": round(done.n_tokens / seconds, 1),
            "texts_per_s": round(writer.n_rows / seconds, 1),
            "n_truncated": done.n_truncated,
            "first_truncated": done.first_truncated,
            "n_failed": done.n_failed,
            "open_s": round(opened - begin, 3),
            "embed_s": round(seconds, 3),
            "made_with": about,
        }
        if args.json:
            console.print_json("embed", summary, to_stderr=args.output == "-")
        else:
            _print_summary(summary)
    if args.on_error == "skip" and args.output != "-":
        bulk.write_failed_beside(args.output, failed)
    if done.n_failed:
        console.say(
            f"{console.counted(done.n_failed, 'text')} without a vector, named above; "
            f"{_name(args.output)} holds the rest"
        )
        return NativeFailed.exit_code
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    dim: int
    n_tokens: int
    n_truncated: int
    first_truncated: list[str]  # places, at most five
    n_failed: int


def _embed_late(
    embedder: Embedder,
    records: Iterator[Record],
    writer: Writer,
    prompt: str,
    args: argparse.Namespace,
    progress: Progress,
    *,
    isolated: bool,
) -> _Done:
    """Every chunk of every document to its row."""
    done = chunking.embed_late(
        embedder,
        records,
        writer,
        prompt,
        args,
        progress=progress,
        on_error=_on_error(args, isolated=isolated),
    )
    return _Done(
        dim=args.dimensions or embedder.dim,
        n_tokens=done.n_tokens,
        n_truncated=0,
        first_truncated=[],
        n_failed=done.n_failed,
    )


def _embed(
    embedder: Embedder,
    flow: Flow,
    writer: Writer,
    prompt: str,
    args: argparse.Namespace,
    failed: list[FailedPlace],
    *,
    isolated: bool,
) -> _Done:
    """Every text to its row; texts that cannot be embedded are told by file and line.

    They are added to `failed`, where rows that could not be read are already.
    """
    from gguf_embed.jobs.manifest import failed_place

    choices: dict[str, Any] = {
        "prompt": prompt,
        "dimensions": args.dimensions,
        "normalize": not args.no_normalize,
        "truncate": args.truncate,
        "on_error": _on_error(args, isolated=isolated),
    }
    # Checks the choices before any text is read, and gives the shape of an empty result.
    dim = int(embedder.encode([], **choices).shape[1])
    n_tokens = n_truncated = 0
    first: list[str] = []
    try:
        for block in _blocks(embedder, flow, choices, args):
            rows = flow.take(len(block.vectors))
            cut = cast(list[bool], block.truncated.tolist())
            writer.write(rows, block.vectors, cut)
            for each in block.failed:
                failed.append(failed_place(rows[each.row - block.start], each))
                console.say(failed[-1].shown)
            n_tokens += int(block.token_counts.sum())
            n_truncated += sum(cut)
            places = (place(row) for row, is_cut in zip(rows, cut, strict=True) if is_cut)
            first += islice(places, 5 - len(first))
    except BadText as error:
        raise BadInput(f"{place(flow.find([error.row])[0])}: {error}") from error
    except TextTooLong as error:
        long = sorted(error.rows)
        for record, (_, n) in zip(flow.find([row for row, _ in long]), long, strict=True):
            console.say(f"{place(record)}: {console.counted(n, 'token')}")
        raise BadInput(
            f"{console.counted(len(long), 'text')} longer than the {error.n_ctx} tokens of "
            f"{embedder.model_id}; {_name(args.output)} is "
            f"{'incomplete' if args.output == '-' else 'not written'}; cut them with "
            "--truncate end (keeps the start) or --truncate start (keeps the end), or split them"
        ) from error
    return _Done(
        dim=dim,
        n_tokens=n_tokens,
        n_truncated=n_truncated,
        first_truncated=first,
        n_failed=len(failed),
    )


def _on_error(args: argparse.Namespace, *, isolated: bool) -> OnError:
    """What a text without a vector does: as the user says, else as the engine can."""
    if args.on_error is None:
        return "skip" if isolated else "raise"
    return "skip" if args.on_error == "skip" else "raise"


def _blocks(
    embedder: Embedder, flow: Flow, choices: dict[str, Any], args: argparse.Namespace
) -> Iterator[Block]:
    """The vectors of all texts, in order."""
    if not args.cache and args.on_error != "skip":
        yield from embedder.stream(flow.texts(), on_progress=flow.advance, **choices)
        return
    from gguf_embed.jobs.encode import stream

    how = cast("EncodeOptions", choices)
    with options.opened_cache(args) as cache:
        yield from stream(embedder, flow.texts(), how, cache=cache, on_progress=flow.advance)


def _name(output: str) -> str:
    return "standard output" if output == "-" else output


def _print_summary(summary: dict[str, Any]) -> None:
    made_with = summary["made_with"]
    n_texts, n_tokens = summary["n_texts"], summary["n_tokens"]
    console.say(
        f"{console.counted(n_texts, 'text')}, {console.counted(n_tokens, 'token')} in "
        f"{summary['embed_s']:.2f} s "
        f"({summary['tokens_per_s']:,.0f} tokens/s); {summary['n_truncated']:,} truncated; "
        f"{made_with['model']} {made_with['quant']}; "
        f"{_name(summary['file'])}: float32 {tuple(summary['shape'])}"
    )
    if summary["n_truncated"]:
        first: list[str] = summary["first_truncated"]
        more = ", ..." if summary["n_truncated"] > len(first) else ""
        console.say(f"truncated to {made_with['n_ctx']} tokens: {', '.join(first)}{more}")
