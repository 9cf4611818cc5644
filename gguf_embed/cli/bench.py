"""`gguf-embed bench`: what each quantization level gives and takes, here and on these texts."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import OutputFailed
from gguf_embed.lab import LIMIT, ROUNDS

if TYPE_CHECKING:
    from gguf_embed.lab.bench import BenchOptions
    from gguf_embed.lab.results import Report

DESCRIPTION = """\
Compare quantization levels of a model on this machine: size, memory, speed, and how much of the
quality is left, on your texts or on docstrings that Python carries. Levels that are not here are
made from an F32, BF16 or F16 file in a scratch directory and removed afterwards.

  MODEL    an F32, BF16 or F16 .gguf to make the levels from; or the ready files of several
           levels, or their directory; or a name of `gguf-embed models`
  --texts  .jsonl ("text", "_id"), .txt, .csv, .md, a directory of such files, or a folder
           as BEIR and MTEB have it: corpus.jsonl, queries.jsonl, qrels/test.tsv
Without queries each text is a query; without qrels the best level's ranking is the truth. Each
level runs in a process of its own, in interleaved rounds. The machine should be quiet. How long
it will take is told as soon as the first level is open.
What is found is kept in the cache directory: `gguf-embed plan --prefer speed` goes by it."""

EPILOG = """\
examples:
  gguf-embed bench all-minilm-l6-v2 --quants Q8_0     offline: built-in model, Python's docstrings
  gguf-embed bench all-minilm-l6-v2 --quants F16,Q8_0,Q4_K_M     fetches F16 from the Hub
  gguf-embed bench model-F16.gguf --texts my.jsonl --queries q.jsonl --qrels r.tsv
  gguf-embed bench files/ --texts scifact/ --report levels.md --plots levels/
  gguf-embed bench random-F16.gguf --no-quality --quants Q8_0,Q4_K_M --json"""


def add(commands: Any) -> None:
    """The parser of `bench`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help=COMMANDS["bench"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, file, files or directory")
    parser.add_argument(
        "--quants",
        type=_names,
        metavar="A,B,...",
        help="levels to compare (default: F16 to Q3_K_M; of ready files all)",
    )
    texts = parser.add_argument_group("texts")
    texts.add_argument("--texts", type=Path, metavar="PATH", help="texts to search (see above)")
    texts.add_argument("--queries", type=Path, metavar="FILE", help="what to search them for")
    texts.add_argument(
        "--qrels",
        type=Path,
        metavar="FILE",
        help="which texts answer: query id, text id and relevance, with tabs between them",
    )
    texts.add_argument(
        "--limit",
        type=options.positive,
        default=LIMIT,
        metavar="N",
        help="use at most N texts and queries, the same sample each time (default: %(default)s)",
    )
    texts.add_argument(
        "--no-quality",
        action="store_true",
        help="speed and memory only, e.g. for a model with random weights",
    )
    run_group = parser.add_argument_group("measuring")
    run_group.add_argument(
        "--rounds",
        type=options.positive,
        default=ROUNDS,
        metavar="N",
        help="rounds of speed; each level runs in each (default: %(default)s)",
    )
    run_group.add_argument("--threads", type=options.positive, metavar="N", help="CPU threads")
    run_group.add_argument("--pooling", choices=options.POOLINGS, help="for files that do not say")
    run_group.add_argument("--no-tune", action="store_true", help="take the usual settings")
    run_group.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where levels are made (default: the system's)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="everything as one JSON document")
    output.add_argument("--report", type=Path, metavar="FILE.md", help="write a Markdown report")
    output.add_argument("--plots", type=Path, metavar="DIR", help="write plots (needs matplotlib)")
    output.add_argument("--quiet", action="store_true", help="do not tell what is being done")
    parser.set_defaults(run=run)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name levels, with commas between them")
    return names


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; returns 0."""
    from gguf_embed.lab import bench, levels, plots, report
    from gguf_embed.lab.task_files import read_task
    from gguf_embed.lab.tasks import limited

    # What could not be written in the end is told before the work.
    if args.plots:
        plots.check()
    for path, folder in (
        (args.report, args.report and args.report.absolute().parent),
        (args.scratch, args.scratch),
    ):
        if folder and not folder.is_dir():
            raise OutputFailed(
                f"{path}: there is no directory {folder}; make it: mkdir -p {folder}"
            )

    def say(message: str) -> None:
        if not args.quiet:
            console.say(message)

    subject = levels.find_subject(args.models)
    task = limited(read_task(args.texts, args.queries, args.qrels), args.limit)
    chosen = options_of(args)
    with tempfile.TemporaryDirectory(prefix="gguf-embed-bench-", dir=args.scratch) as folder:
        scratch = Path(folder)
        compared = levels.make_levels(subject, args.quants, scratch, say)
        found = bench.run(subject, compared, task, chosen, scratch=scratch, say=say)
    if args.json:
        console.print_json("bench", report.to_json(found))
    else:
        _print(found)
    drawn = plots.draw(found, args.plots) if args.plots else ()
    if args.report:
        report.write_markdown(found, args.report, drawn)
    for path in (*drawn, *([args.report] if args.report else [])):
        say(f"wrote {path}")
    return 0


def options_of(args: argparse.Namespace) -> BenchOptions:
    """What is measured, and how the levels are run."""
    from gguf_embed.lab.bench import BenchOptions
    from gguf_embed.plan.settings import Settings

    settings = Settings(
        pooling=options.pooling(args.pooling), n_threads=args.threads, tune=not args.no_tune
    )
    return BenchOptions(rounds=args.rounds, quality=not args.no_quality, settings=settings)


def _print(found: Report) -> None:
    from gguf_embed.lab import report

    console.out(report.headline(found))
    for table in report.tables(found):
        console.out(f"\n{table.title}\n")
        console.print_table(table.columns, table.rows)
        for note in table.notes:
            console.print_text(note, "  ")
    console.out("")
    console.print_pairs([(r.level.name, report.verdict(found, r)) for r in found.results])
    console.out("")
    console.print_text(report.advice(found))
    for remark in found.remarks:
        console.print_text(f"note: {remark}")
