"""The plans for every machine in tests/machines, as docs/plans.md.

python benchmarks/plans.py docs/plans.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from gguf_embed.catalog import catalog
from gguf_embed.errors import DoesNotFit
from gguf_embed.machine.machine import Machine, machine_from_json
from gguf_embed.plan.memory import gpus_of, mib
from gguf_embed.plan.plan import Plan, plan_auto, plan_for

ROOT = Path(__file__).parents[1]
MODELS = ("qwen3-embedding-0.6b", "qwen3-embedding-4b", "qwen3-embedding-8b")
INTRODUCTION = """\
# What runs where

Made by `python benchmarks/plans.py docs/plans.md` from the machine descriptions in
`tests/machines`; a test keeps it up to date. `gguf-embed plan MODEL` makes the same for your
machine, and shows every quantization that it considered.

*needed* and *free* are of the scarcest memory. *fits* leaves an eighth of what was free, at most
1 GiB, as it was; *tight* leaves at least a quarter of that, with small microbatches. `n_ctx` is the
longest text there is memory for: at least 8,192 tokens for a plan that fits, longer where it can
be had. Where all layers find room on a GPU that comes before a better quantization.

Machines described by specification have 457 MiB of each NVIDIA GPU set aside for the driver; a
reading already has that taken off.

Nothing was measured on these machines. On your own, `gguf-embed bench` and `tune` keep what they
measured, and `plan` shows it and chooses by it: see [evaluation](evaluation.md).
"""


def machines() -> Iterator[Machine]:
    for path in sorted((ROOT / "tests" / "machines").glob("*.json")):
        yield machine_from_json(path.read_text("utf-8"))


def rows(machine: Machine) -> Iterator[tuple[str, ...]]:
    for name in MODELS:
        card = catalog.find(name)
        assert card is not None
        try:
            plan = plan_for(card, machine)
        except DoesNotFit as error:
            needed, free = mib(error.needed_bytes), mib(error.free_bytes)
            suggestion = str(error).partition("; try ")[2]
            yield name, "-", "-", "no", "-", "-", needed, free, suggestion
            continue
        yield name, *_cells(plan)
    plan = plan_auto(machine)
    yield f"auto: {plan.model}", *_cells(plan)


def _cells(plan: Plan) -> tuple[str, ...]:
    row = plan.chosen
    return (
        plan.quant,
        row.where,
        plan.fit,
        f"{plan.run.n_ctx:,}",
        str(plan.run.max_batch_tokens),
        mib(row.needed_bytes),
        mib(row.free_bytes),
        plan.suggestion or "",
    )


def document() -> str:
    parts = [INTRODUCTION.rstrip()]
    columns = ("model", "quantization", "where", "verdict", "n_ctx", "microbatch", "needed", "free")
    for machine in machines():
        gpus = [f"{g.name} {g.description}, {mib(g.free_bytes)} free" for g in gpus_of(machine)]
        ram = f"RAM {mib(machine.ram_available_bytes)} free"
        shared = ", shared with the GPU" if machine.unified_memory else ""
        parts.append(
            f"\n## {machine.name}\n\n{machine.source}; {'; '.join((*gpus, ram))}{shared}\n"
        )
        header = (*columns, "with room to spare")
        table = [header, ("---",) * len(header), *rows(machine)]
        parts.extend(f"| {' | '.join(row)} |" for row in table)
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), "utf-8")
