"""`gguf-embed plan`: which file of a model this machine, or another, should run, and why."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.errors import BadInput, BadOption

if TYPE_CHECKING:
    from gguf_embed.hardware import Machine
    from gguf_embed.measured import Series
    from gguf_embed.plan import Limits, Plan

PREFERENCES = ("quality", "speed", "memory")

DESCRIPTION = """\
Choose quantization, devices, context and microbatch of a model for this machine, or for one that
`gguf-embed probe --json` described, and show what was considered. Nothing is downloaded, except
the headers of files whose model the catalog does not lay out."""

EPILOG = """\
verdicts:
  fits       leaves 1 GiB of each memory free (of small ones an eighth)
  tight      leaves at least a quarter of that, with small microbatches
  no         does not fit

what is preferred among files that fit (--prefer):
  quality    the best quantization (default); all layers on GPUs come first
  speed      the fastest of those as good as the best; by what was measured here of two or more
             levels, else K-quants from Q5_K_M up on a CPU, the smallest on a GPU
  memory     the smallest
`gguf-embed bench MODEL` measures speed and quality of the levels, `gguf-embed tune FILE` the speed
of one; both are kept, and shown here. What was measured to lose quality is passed over.
Files below Q4_K_M are taken only with --quant.

examples:
  gguf-embed plan qwen3-embedding-8b
  gguf-embed plan auto                              the best Qwen3-Embedding for this machine
  gguf-embed plan bge-m3 --prefer speed --memory 4GiB
  gguf-embed plan qwen3-embedding-4b --machine gpu-server.json --json"""


def add(commands: Any) -> None:
    """The parser of `plan`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help="what of a model to run here, and why", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name of `gguf-embed models`, owner/repo on the Hub, a .gguf file, or auto",
    )
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="of `probe --json` (default: this machine)"
    )
    group = parser.add_argument_group("limits (default: chosen)")
    group.add_argument("--quant", metavar="Q", help="quantization, such as Q8_0")
    group.add_argument(
        "--n-ctx", type=options.positive, metavar="N", help="longest text, in tokens"
    )
    group.add_argument(
        "--max-batch-tokens",
        type=options.positive,
        metavar="N",
        help="tokens computed at one time",
    )
    group.add_argument(
        "--n-gpu-layers", type=int, metavar="N", help="layers on GPUs; 0: none, -1: all"
    )
    group.add_argument(
        "--memory", type=size, metavar="SIZE", help="use at most this of RAM and of each GPU"
    )
    group = parser.add_argument_group("choice")
    group.add_argument("--prefer", choices=PREFERENCES, default="quality", help="see below")
    group.add_argument(
        "--any-quant",
        action="store_true",
        help="also quantizations that no file is known of: `gguf-embed quantize` makes them",
    )
    group.add_argument(
        "--allow-smaller",
        action="store_true",
        help="take a smaller model of the family where this one has little room",
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 0."""
    from gguf_embed import measured
    from gguf_embed.plan import Limits

    limits = Limits(
        quant=args.quant,
        n_ctx=args.n_ctx,
        max_batch_tokens=args.max_batch_tokens,
        n_gpu_layers=args.n_gpu_layers,
        memory_bytes=args.memory,
        prefer=args.prefer,
        allow_smaller=args.allow_smaller,
    )
    machine = _machine(args.machine)
    # What was measured here says nothing about another machine.
    known = () if args.machine else measured.load(machine.usable_cores)
    made = _plan(args.model, machine, limits, known, any_quant=args.any_quant)
    if args.json:
        console.print_json(_json(made, machine))
    else:
        _print(made, machine)
    return 0


def _machine(path: Path | None) -> Machine:
    from gguf_embed import hardware, paths

    if path is None:
        return hardware.probe(store=paths.home())
    try:
        return hardware.machine_from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}; make it with `probe --json`") from None
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _plan(
    name: str, machine: Machine, limits: Limits, known: Sequence[Series], *, any_quant: bool
) -> Plan:
    """By the catalog's shape where it has one, else by the headers of the files."""
    from dataclasses import replace

    from gguf_embed import catalog, hub, layout, plan

    if name == plan.AUTO:
        return plan.plan_auto(machine, limits, known=known)
    sources = hub.sources(name)
    card = sources[0].card
    one = sources[0].quant if len(sources) == 1 else None  # the name says which file
    if (
        card is not None
        and card.shape is not None
        and card.architecture in layout.ARCHITECTURES
        and (one is None or one in {file.quant for file in card.files})
    ):
        limits = replace(limits, quant=limits.quant or one)
        return plan.plan_for(card, machine, limits, known=known, any_quant=any_quant)
    if any_quant:
        raise BadOption(f"{name}: what its other quantizations take is not known; name a file")
    if limits.quant is not None:
        sources = [s for s in sources if s.quant in (None, limits.quant.upper())] or sources
    headers = [hub.remote_header(source) for source in sources]
    card = card or catalog.by_header(headers[0])
    found = [plan.variant(header, card=card) for header in headers]
    return plan.make_plan(found, machine, limits, known=known)


def _print(made: Plan, machine: Machine) -> None:
    from gguf_embed.plan import mib

    print(f"{made.model} on {machine.name} ({machine.source})\n")
    console.print_table(
        ("quant", "where", "n_ctx", "needed", "free", "verdict", "reason"),
        [
            (
                row.quant,
                row.where,
                str(row.run.n_ctx),
                mib(row.needed_bytes),
                mib(row.free_bytes),
                row.verdict,
                f"{row.reason}; measured here: {row.known}" if row.known else row.reason,
            )
            for row in made.considered
        ],
    )
    print(f"\nchosen: {made.quant} on {made.chosen.where}, {made.verdict}")
    for why in made.why:
        print(f"  {why}")
    print()
    console.print_table(
        ("memory", "weights", "cache", "compute", "output", "driver", "in all", "margin"),
        [
            (
                name,
                mib(part.weights_bytes),
                mib(part.cache_bytes),
                mib(part.compute_bytes),
                mib(part.host_bytes),
                mib(part.overhead_bytes),
                mib(part.used_bytes),
                mib(part.margin_bytes),
            )
            for name, part in made.memory.items()
        ],
    )
    if made.suggestion:
        print(f"\nmore room: {made.suggestion}; --allow-smaller takes it")


def _json(made: Plan, machine: Machine) -> dict[str, object]:
    from dataclasses import asdict

    return {"machine": machine.name, "source": machine.source, **asdict(made)}


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
