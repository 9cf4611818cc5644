"""`gguf-embed compare`: may vectors of two models, or of two files, be used together?"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import BadInput, BadOption, TextTooLong
from gguf_embed.io.flow import place

if TYPE_CHECKING:
    from gguf_embed.io.record import Record
    from gguf_embed.lab.compare import Comparison
    from gguf_embed.vectors import Vectors

DESCRIPTION = """\
Tell whether two models, quantization levels, prompts, dimensions or poolings give one vector
space: the same texts are embedded with both, or two files of vectors of the same texts, as
`gguf-embed embed` writes them (.npy or .jsonl), are taken as they are."""

EPILOG = """\
verdicts, by the cosine that 99 % of the texts reach and the ten nearest other texts of each:
  yes      cosine 0.995, 95 % of the neighbours the same: vectors may be mixed (F16 and Q8_0)
  close    cosine 0.85, 75 %: nearly; some neighbours change (F16 and Q4_0)
  no       anything else: embed again with one of the two
Exit code 0 for yes and close, 1 for no.

The texts are 125 short English sentences, or those of --texts, which tell more; of more than
2,000, as many evenly spaced. Where the dimensions differ, the longer vectors are cut.

examples:
  gguf-embed compare model-F16.gguf model-Q4_K_M.gguf
  gguf-embed compare minilm minilm --prompt-name-b query
  gguf-embed compare old.npy new.jsonl
  gguf-embed compare qwen3-embedding-0.6b:Q8_0 mine.gguf --texts docs.jsonl --dimensions-a 256"""


def add(commands: Any) -> None:
    """The parser of `compare`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare", help=COMMANDS["compare"], description=DESCRIPTION, epilog=EPILOG
    )
    for name in "AB":
        parser.add_argument(
            name.lower(),
            metavar=name,
            help="name of a model, .gguf file, or file of vectors (.npy, .jsonl)",
        )
    parser.add_argument(
        "--texts", action="append", default=[], metavar="INPUT", help="file, directory or -"
    )
    parser.add_argument(
        "--field", metavar="NAME", help="field of .jsonl or .csv with the text (default: text)"
    )
    options.add_include(parser)
    for name in "ab":
        group = parser.add_argument_group(f"vectors of {name.upper()}")
        group.add_argument(
            f"--prompt-name-{name}", metavar="NAME", help="the model's own prompt, such as query"
        )
        group.add_argument(
            f"--dimensions-{name}",
            type=options.positive,
            metavar="N",
            help="keep the first N of a model trained for it",
        )
        group.add_argument(
            f"--pooling-{name}",
            choices=options.POOLINGS,
            help="how token vectors become one (default: what the model says)",
        )
    parser.add_argument("--json", action="store_true", help="the result as one JSON document")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    about: Mapping[str, object]  # the keys of NAME.meta.json that decide the vectors
    vectors: Vectors


def run(args: argparse.Namespace) -> int:
    """Print the comparison; returns 0 for yes and close, 1 for no."""
    from gguf_embed.lab.compare import compare
    from gguf_embed.lab.stored import is_stored

    for name in (args.a, args.b):
        if not is_stored(name):
            _check_no_text(name)
    of_files = [is_stored(name) for name in (args.a, args.b)]
    if of_files[0] != of_files[1]:
        raise BadOption(
            f"{args.a} and {args.b}: one holds vectors, the other is a model; embed the same "
            "texts with it first: gguf-embed embed TEXTS -o NAME.npy"
        )
    sides = _stored(args) if of_files[0] else _embedded(args)
    comparison = compare(sides[0].vectors, sides[1].vectors)
    if args.json:
        console.print_json("compare", _report(sides, comparison))
    else:
        _print(sides, comparison)
    return int(comparison.likeness == "no")


def _check_no_text(name: str) -> None:
    """Refuse a file that is neither a model nor vectors. Raises BadOption."""
    from gguf_embed.io.sources import KINDS

    path = Path(name)
    is_text = path.suffix.lower() in KINDS
    if not is_text and path.suffix.lower() != ".gguf" and path.is_file():
        try:
            with path.open("rb") as file:
                is_text = file.read(4) != b"GGUF"
        except OSError:
            return  # opening it as a model says why
    if is_text:
        raise BadOption(
            f"{name}: is no model and no file of vectors (.npy, .jsonl); to compare two models on "
            f"its texts, name them and pass --texts {shlex.quote(name)}"
        )


