"""`gguf-embed tune`: measure how this machine runs a model fastest, and keep it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS

if TYPE_CHECKING:
    from gguf_embed.engine.tune_record import Trial, Tuned
    from gguf_embed.plan.settings import RunSettings

DESCRIPTION = """\
Measure real microbatches with weight repacking, flash attention, contexts x threads and microbatch
size changed one after the other. The fastest setting whose vectors are right is kept for this
model file, CPU and llama.cpp build, and used from then on. Without it a model runs as planned, and
a run that lasts tries the size of its microbatches and its threads within its own work (--no-tune
leaves that out). `gguf-embed plan --prefer speed` compares levels by what `tune` measured."""

EPILOG = """\
columns:
  tokens/s   of one microbatch per context, the best of two after a warm-up
  cosine     least agreement with llama.cpp's own pooling without flash attention
  kept       the setting became the best so far

examples:
  gguf-embed tune
  gguf-embed tune model.gguf --budget 300
  gguf-embed tune model.gguf --threads 4 --json > tuned.json"""


def add(commands: Any) -> None:
    """The parser of `tune`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune", help=COMMANDS["tune"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=options.BUILTIN,
        help="a name of `gguf-embed models`, owner/repo on the Hub, any .gguf file, or auto "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pooling", choices=options.POOLINGS, help="for a file that does not say (default: asked)"
    )
    parser.add_argument(
        "--threads", type=options.positive, metavar="N", help="cores to use (default: chosen)"
    )
    parser.add_argument(
        "--budget",
        type=options.positive,
        metavar="SECONDS",
        default=120,
        help="start nothing new after this long (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="the record as JSON")
    options.add_limits(parser, batch=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, keep and print; returns 0."""
    from gguf_embed.engine import tune
    from gguf_embed.engine.opening import prove_model
    from gguf_embed.engine.tune_record import to_json
    from gguf_embed.plan.settings import Settings

    settings = Settings(
        **options.limits(args), pooling=options.pooling(args.pooling), n_threads=args.threads
    )
    with console.transfer("fetch", quiet=False) as moved:
        proved = prove_model(args.model, settings, on_status=console.say, on_download=moved)
    if proved.safe.remark:
        console.say(proved.safe.remark)
    tuned = tune.tune(
        proved.target,
        budget_s=args.budget,
        on_trial=lambda trial: console.say(f"{trial.changed}: {trial.tokens_per_s:,.0f} tokens/s"),
    )
    if args.json:
        console.print_json("tune", json.loads(to_json(tuned)))
        return 0
    _print(tuned)
    return 0


def _print(tuned: Tuned) -> None:
    columns = ("changed", "tokens/s", "cosine", "kept")
    console.print_table(columns, [_row(trial) for trial in tuned.trials])
    console.print_text(f"best: {_spelled(tuned.settings)}")
    console.print_text(
        f"{tuned.tokens_per_s:,.0f} tokens/s, untuned {tuned.untuned_tokens_per_s:,.0f}; "
        f"measured in {tuned.seconds:.0f} s and kept"
    )
    if tuned.load is not None and not tuned.load.quiet:
        console.out(f"{tuned.load}; it will be measured again when the machine is quiet")


def _row(trial: Trial) -> tuple[str, str, str, str]:
    kept = "yes" if trial.kept else ""
    return trial.changed, f"{trial.tokens_per_s:,.0f}", f"{trial.cosine:.5f}", kept


def _spelled(settings: RunSettings) -> str:
    gpu = f", {settings.n_gpu_layers} layers on the GPU" if settings.n_gpu_layers else ""
    contexts = console.counted(settings.n_contexts, "context")
    threads = console.counted(settings.n_threads, "thread")
    return (
        f"{contexts} x {threads}, microbatch {settings.batch_tokens} tokens, "
        f"flash attention {_on(settings.flash_attn)}, repacking {_on(settings.repack)}, "
        f"accelerator {_on(settings.accelerator)}, "
        f"last layer read {'before' if settings.tap else 'after'} the language-model head{gpu}"
    )


def _on(value: bool) -> str:
    return "on" if value else "off"
