"""`gguf-embed quantize`: a model in another quantization, verified before it appears."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS

if TYPE_CHECKING:
    from gguf_embed.lab.forecast import Forecast
    from gguf_embed.lab.quantize import Made

DESCRIPTION = """\
Make a GGUF of another quantization level with llama.cpp's own quantizer. From one F16, BF16 or
F32 file comes every level.

The result is verified before it takes its name: it must have the tensor types that were
announced, load, and embed a few texts in several languages much as its source does. How near the
vectors are is told; `gguf-embed bench` and `compare` tell more."""

EPILOG = """\
LEVEL is what llama.cpp calls it: Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, Q3_K_M, Q2_K, IQ4_XS, ...

examples:
  gguf-embed quantize model-F16.gguf Q4_K_M -o model-Q4_K_M.gguf
  gguf-embed quantize qwen3-embedding-0.6b Q6_K -o qwen3-Q6_K.gguf      fetches its F16 if need be
  gguf-embed quantize model-F16.gguf Q4_K_M --token-embedding-type Q8_0 -o model-mixed.gguf
  gguf-embed quantize model-F16.gguf IQ3_XXS --imatrix imatrix.gguf -o model-IQ3_XXS.gguf"""


def add(commands: Any) -> None:
    """The parser of `quantize`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "quantize", help=COMMANDS["quantize"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("source", metavar="SRC", help="a .gguf file or the name of a model")
    parser.add_argument("level", metavar="LEVEL", help="such as Q8_0 or Q4_K_M")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT", help="the new .gguf file"
    )
    parser.add_argument(
        "--token-embedding-type",
        metavar="TYPE",
        help="of the embedding table alone (default: the level's choice)",
    )
    parser.add_argument(
        "--output-type",
        metavar="TYPE",
        help="of the output matrix alone; where a model has none, of its embedding table",
    )
    parser.add_argument(
        "--pure", action="store_true", help="every matrix in one type, not the level's mixture"
    )
    parser.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="importance matrix made by llama-imatrix"
    )
    parser.add_argument(
        "--force", action="store_true", help="also from a source that is quantized already"
    )
    parser.add_argument(
        "--threads", type=options.positive, metavar="N", help="CPU threads (default: all usable)"
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress line and no report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantize and verify; returns 0."""
    from gguf_embed.lab import forecast, quantize
    from gguf_embed.store import download

    recipe = forecast.Recipe(
        level=forecast.level_named(args.level),
        token_embedding_type=args.token_embedding_type,
        output_type=args.output_type,
        pure=args.pure,
        imatrix=args.imatrix,
        force=args.force,
        n_threads=args.threads,
    )
    source = forecast.find_source(args.source, force=args.force)
    with _Line.on_terminal(quiet=args.quiet) as line:
        path = download.fetch(
            source,
            progress=lambda here, total: line.show(
                f"fetching {source.label}: {here >> 20:,} of {total >> 20:,} MiB"
            ),
        )
        expected = forecast.forecast(path, recipe)
        made = quantize.make(
            expected,
            args.output,
            on_progress=lambda n, total, name: line.show(f"[{n}/{total}] {name}"),
            on_status=line.show,
        )
    if args.json:
        console.print_json("quantize", _report(expected, made))
    elif not args.quiet:
        _print(expected, made)
    return 0


class _Line:
    """One line of a terminal that is written over and over; shows nothing elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown

    @classmethod
    @contextmanager
    def on_terminal(cls, *, quiet: bool) -> Generator[_Line]:
        """A line that is gone at the end."""
        line = cls(shown=not quiet and sys.stderr.isatty())
        try:
            yield line
        finally:
            line.show("")

    def show(self, text: str) -> None:
        """Put `text` in place of what the line showed."""
        if self._shown:
            width = shutil.get_terminal_size().columns - 1
            # ESC [ K clears what was longer.
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()


def _report(forecast: Forecast, made: Made) -> dict[str, object]:
    recipe = forecast.recipe
    return {
        "source": str(forecast.path),
        "source_quant": forecast.source.quant,
        "source_n_bytes": forecast.source.file_bytes,
        "file": str(made.path),
        "quant": recipe.level,
        "n_bytes": made.n_bytes,
        "tensor_types": dict(forecast.types),
        "fallbacks": [
            {
                "row_length": fallback.row_length,
                "wanted": fallback.wanted,
                "given": fallback.given,
                "n_tensors": fallback.n_tensors,
            }
            for fallback in forecast.fallbacks
        ],
        "canary_cosine": {
            "mean": round(made.canaries.mean, 6),
            "min": round(made.canaries.min, 6),
            "different_texts": round(made.apart, 6),
        },
        "seconds": round(made.seconds, 2),
    }


def _print(forecast: Forecast, made: Made) -> None:
    source_bytes = forecast.source.file_bytes or 0
    types = ", ".join(f"{n} {type_name}" for type_name, n in forecast.types.items())
    console.out(
        f"{made.path}: {forecast.recipe.level}, {made.n_bytes:,} bytes, "
        f"{made.n_bytes / source_bytes:.0%} of {forecast.path.name} ({forecast.source.quant}), "
        f"in {made.seconds:.1f} s\n"
        f"  tensors   {types}"
    )
    for fallback in forecast.fallbacks:
        console.out(f"  fallback  {fallback}")
    console.out(
        f"  verified  loads and embeds; cosine to the source: mean {made.canaries.mean:.4f}, "
        f"min {made.canaries.min:.4f} (different texts: {made.apart:.2f})"
    )
