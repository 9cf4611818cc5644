"""Options that several commands share, and the one place where the engine is opened."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from gguf_embed.catalog import BUILTIN, RERANKER
from gguf_embed.cli import console
from gguf_embed.errors import BadInput

if TYPE_CHECKING:
    from gguf_embed.bundle.format import Licence
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.reranker import Reranker
    from gguf_embed.io.sources import OnBad, TextSources
    from gguf_embed.jobs.cache import VectorCache
    from gguf_embed.plan.settings import Settings
    from gguf_embed.store.local import Source
    from gguf_embed.vectors import Pooling

BULK_BYTES = 1 << 20  # of files: work of many seconds, beside which a child's start is nothing
POOLINGS = ("mean", "cls", "last")
PREFERENCES = ("quality", "speed", "memory")


def open_embedder(
    model: str, settings: Settings | None = None, *, quiet: bool = False, isolated: bool = False
) -> Embedder:
    """The engine, which every command opens here; tells what takes long and what was given up."""
    from gguf_embed.engine.embedder import Embedder

    return _open(Embedder, model, settings, quiet=quiet, isolated=isolated)


def open_reranker(
    model: str, settings: Settings | None = None, *, quiet: bool = False, isolated: bool = False
) -> Reranker:
    """The same for a model that scores pairs."""
    from gguf_embed.engine.reranker import Reranker

    return _open(Reranker, model, settings, quiet=quiet, isolated=isolated)


_Opened = TypeVar("_Opened", "Embedder", "Reranker")


def _open(
    kind: type[_Opened], model: str, settings: Settings | None, *, quiet: bool, isolated: bool
) -> _Opened:
    with console.transfer("fetch", quiet=quiet) as moved:
        opened = kind.open(
            model,
            settings=settings,
            on_status=None if quiet else console.say,
            on_download=moved,
            isolated=isolated,
        )
    for remark in () if quiet else opened.remarks:
        console.say(remark)
    return opened


def default_model() -> str:
    """The model of a command that names none. Raises BadOption for damaged settings."""
    from gguf_embed.system.config import default_model

    return default_model() or BUILTIN


def isolated(args: argparse.Namespace, total_bytes: int | None) -> bool:
    """Whether the model runs in a child process: as the user says, else for much text."""
    chosen: bool | None = args.isolated
    return (total_bytes or 0) >= BULK_BYTES if chosen is None else chosen


def add_path(group: Any) -> None:
    """--path, of an index."""
    group.add_argument(
        "--path",
        action="append",
        default=[],
        metavar="GLOB",
        help="in such files only: '*.md', docs, 'docs/**/*.md'; may be repeated",
    )


def add_cache(group: Any) -> None:
    """--cache."""
    group.add_argument(
        "--cache",
        action="store_true",
        help="take vectors from the cache where they are known, and keep new ones there (see "
        "`gguf-embed cache`)",
    )


@contextmanager
def opened_cache(args: argparse.Namespace) -> Generator[VectorCache | None]:
    """The cache, where it is asked for."""
    if not args.cache:
        yield None
        return
    from gguf_embed.jobs.cache import VectorCache

    with VectorCache.open() as cache:
        yield cache


def add_query(parser: argparse.ArgumentParser, *, top: int, may_be_indexed: bool = False) -> None:
    """QUERY, the texts that may answer it, and how many to print."""
    parser.add_argument("query", metavar="QUERY", help="the question, in the words of a person")
    nargs, else_ = ("*", "; or --index") if may_be_indexed else ("+", "")
    parser.add_argument("inputs", nargs=nargs, metavar="INPUT", help=f"file, directory or -{else_}")
    parser.add_argument(
        "--top", type=positive, default=top, metavar="N", help=f"results (default: {top})"
    )
    add_fields(parser)
    parser.add_argument(
        "--prose", action="store_true", help="cut .txt and - into paragraphs, not lines"
    )


def warn_dimensions(embedder: Embedder, dimensions: int | None) -> None:
    """Tell of a cut that costs more than a person may expect."""
    from gguf_embed.vectors import is_trained_cut

    card = embedder.card
    if not is_trained_cut(
        dimensions,
        dim=embedder.dim,
        mrl_min=card.mrl_min if card else None,
        mrl_dims=card.mrl_dims if card else (),
    ):
        console.say(
            f"{embedder.model_id} is not known to be trained for shorter vectors: the first "
            f"{dimensions} of {embedder.dim} values may lose much; measure it with `gguf-embed "
            "compare`"
        )


def settings(args: argparse.Namespace) -> Settings:
    """What the options of `add_model` say of how to run it."""
    from gguf_embed.plan.settings import Settings

    return Settings(
        **limits(args),
        pooling=pooling(getattr(args, "pooling", None)),
        n_threads=args.threads,
        tune=not args.no_tune,
        exact=args.exact,
        accelerator=args.accelerator,
    )


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_limits` say, as fields of `Settings`."""
    return {
        "quant": args.quant,
        "n_ctx": args.n_ctx,
        "max_batch_tokens": args.max_batch_tokens,
        "n_gpu_layers": args.n_gpu_layers,
        "memory_bytes": args.memory,
        "prefer": args.prefer,
    }


