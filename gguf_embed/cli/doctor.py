"""`gguf-embed doctor`: what is installed, whether it works, what would make it faster."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gguf_embed import __version__
from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import GgufEmbedError
from gguf_embed.gguf import quants

if TYPE_CHECKING:
    from gguf_embed.machine.load import Load
    from gguf_embed.machine.machine import Machine
    from gguf_embed.machine.selftest import Verdict

PACKAGES = ("llama-cpp-python", "numpy", "huggingface-hub", "psutil", "rich")
WEIGHT_TYPES = quants.TESTED_TYPES

DESCRIPTION = """\
Check the installation: versions, devices and CPU features, the native self-test (run anew, in
child processes, so that a crash is only a verdict), a text embedded with the built-in model, what
our own kernels gain. Then what would make it faster. Exit code 1 where embedding does not work."""

EPILOG = """\
examples:
  gguf-embed doctor
  gguf-embed doctor --json > report.json      to send with a bug report"""


def add(commands: Any) -> None:
    """The parser of `doctor`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor", help=COMMANDS["doctor"], description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0 where embedding works, else 1."""
    from gguf_embed.engine.gain import Gain, measure_gain
    from gguf_embed.machine.advice import advised
    from gguf_embed.machine.machine import machine_to_json, summary
    from gguf_embed.machine.probe import probe
    from gguf_embed.native.library import LIBRARY_VARIABLE
    from gguf_embed.system import paths

    versions = {"gguf-embed": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    elsewhere = os.environ.get(LIBRARY_VARIABLE)
    machine = advised(probe(store=paths.home()))
    # Where the library cannot be loaded there is nothing to test; the remarks say why.
    verdicts, on_gpus, advice = _self_test(machine) if machine.build is not None else ({}, {}, [])
    works, embedding = _embed_one()
    gain = measure_gain() if works else Gain(kernel=None, remark="nothing does here")
    advice = [*machine.remarks, *advice, *_heal()]
    load, measurements = _measurements(machine) if machine.build is not None else (None, {})
    if versions["rich"] == "-":
        advice.append("no progress bars without rich: pip install 'gguf-embed[cli]'")
    if args.json:
        report = {
            "works": works,
            "embedding": embedding,
            "versions": versions,
            "library_path": elsewhere,
            "machine": json.loads(machine_to_json(machine)),
            "load": None if load is None else load.before,
            "measurements": measurements,
            "self_test": {v.weight_type: v.stages for v in verdicts.values()},
            "gpu_self_test": on_gpus,
            "accelerator": asdict(gain),
            "advice": advice,
        }
        console.print_json("doctor", report)
        return 0 if works else 1
    rows = [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    rows += [line for line in summary(machine) if line[0] != "remark"]
    if elsewhere is not None:
        rows.append(("libraries", f"{elsewhere} ({LIBRARY_VARIABLE})"))
    for verdict in verdicts.values():
        results = verdict.stages
        if verdict.weight_type in on_gpus:
            results = {**results, "GPU": on_gpus[verdict.weight_type]}
        stages = ", ".join(f"{stage} {result}" for stage, result in results.items())
        rows.append(("self-test", f"{verdict.weight_type}: {stages}"))
    if load is not None:
        rows.append(("load", f"other work keeps {100 * load.before:.0f} % of the cores busy"))
    if measurements:
        rows.append(("measured", ", ".join(f"{n} {name}" for name, n in measurements.items())))
    rows.append(("accelerator", str(gain)))
    rows.append(("embedding", embedding))
    rows += [("advice", text) for text in advice]
    console.print_pairs(rows)
    console.out("embedding works here" if works else "embedding does not work here")
    return 0 if works else 1


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _self_test(machine: Machine) -> tuple[dict[str, Verdict], dict[str, str], list[str]]:
    """The verdicts, tested anew, the results on all GPUs together, and what both advise.

    What was kept as bad is tested as well.
    """
    from gguf_embed.machine import selftest
    from gguf_embed.plan.memory import gpus_of

    kept_as_bad = [name for name, v in selftest.verdicts().items() if not v.good]
    verdicts = selftest.run([*dict.fromkeys([*WEIGHT_TYPES, *kept_as_bad])])
    advice: list[str] = []
    if any(v.proven and v.plain == selftest.OK and not v.good for v in verdicts.values()):
        advice.append(f"the self-test fails at some fast paths; rebuild: {selftest.REINSTALL}")
    if forgotten := selftest.forget_bad_gpus():
        advice.append(
            f"kept as bad on a GPU: {', '.join(forgotten)}; forgotten, so that the next model "
            "with layers on that GPU tests it again"
        )
    gpus = [gpu.description for gpu in gpus_of(machine)]
    on_gpus = selftest.run_gpus([*verdicts], gpus) if gpus else {}
    results = [*on_gpus.values(), *(r for v in verdicts.values() for r in v.stages.values())]
    proofs = {name: r for name, r in on_gpus.items() if selftest.is_proof(r)}
    if bad := [f"{name}: {r}" for name, r in proofs.items() if r != selftest.OK]:
        advice.append(
            f"the self-test fails on the GPU ({', '.join(bad)}): such models run on the CPU; "
            "update the GPU's driver, or compile llama.cpp anew for it (README)"
        )
    causes = {r for r in results if not selftest.is_proof(r)}
    advice += [f"the self-test could not be made: {cause}" for cause in sorted(causes)]
    return verdicts, on_gpus, advice


def _heal() -> list[str]:
    """Remove what is damaged of what was kept; it is measured anew when it is needed."""
    from gguf_embed.engine.tune import Tuned
    from gguf_embed.machine import measured, selftest
    from gguf_embed.system import paths
    from gguf_embed.system.kept import remove_damaged

    removed = [
        *remove_damaged(paths.home() / "selftest", *selftest.KEPT),
        *remove_damaged(paths.home() / "measured", measured.KEPT),
        *remove_damaged(paths.home() / "tune", Tuned),
    ]
    return [f"{path} was damaged and is removed; it is measured anew" for path in removed]


def _measurements(machine: Machine) -> tuple[Load | None, dict[str, int]]:
    """How busy the machine is, and how many measurements of `plan` were made here, by use."""
    from gguf_embed.machine import measured
    from gguf_embed.machine.load import LoadMeter

    load = LoadMeter(machine.usable_cores).end()
    runs = measured.load(machine.usable_cores)
    n_busy = sum(not run.quiet for run in runs)
    counts = {"used by plan": len(runs) - n_busy, "under load, not used": n_busy}
    return load, {name: n for name, n in counts.items() if n}


def _embed_one() -> tuple[bool, str]:
    """Whether a text becomes a unit vector with the built-in model, and what came out."""
    import numpy as np

    from gguf_embed.plan.settings import Settings

    try:
        with options.open_embedder(options.BUILTIN, Settings(tune=False), quiet=True) as embedder:
            vector = embedder.encode("Is anybody there?")
    except GgufEmbedError as error:
        return False, str(error)
    length = float(np.linalg.norm(vector))
    return abs(length - 1) < 1e-3, f"{embedder.model_id}: {len(vector)} values, length {length:.4f}"
