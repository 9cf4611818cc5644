"""`gguf-embed doctor`: what is installed, whether it works, what would make it faster."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from gguf_embed import __version__
from gguf_embed.cli import console, options
from gguf_embed.errors import GgufEmbedError
from gguf_embed.gguf import quants

if TYPE_CHECKING:
    from gguf_embed.machine.selftest import Verdict

PACKAGES = ("llama-cpp-python", "numpy", "huggingface-hub", "psutil", "rich")
WEIGHT_TYPES = quants.TESTED_TYPES

DESCRIPTION = """\
Check the installation: versions, devices and CPU features, the native self-test (run anew, in
child processes, so that a crash is only a verdict), and a text embedded with the built-in model.
Then what would make it faster. Exit code 1 where embedding does not work."""

EPILOG = """\
examples:
  gguf-embed doctor
  gguf-embed doctor --json > report.json      to send with a bug report"""


def add(commands: Any) -> None:
    """The parser of `doctor`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor", help="what works, what would be faster", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0 where embedding works, else 1."""
    from gguf_embed.machine import selftest
    from gguf_embed.machine.advice import advised
    from gguf_embed.machine.machine import machine_to_json, summary
    from gguf_embed.machine.probe import probe
    from gguf_embed.system import paths

    versions = {"gguf-embed": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    machine = advised(probe(store=paths.home()))
    # Where the library cannot be loaded there is nothing to test; the remarks say why.
    verdicts = selftest.run(WEIGHT_TYPES) if machine.build is not None else {}
    works, embedding = _embed_one()
    advice = [*machine.remarks]
    if any(v.plain == selftest.OK and not _passes(v) for v in verdicts.values()):
        advice.append(f"the self-test fails at some fast paths; rebuild: {selftest.REINSTALL}")
    if versions["rich"] == "-":
        advice.append("no progress bars without rich: pip install 'gguf-embed[cli]'")
    if args.json:
        report = {
            "works": works,
            "embedding": embedding,
            "versions": versions,
            "machine": json.loads(machine_to_json(machine)),
            "self_test": {v.weight_type: _stages(v) for v in verdicts.values()},
            "advice": advice,
        }
        console.print_json("doctor", report)
        return 0 if works else 1
    rows = [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    rows += [line for line in summary(machine) if line[0] != "remark"]
    for verdict in verdicts.values():
        stages = ", ".join(f"{stage} {result}" for stage, result in _stages(verdict).items())
        rows.append(("self-test", f"{verdict.weight_type}: {stages}"))
    rows.append(("embedding", embedding))
    rows += [("advice", text) for text in advice]
    console.print_pairs(rows)
    console.out("embedding works here" if works else "embedding does not work here")
    return 0 if works else 1


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _stages(verdict: Verdict) -> dict[str, str]:
    return {"plain": verdict.plain, "flash": verdict.flash, "repack": verdict.repack}


def _passes(verdict: Verdict) -> bool:
    from gguf_embed.machine import selftest

    return all(result == selftest.OK for result in _stages(verdict).values())


def _embed_one() -> tuple[bool, str]:
    """Whether a text becomes a unit vector with the built-in model, and what came out."""
    import numpy as np

    from gguf_embed.engine.opening import Settings

    try:
        with options.open_embedder(options.BUILTIN, Settings(tune=False), quiet=True) as embedder:
            vector = embedder.encode("Is anybody there?")
    except GgufEmbedError as error:
        return False, str(error)
    length = float(np.linalg.norm(vector))
    return abs(length - 1) < 1e-3, f"{embedder.model_id}: {len(vector)} values, length {length:.4f}"
