"""`gguf-embed index`: folders become an index that `search --index` answers from."""

from __future__ import annotations

import argparse
import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, index_list, manners, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.cli.hits import near
from gguf_embed.errors import BadInput, BadOption, NativeFailed, counted

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.index.facts import IndexFacts
    from gguf_embed.index.making import Wanted
    from gguf_embed.index.update import UpdateReport

MAX_NAMED = 10  # of each kind of trouble; `index list NAME` names all

DESCRIPTION = """\
Make an index of folders, or bring it up to date: files that are new or changed are read, cut into
passages and embedded, those that moved keep their vectors, those that are gone go. Then
`gguf-embed search QUERY --index NAME` answers without embedding anything but the question.

  -o handbook          by name, in the data folder of the user
  -o ./some/place      by path; so is handbook.index

Run the same command again at any time, or without folders: `gguf-embed index -o NAME`. A run that
is killed leaves an index that answers, and the next run goes on.

Read are .md .markdown .mdx .qmd .txt .text .rst .org .adoc .tex .html .htm .xhtml .docx .pptx .odt
.odp, and .pdf with the extra pdf; other files by --include. Names that begin with a dot and what
.gitignore files leave out are passed over. A file that cannot be read is named with the reason.

The model stays with the index: a question by another one is refused. --rebuild embeds all anew, by
the model that you name, and the old index answers until that is done."""

EPILOG = """\
examples:
  gguf-embed index handbook/ -o handbook
  gguf-embed index handbook/ notes/ -o work --about handbook/="house rules" --about notes/=diary
  gguf-embed index src/ -o code --include '*.py' --exclude tests
  gguf-embed index -o handbook                       bring it up to date
  gguf-embed index -o handbook --watch               ... whenever a file changes
  gguf-embed index -o handbook --rebuild --model qwen3-embedding:0.6b
  gguf-embed index list                              which indexes there are
  gguf-embed index list handbook                     its folders, and files that were not read"""


