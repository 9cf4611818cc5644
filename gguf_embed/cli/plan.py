"""`gguf-embed plan`: which file of a model this machine, or another, should run, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import BadInput, BadOption

if TYPE_CHECKING:
    from gguf_embed.machine.machine import Machine
    from gguf_embed.plan.candidate import Candidate
    from gguf_embed.plan.plan import Plan

DESCRIPTION = """\
Choose quantization, devices, context and microbatch of a model for this machine, or for one that
`gguf-embed probe --json` described, and show what was considered. The other commands choose in the
same way. Nothing is downloaded, except the headers of files whose model the catalog does not lay
out."""

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
Files below Q4_K_M are taken only with --quant. A file that is on this machine comes before one that
would have to be fetched, where both have room in the same place; offline there are no others.

examples:
  gguf-embed plan qwen3-embedding-8b
  gguf-embed plan auto                              the best Qwen3-Embedding for this machine
  gguf-embed plan bge-m3 --prefer speed --memory 4GiB
  gguf-embed plan qwen3-embedding-4b --machine gpu-server.json --json"""


def add(commands: Any) -> None:
    """The parser of `plan`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help=COMMANDS["plan"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name of `gguf-embed models`, owner/repo on the Hub, a .gguf file, or auto",
    )
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="of `probe --json` (default: this machine)"
    )
    options.add_limits(parser)
    group = parser.add_argument_group("choice")
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
    from gguf_embed.engine import choice
    from gguf_embed.machine import measured
    from gguf_embed.plan import plan
    from gguf_embed.plan.settings import Settings
    from gguf_embed.store import names

    settings = Settings(**options.limits(args), allow_smaller=args.allow_smaller)
    machine = _machine(args.machine)
    if args.any_quant and args.model != plan.AUTO:
        card = names.sources(args.model)[0].card
        if card is None:
            raise BadOption(
                f"{args.model}: what its other quantizations take is not known; name a file"
            )
        # What was measured here says nothing about another machine.
        known = () if args.machine else measured.load(machine.usable_cores)
        made = plan.plan_for(card, machine, settings, known=known, any_quant=True)
    else:
        made = choice.choose(args.model, machine, settings, mine=args.machine is None).plan
    if args.json:
        console.print_json("plan", _json(made, machine))
    else:
        _print(made, machine)
    return 0


def _machine(path: Path | None) -> Machine:
    from gguf_embed.machine.machine import machine_from_json
    from gguf_embed.machine.probe import probe
    from gguf_embed.system import paths

    if path is None:
        return probe(store=paths.home())
    try:
        return machine_from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}; make it with `probe --json`") from None
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _print(made: Plan, machine: Machine) -> None:
    from gguf_embed.plan.memory import mib

    console.print_text(f"{made.model} on {machine.name}{machine.origin}")
    console.out("")
    console.print_table(
        ("quant", "where", "n_ctx", "needed", "free", "verdict", "reason"),
        [
            (
                row.quant,
                row.where,
                str(row.run.n_ctx),
                mib(row.needed_bytes),
                mib(row.free_bytes),
                row.fit,
                f"{row.reason}; measured here: {row.known}" if row.known else row.reason,
            )
            for row in made.considered
        ],
    )
    console.out("")
    console.print_text(f"chosen: {made.quant} on {made.chosen.where}, {made.fit}")
    for why in made.why:
        console.print_text(why, "  ")
    console.out("")
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
        console.out("")
        console.print_text(f"more room: {made.suggestion}; --allow-smaller takes it")


def _json(made: Plan, machine: Machine) -> dict[str, object]:
    from dataclasses import asdict

    run = made.run
    return {
        "machine": machine.name,
        "source": machine.source,
        "model": made.model,
        "quant": made.quant,
        "reason": made.reason,
        "file": made.file and asdict(made.file),
        "tier": made.tier,
        "verdict": made.fit,
        "devices": made.devices,
        "n_gpu_layers": run.n_gpu_layers,
        "n_ctx": run.n_ctx,
        "max_batch_tokens": run.max_batch_tokens,
        "n_contexts": run.n_contexts,
        "n_threads": run.n_threads,
        "memory": {name: asdict(part) for name, part in made.memory.items()},
        "considered": [_row_json(row) for row in made.considered],
        "why": made.why,
        "suggestion": made.suggestion,
    }


def _row_json(row: Candidate) -> dict[str, object]:
    from dataclasses import asdict

    return {"verdict" if key == "fit" else key: value for key, value in asdict(row).items()}
