"""The plans for every machine in tests/machines, as docs/plans.md.

python benchmarks/plans.py docs/plans.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.errors import DoesNotFit
from gguf_embed.gguf import layout, quants
from gguf_embed.machine.machine import Machine, machine_from_json
from gguf_embed.plan import rules
from gguf_embed.plan.memory import gpus_of, mib
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.plan import Plan, plan_auto, plan_for
from gguf_embed.plan.variants import Variant, variants_of

ROOT = Path(__file__).parents[1]
MODELS = ("qwen3-embedding-0.6b", "qwen3-embedding-4b", "qwen3-embedding-8b")
OTHERS = ("all-minilm-l6-v2", "bge-m3", "nomic-embed-text-v1.5")
INTRODUCTION = """\
# What runs where

Made by `python benchmarks/plans.py docs/plans.md` from the machine descriptions in
`tests/machines`; a test keeps it up to date. `gguf-embed plan MODEL` makes the same for your
machine, and shows every quantization that it considered.

*needed* and *free* are of the scarcest memory. *fits* leaves an eighth of what was free, at most
1 GiB, as it was; *tight* leaves at least a quarter of that, with small microbatches. `n_ctx` is the
longest text there is memory for: at least 8,192 tokens for a plan that fits, longer where it can
be had. Where all layers find room on a GPU that comes before a better quantization.

On a GPU the best quality that fits is taken. On a CPU it is the fastest of those that are as good:
down to Q5_K_M by published figures, which are those of a model with vectors of 1,024 numbers, down
to Q8_0 for smaller models. How fast they are is told by the table in gguf_embed/plan/speed.py, for
CPUs like those that were measured (benchmarks/LOG.md); what is within a tenth of the fastest counts
as fast, and the smallest of that is taken. A model that gives less than one text of 128 tokens a
second is named as slow, with a smaller one beside it.

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


def choices() -> Iterator[str]:
    """Of each machine and model: the best quality that fits, which was the default everywhere until
    speed counted, what is taken now, and why.
    """
    columns = ("machine", "model", "best quality", "taken", "why")
    yield "\n## What is taken, and why\n"
    yield "The layout of nomic's tensors is not known: the sizes of its files tell theirs."
    yield ""
    yield from (f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns)))
    for machine in machines():
        for name in (*MODELS, *OTHERS):
            card = catalog.find(name)
            assert card is not None
            try:
                plan = plan_for(card, machine, offered=_variants(card))
            except DoesNotFit:
                yield f"| {machine.name} | {name} | - | - | it does not fit |"
                continue
            best = _best_quality(card, machine).quant
            yield f"| {machine.name} | {name} | {best} | {plan.quant} | {plan.reason} |"


def _variants(card: ModelCard) -> tuple[Variant, ...]:
    """Of a model whose layout is not known: the token table by its numbers, the rest in layers."""
    if card.architecture in layout.ARCHITECTURES:
        return variants_of(card)
    assert card.shape is not None
    assert card.parameters is not None
    shape, found = card.shape, list[Variant]()
    for file in sorted(card.files, key=lambda file: quants.rank(file.quant)):
        n_bytes = file.n_bytes or 0
        input_bytes = n_bytes * shape.n_vocab * shape.n_embd // card.parameters
        layer_bytes = (n_bytes - input_bytes) // shape.n_layer
        found.append(
            Variant(
                model=card.id,
                quant=file.quant,
                file=file,
                shape=shape,
                mode=EmbedMode(pooling=card.pooling, causal=False, encoder=True),
                input_bytes=input_bytes,
                layer_bytes=(layer_bytes,) * shape.n_layer,
                output_bytes=0,
                output_copy_bytes=0,
                largest_bytes=layer_bytes // 3,
                gated=True,
                n_masks=1,
            )
        )
    return tuple(found)


def _best_quality(card: ModelCard, machine: Machine) -> Plan:
    """Without the rule that looks at speed."""
    every = rules.RULES
    rules.RULES = tuple(rule for rule in every if not rule.name.startswith("on a CPU the fastest"))  # pyright: ignore[reportAttributeAccessIssue, reportConstantRedefinition]
    try:
        return plan_for(card, machine, offered=_variants(card))
    finally:
        rules.RULES = every  # pyright: ignore[reportAttributeAccessIssue, reportConstantRedefinition]


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
    return "\n".join([*parts, *choices()]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), "utf-8")