def pooling(name: str | None) -> Pooling | None:
    """One of POOLINGS as the engine has it."""
    from gguf_embed.vectors import Pooling

    return None if name is None else Pooling[name.upper()]


def add_model(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--model and how it is run; `several`: it may be repeated, and is a list or None."""
    group = parser.add_argument_group("model")
    which = (
        "a name of `gguf-embed models`, owner/repo on the Hub, any .gguf file, or auto: the best "
        "Qwen3-Embedding that runs well here (default: that of `gguf-embed models default`, else "
        f"{BUILTIN}, built in)"
    )
    if several:
        which += "; may be repeated"
    group.add_argument(
        "--model",
        action="append" if several else "store",
        metavar="NAME|PATH",
        help=which,
    )
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="how token vectors become one (default: what the model says)",
    )
    _add_how(parser, group.add_argument)


def add_reranker(parser: argparse.ArgumentParser) -> None:
    """--model for a reranker, and how it is run."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME|PATH",
        help="a reranker of `gguf-embed models`, owner/repo on the Hub, or any .gguf file of one "
        f"(default: {RERANKER})",
    )
    _add_how(parser, group.add_argument)


def _add_how(parser: argparse.ArgumentParser, add: Callable[..., object]) -> None:
    add("--threads", type=positive, metavar="N", help="CPU threads (default: chosen)")
    add(
        "--exact",
        action="store_true",
        help="to the bit the same whatever else is embedded; slower where no accelerator runs",
    )
    add(
        "--accelerator",
        action=argparse.BooleanOptionalAction,
        help="our own kernels for x86 CPUs, or an error (default: where they are proved right)",
    )
    add("--no-tune", action="store_true", help="try no settings in a long run; take what is known")
    add_limits(parser)


def add_limits(parser: argparse.ArgumentParser, *, batch: bool = True) -> None:
    """What of a model to run, and in how much memory; `batch`: the microbatch may be chosen too."""
    group = parser.add_argument_group("limits (default: chosen for the machine, see plan --help)")
    group.add_argument("--quant", metavar="Q", help="quantization, such as Q8_0")
    group.add_argument(
        "--prefer",
        choices=PREFERENCES,
        default="quality",
        help="what counts among quantizations that fit (default: %(default)s)",
    )
    group.add_argument("--n-ctx", type=positive, metavar="N", help="longest text, in tokens")
    group.add_argument(
        "--n-gpu-layers", type=int, metavar="N", help="layers on GPUs; 0: none, -1: all"
    )
    group.add_argument(
        "--memory", type=size, metavar="SIZE", help="use at most this of RAM and of each GPU"
    )
    if batch:
        group.add_argument(
            "--max-batch-tokens", type=positive, metavar="N", help="tokens computed at one time"
        )
    else:
        parser.set_defaults(max_batch_tokens=None)


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Which files of a directory are read, and which field of structured files is the text."""
    add_include(parser)
    parser.add_argument(
        "--field", metavar="NAME", help="field or column with the text (default: text)"
    )
    parser.add_argument(
        "--id-field",
        metavar="NAME",
        help="field with the id of each text (default: the id is file:line)",
    )


def add_include(parser: argparse.ArgumentParser) -> None:
    """--include, for `find`."""
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="read files with other endings too, as .md is read, such as '*.rst'; may be repeated",
    )


def find(
    inputs: Sequence[str],
    args: argparse.Namespace,
    *,
    quiet: bool = False,
    on_bad: OnBad | None = None,
) -> TextSources:
    """The sources that `inputs` stand for; tells how many other files are passed over."""
    from gguf_embed.io import sources

    here = sources.find(inputs, field=args.field, include=args.include, on_bad=on_bad)
    if here.remark and not quiet:
        console.say(here.remark)
    return here


def add_accept_licence(parser: argparse.ArgumentParser) -> None:
    """--accept-licence, for `agree_to_licence`."""
    parser.add_argument(
        "--accept-licence",
        action="store_true",
        help="you agree to a licence that forbids commercial use",
    )


def agree_to_licence(source: Source, *, accepted: bool) -> None:
    """Show a licence that forbids commercial use, and fetch nothing under it unasked."""
    card = source.card
    if card is None or card.commercial:
        return
    console.say(f"{card.id}: licence {card.licence}, no commercial use {card.licence_url or ''}")
    if source.path is None and not accepted:
        raise BadInput(f"{card.id}: agree to its licence with --accept-licence, then run it again")


def licence_line(licence: Licence) -> str:
    """A licence for people."""
    forbids = ", no commercial use" if licence.commercial is False else ""
    url = f" {licence.url}" if licence.url else ""
    return console.plain(f"{licence.name or 'not known'}{forbids}{url}")


def licence_json(licence: Licence) -> dict[str, object]:
    """A licence for programs."""
    return {"name": licence.name, "url": licence.url, "commercial": licence.commercial}


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size(text: str) -> int:
    """Bytes of "6GiB", "6G", "500 MB" or "123456", for argparse; a B alone counts by 1,000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 6GiB or 500MB")
    number, unit, suffix = found.groups("")
    factor = _UNITS[unit.upper()]
    if suffix.upper() == "B" and unit:
        factor = 1000 ** list(_UNITS).index(unit.upper())
    return int(float(number) * factor)
