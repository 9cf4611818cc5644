"""`gguf-embed bundle`: a model with all that an offline machine needs to run it, in one folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS

if TYPE_CHECKING:
    from gguf_embed.bundle.bundle import Written

DESCRIPTION = """\
Write all that a machine without internet needs for a model into one folder: the GGUF, what the
catalog knows of it, its licence, the Python packages, a README, the SHA-256 of every file, and
texts in several languages with their vectors. There `gguf-embed unbundle` verifies the folder,
proves the model by these vectors and installs it. The folder appears complete or not at all."""

EPILOG = """\
The other machine needs this Python's version. It gets the portable llama.cpp, for every CPU, where
`make wheels` or `install.py --portable` made one here; else the llama.cpp of this CPU, and with
--for its source, which is compiled there. PLATFORM is a wheel tag: manylinux_2_28_x86_64,
manylinux_2_28_aarch64, musllinux_1_2_x86_64, macosx_14_0_arm64, win_amd64.

examples:
  gguf-embed bundle all-minilm-l6-v2 -o carry                     about 95 MB
  gguf-embed bundle qwen3-embedding:0.6b --quant Q8_0 -o carry
  gguf-embed bundle model.gguf --for manylinux_2_28_aarch64 -o carry
  gguf-embed bundle bge-m3 --no-wheels -o /media/disk/bge-m3      gguf-embed is there already"""


def add(commands: Any) -> None:
    """The parser of `bundle`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bundle",
        help=COMMANDS["bundle"],
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a name of `gguf-embed models`, hf:..., or a .gguf file"
    )
    parser.add_argument("--quant", metavar="Q", help="quantization, such as Q8_0")
    packages = parser.add_mutually_exclusive_group()
    packages.add_argument(
        "--for", dest="platform", metavar="PLATFORM", help="a machine unlike this one, see below"
    )
    packages.add_argument(
        "--no-wheels", action="store_true", help="leave out the Python packages, about 70 MB"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="a new or empty folder"
    )
    options.add_accept_licence(parser)
    parser.add_argument("--json", action="store_true", help="what was written as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress and no report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the bundle; returns 0."""
    from gguf_embed.bundle import bundle, wheels
    from gguf_embed.store import names

    source = names.resolve(args.model, args.quant)
    options.agree_to_licence(source, accepted=args.accept_licence)
    with console.transfer(source.label, quiet=args.quiet) as moved:
        written = bundle.write(
            source,
            args.output,
            accept_licence=args.accept_licence,
            packages_for=None if args.no_wheels else args.platform or wheels.HERE,
            progress=moved,
            on_status=None if args.quiet else console.say,
        )
    if args.json:
        console.print_json("bundle", _report(written))
    elif not args.quiet:
        console.out(
            f"{written.folder}: {written.source.label}, {written.n_files} files, "
            f"{written.n_bytes:,} bytes\n"
            f"  licence     {options.licence_line(written.licence)}\n"
            f"  SHA256SUMS  has sha256 {written.sums_sha256}\n"
            f"  next        carry it over and follow its README.md"
        )
    return 0


def _report(written: Written) -> dict[str, object]:
    return {
        "folder": str(written.folder),
        "model": written.source.name,
        "quant": written.source.quant,
        "sha256": written.source.sha256,
        "licence": options.licence_json(written.licence),
        "n_files": written.n_files,
        "n_bytes": written.n_bytes,
        "sums_sha256": written.sums_sha256,
    }