def add(commands: Any) -> None:
    """The parser of `index`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "index", help=COMMANDS["index"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="FOLDER", help="folder or file; or list, and names of indexes"
    )
    parser.add_argument("-o", "--output", metavar="NAME|PATH", help="the index")
    parser.add_argument(
        "--about",
        action="append",
        default=[],
        metavar="FOLDER=TEXT",
        help="a line that comes back with the folder's results; may be repeated",
    )
    parser.add_argument(
        "--remove",
        action="append",
        default=[],
        metavar="FOLDER",
        help="take a folder out of the index; may be repeated",
    )
    group = parser.add_argument_group("files (kept with the index)")
    group.add_argument(
        "--include",
        action="append",
        metavar="GLOB",
        help="read such files too, as text: '*.py', 'src/*.c'; may be repeated; '' alone: no "
        "others any more",
    )
    group.add_argument(
        "--exclude",
        action="append",
        metavar="GLOB",
        help="leave such files and folders out: drafts, '*.log'; may be repeated; '' alone: none "
        "any more",
    )
    group.add_argument(
        "--gitignore",
        action=argparse.BooleanOptionalAction,
        help="leave out what .gitignore files leave out (default: yes)",
    )
    group = parser.add_argument_group("passages (kept with the index)")
    group.add_argument(
        "--chunk-tokens",
        type=options.positive,
        metavar="N",
        help="passages of at most N tokens of the model (default: 256)",
    )
    group.add_argument(
        "--overlap",
        type=options.positive,
        metavar="N",
        help="begin a passage with up to N tokens of the one before (default: none)",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--rebuild", action="store_true", help="embed everything anew; the old index goes on"
    )
    group.add_argument(
        "--watch", action="store_true", help="go on, and update whenever a file changes"
    )
    options.add_cache(group)
    manners.add_option(group)
    group.add_argument(
        "--isolated",
        action=argparse.BooleanOptionalAction,
        help="the model in a child process (default: for a new index)",
    )
    options.add_model(parser)
    group = parser.add_argument_group("report")
    group.add_argument("--json", action="store_true", help="the summary as one JSON document")
    group.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    parser.set_defaults(model=None, run=run)


def run(args: argparse.Namespace) -> int:
    """Make or update an index, or list them; returns 0, 8 where passages have no vector."""
    if args.output is None:
        if args.inputs[:1] == ["list"]:
            return index_list.print_indexes(args.inputs[1:], as_json=args.json)
        raise BadOption(
            "the index has no name; say it with -o NAME (`gguf-embed index list` names those that "
            "are there)"
        )
    from gguf_embed.index.making import facts_of_index
    from gguf_embed.index.places import place_of

    place = place_of(args.output)
    wanted = _wanted(args)
    kept = None if args.rebuild and args.model else facts_of_index(place)
    if kept is None and not wanted.folders and not args.rebuild:
        raise BadOption(
            f"{args.output}: there is no such index; name its folders: gguf-embed index FOLDER -o "
            f"{shlex.quote(args.output)}"
        )
    model, settings = _model(kept, args)
    isolated: bool = kept is None if args.isolated is None else args.isolated
    open_it = partial(options.open_embedder, model, settings, quiet=args.quiet, isolated=isolated)
    with manners.opened(args, open_it) as embedder:
        code = _update(place, embedder, wanted, args, model=_reopened(model, embedder))
        if args.watch:
            from gguf_embed.index.watch import changed

            watched = _folders_of(place)
            if not args.quiet:
                console.say(f"watching {', '.join(near(each) for each in watched)}; Ctrl-C ends")
            for _ in changed(watched, place=place):
                later = replace(wanted, folders={}, remove=(), rebuild=False)
                code = _update(
                    place, embedder, later, args, model=_reopened(model, embedder), again=True
                )
    return code


def _model(kept: IndexFacts | None, args: argparse.Namespace) -> tuple[str, Any]:
    """Which model, and how it is to run: as the user says, else that of the index."""
    settings = options.settings(args)
    if args.model is not None or kept is None:
        return args.model or options.default_model(), settings
    is_file = kept.space.model.lower().endswith(".gguf")
    if settings.quant is None and not is_file:
        settings = replace(settings, quant=kept.space.quant)
    return kept.space.model, settings


def _reopened(model: str, embedder: Embedder) -> str:
    """What opens the same model from any folder, at any time."""
    if Path(model).is_file():
        return str(Path(model).absolute())
    return embedder.model_id if model == "auto" else model


def _wanted(args: argparse.Namespace) -> Wanted:
    from gguf_embed.index.making import Wanted

    about = dict(_about(text, args.inputs) for text in args.about)
    folders = {Path(name).absolute(): about.get(_key(name)) for name in args.inputs}
    for name in args.inputs:
        if not name:
            raise BadOption("a folder is empty; name one, such as .")
        if not Path(name).exists():
            raise BadInput(f"{name}: no such file or directory")
    folders |= {Path(name): text for name, text in about.items() if Path(name) not in folders}
    return Wanted(
        folders=folders,
        remove=[Path(name).absolute() for name in args.remove],
        include=_patterns(args.include),
        exclude=_patterns(args.exclude),
        gitignore=args.gitignore,
        chunk_tokens=args.chunk_tokens,
        overlap=args.overlap,
        rebuild=args.rebuild,
    )


def _patterns(given: list[str] | None) -> list[str] | None:
    """What is kept from now on; None: what was kept before."""
    return [] if given == [""] else given


def _about(text: str, inputs: list[str]) -> tuple[str, str]:
    """(folder, description) of FOLDER=TEXT; of TEXT alone where there is one folder."""
    name, equals, rest = text.partition("=")
    if not equals and len(inputs) == 1:
        return _key(inputs[0]), text.strip()
    if not equals or not name or not Path(name).exists():
        raise BadOption(f"--about {text!r}: write FOLDER=TEXT, with a folder that is there")
    return _key(name), rest.strip()


def _key(name: str) -> str:
    return str(Path(name).absolute())


def _update(
    place: Path,
    embedder: Embedder,
    wanted: Wanted,
    args: argparse.Namespace,
    *,
    model: str,
    again: bool = False,
) -> int:
    from gguf_embed.index.making import make_index

    begin = time.monotonic()
    with ExitStack() as held:
        report = make_index(
            place,
            embedder,
            wanted,
            model=model,
            cache=held.enter_context(options.opened_cache(args)),
            begun=lambda n_bytes: held.enter_context(
                console.progress("index", n_bytes, quiet=args.quiet)
            ),
        )
    seconds = time.monotonic() - begin
    idle = not (report.n_new or report.n_changed or report.n_moved or report.n_deleted)
    if not args.quiet and not (again and idle):
        _print_report(args.output, report, seconds, args)
    return NativeFailed.exit_code if report.no_vector else 0


def _print_report(
    name: str, report: UpdateReport, seconds: float, args: argparse.Namespace
) -> None:
    from gguf_embed.system.files import printable

    counts = {
        "n_new": report.n_new,
        "n_changed": report.n_changed,
        "n_moved": report.n_moved,
        "n_deleted": report.n_deleted,
        "n_unchanged": report.n_unchanged,
        "n_passages": report.n_passages,
        "n_embedded": report.n_embedded,
        "n_reused": report.n_reused,
        "n_cached": report.n_cached,
        "n_tokens": report.n_tokens,
    }
    if args.json:
        console.print_json(
            "index",
            {
                "index": name,
                **counts,
                "seconds": round(seconds, 3),
                "unread": [
                    {"source": printable(path), "reason": reason} for path, reason in report.unread
                ],
                "absent": [printable(path) for path in report.absent],
                "passed_over": dict(sorted(report.passed_over.items())),
                "n_ignored": report.n_ignored,
                "no_vector": report.no_vector,
                "no_metadata": [
                    {"source": printable(path), "reason": reason}
                    for path, reason in report.no_metadata
                ],
            },
        )
        return
    files = ", ".join(
        f"{counts[f'n_{what}']:,} {what}"
        for what in ("new", "changed", "moved", "deleted", "unchanged")
        if counts[f"n_{what}"]
    )
    console.say(
        f"{name}: files: {files or 'none'}; {counted(report.n_embedded, 'passage')} embedded, "
        f"{report.n_reused + report.n_cached:,} had a vector, {report.n_tokens:,} tokens in "
        f"{seconds:.2f} s; now {counted(report.n_passages, 'passage')}"
    )
    for path in report.absent:
        console.say(f"{near(path)}: not there; what is known of it stays; --remove takes it out")
    _say_some([f"not read: {near(path)}: {reason}" for path, reason in report.unread])
    _say_some(report.no_vector)
    _say_some([f"{near(path)}: {reason}" for path, reason in report.no_metadata])
    if report.passed_over:
        shown = ", ".join(ending for ending, _ in report.passed_over.most_common(5))
        n = report.passed_over.total()
        console.say(f"{counted(n, 'other file')} passed over ({shown}); --include takes such files")
    if report.n_ignored and not report.n_passages:
        n = counted(report.n_ignored, "name")
        console.say(f"{n} left out by .gitignore; --no-gitignore takes such files and folders")


def _say_some(lines: list[str]) -> None:
    for line in lines[:MAX_NAMED]:
        console.say(line)
    if len(lines) > MAX_NAMED:
        console.say(f"and {len(lines) - MAX_NAMED:,} more; `gguf-embed index list NAME` names them")


def _folders_of(place: Path) -> list[Path]:
    from gguf_embed.index.index import Index

    with Index.open(place) as index:
        return [folder.path for folder in index.status().folders]
