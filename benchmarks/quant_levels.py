"""`gguf-embed bench`, kept: the same comparison several times, and whether the verdicts agree.

    python benchmarks/quant_levels.py minilm-F32.gguf --quants F16,Q8_0,Q4_K_M \\
        --repeat 3 --out benchmarks/results/quant-levels-minilm

Takes the arguments of `gguf-embed bench`. Writes report.md and its plots of the last run,
run-1.json and so on, and stability.md. The levels are made once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from gguf_embed import bench, cli, evaluation, plots, report
from gguf_embed.bench import Report
from gguf_embed.cli import console, options


def main(argv: list[str]) -> None:
    own = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--repeat", type=options.positive, default=1)
    ours, rest = own.parse_known_args(argv)
    args = cli.parser().parse_args(["bench", *rest])
    ours.out.mkdir(parents=True, exist_ok=True)
    subject = bench.find_subject(args.models)
    task = evaluation.limited(bench.read_task(args.texts, args.queries, args.qrels), args.limit)
    plan = bench.Plan(
        rounds=args.rounds, quality=not args.no_quality, settings=options.settings(args)
    )
    runs: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="gguf-embed-bench-", dir=args.scratch) as folder:
        levels = bench.make_levels(subject, args.quants, Path(folder), console.say)
        for number in range(1, ours.repeat + 1):
            console.say(f"run {number} of {ours.repeat}")
            found = bench.run(subject, levels, task, plan, scratch=Path(folder), say=console.say)
            runs.append(found)
            text = json.dumps(report.to_json(found), indent=1, ensure_ascii=False)
            (ours.out / f"run-{number}.json").write_text(text + "\n", encoding="utf-8")
    report.write_markdown(runs[-1], ours.out / "report.md", plots.draw(runs[-1], ours.out))
    if len(runs) > 1:
        (ours.out / "stability.md").write_text(stability(runs), encoding="utf-8")


def stability(runs: list[Report]) -> str:
    """Speeds, quality and verdicts of each run side by side, as Markdown."""
    lines = [f"# The same comparison {len(runs)} times: {runs[0].model}", ""]
    lines += [
        "| level | tokens/s | apart | quality | verdicts |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for i, result in enumerate(runs[0].results):
        each = [run.results[i] for run in runs]
        speeds = [one.costs.tokens_per_s for one in each if one.costs]
        scores = [one.quality.by_dim[runs[0].dim] for one in each if one.quality]
        said = dict.fromkeys(report.verdict(run, one) for run, one in zip(runs, each, strict=True))
        apart = f"{100 * (max(speeds) / min(speeds) - 1):.0f} %" if speeds else "-"
        lines.append(
            f"| {result.level.name} | {', '.join(f'{one:,.0f}' for one in speeds)} | {apart} | "
            f"{', '.join(dict.fromkeys(f'{one:.4f}' for one in scores))} | "
            f"{'the same: ' if len(said) == 1 else ''}{'; '.join(said)} |"
        )
    lines += ["", *dict.fromkeys(f"- {report.advice(run)}" for run in runs)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