def _stored(args: argparse.Namespace) -> list[_Side]:
    from gguf_embed.lab.compare import evenly
    from gguf_embed.lab.stored import stored

    made_with = ("prompt_name_a", "prompt_name_b", "dimensions_a", "dimensions_b")
    given = [
        name
        for name in (*made_with, "pooling_a", "pooling_b", "texts")
        if vars(args)[name] not in (None, [])
    ]
    if given:
        raise BadOption(
            f"--{given[0].replace('_', '-')} says how to embed; {args.a} and {args.b} hold vectors "
            "already"
        )
    files = [stored(Path(name)) for name in (args.a, args.b)]
    if files[0].shape[0] != files[1].shape[0]:
        raise BadInput(
            f"{args.a} has {files[0].shape[0]} rows, {args.b} {files[1].shape[0]}; only vectors of "
            "the same texts in the same order can be compared"
        )
    places = evenly(files[0].shape[0])
    keys = ("model", "quant", "pooling", "prompt", "normalized")
    return [
        _Side(
            about={"file": file.path.name}
            | {key: file.about[key] for key in keys if key in file.about}
            | {"dim": file.shape[1]},
            vectors=file.rows(places),
        )
        for file in files
    ]


def _embedded(args: argparse.Namespace) -> list[_Side]:
    from gguf_embed.lab.parallel import parallel_sentences

    records = _records(args) if args.texts else None
    texts = [r.text for r in records] if records else parallel_sentences().sentences["en"]
    return [_embed(getattr(args, name), name, args, texts, records) for name in ("a", "b")]


def _records(args: argparse.Namespace) -> list[Record]:
    """The texts to compare on: each once, none blank, not too many."""
    from gguf_embed.io.read import read
    from gguf_embed.io.record import Reading
    from gguf_embed.lab.compare import MIN_TEXTS, evenly

    sources = options.find(args.texts, args, quiet=args.json)
    records = read(sources, Reading(field=args.field), stdin=console.stdin())
    different = list({record.text: record for record in records if record.text.strip()}.values())
    if len(different) < MIN_TEXTS:
        raise BadInput(
            f"{', '.join(args.texts)}: {len(different)} different texts; at least {MIN_TEXTS} are "
            "needed for a verdict"
        )
    return [different[i] for i in evenly(len(different))]


def _embed(
    model: str,
    name: str,
    args: argparse.Namespace,
    texts: Sequence[str],
    records: Sequence[Record] | None,
) -> _Side:
    from gguf_embed.plan.settings import Settings

    said = vars(args)
    prompt_name = said[f"prompt_name_{name}"]
    settings = Settings(pooling=options.pooling(said[f"pooling_{name}"]), tune=False)
    with options.open_embedder(model, settings, quiet=args.json) as embedder:
        options.warn_dimensions(embedder, said[f"dimensions_{name}"])
        prompt = "" if prompt_name is None else embedder.prompt(prompt_name)
        try:
            vectors = embedder.encode(
                texts, prompt=prompt, dimensions=said[f"dimensions_{name}"], progress=False
            )
        except TextTooLong as error:
            row, n_tokens = error.rows[0]
            where = place(records[row]) if records else f"sentence {row + 1}"
            raise BadInput(
                f"{where}: {n_tokens} tokens, {model} takes {error.n_ctx} ({len(error.rows)} "
                "texts are too long); split them or leave them out"
            ) from error
        about = {
            "file": embedder.path.name,
            "model": embedder.model_id,
            "quant": embedder.quant,
            "pooling": embedder.pooling.name.lower(),
            "prompt": prompt,
            "dim": vectors.shape[1],
        }
    return _Side(about=about, vectors=vectors)


def _report(sides: Sequence[_Side], comparison: Comparison) -> dict[str, object]:
    cosine = comparison.cosine
    return {
        "verdict": comparison.likeness,
        "why": comparison.why,
        "a": dict(sides[0].about),
        "b": dict(sides[1].about),
        "n_texts": comparison.n_texts,
        "cosine": {key: round(getattr(cosine, key), 6) for key in ("mean", "p1", "min")},
        "overlap_at_10": round(comparison.overlap, 6),
        "rank_correlation": round(comparison.rank_correlation, 6),
    }


def _print(sides: Sequence[_Side], comparison: Comparison) -> None:
    a, b = (side.about for side in sides)
    rows = [
        (key, _shown(a.get(key)), _shown(b.get(key)), "" if a.get(key) == b.get(key) else "differs")
        for key in dict.fromkeys((*a, *b))
    ]
    console.print_table(("", "A", "B", ""), rows)
    cosine = comparison.cosine
    console.out(
        f"\n{comparison.n_texts:,} texts\n"
        f"cosine            mean {cosine.mean:.4f}, 1st percentile {cosine.p1:.4f}, "
        f"min {cosine.min:.4f}\n"
        f"overlap@10        {comparison.overlap:.3f}\n"
        f"rank correlation  {comparison.rank_correlation:.4f}\n\n"
        f"{comparison.likeness}: {comparison.why}"
    )


def _shown(value: object) -> str:
    return (
        "?"
        if value is None
        else repr(value)
        if isinstance(value, str) and not value
        else str(value)
    )
