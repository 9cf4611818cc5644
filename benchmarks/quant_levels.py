"""`gguf-embed bench`, kept: each start adds a run, and from the second on it tells how they agree.

    python benchmarks/quant_levels.py minilm-F32.gguf --quants F16,Q8_0,Q4_K_M \\
        --out benchmarks/results/quant-levels-minilm

Takes the arguments of `gguf-embed bench`. Writes run-1.json and so on, report.md with its plots of
the last run, and stability.md over all runs in the folder. `--repeat 3` makes three runs at once,
with the levels made once.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf_embed import cli
from gguf_embed.cli import console, options
from gguf_embed.cli.bench import options_of
from gguf_embed.errors import BadOption, GgufEmbedError
from gguf_embed.lab import bench, levels, plots, report
from gguf_embed.lab.task_files import read_task
from gguf_embed.lab.tasks import limited

SAME = ("model", "task_sha256")  # of runs that can be compared


def main(argv: Sequence[str]) -> None:
    own = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--repeat", type=options.positive, default=1)
    ours, rest = own.parse_known_args(argv)
    args = cli.parser().parse_args(["bench", *rest])
    ours.out.mkdir(parents=True, exist_ok=True)
    subject = levels.find_subject(args.models)
    task = limited(read_task(args.texts, args.queries, args.qrels), args.limit)
    runs = read_runs(ours.out, like={"model": subject.name, "task_sha256": task.sha256})
    chosen = options_of(args)
    with tempfile.TemporaryDirectory(prefix="gguf-embed-bench-", dir=args.scratch) as folder:
        scratch = Path(folder)
        compared = levels.make_levels(subject, args.quants, scratch, console.say)
        for number in range(len(runs) + 1, len(runs) + 1 + ours.repeat):
            console.say(f"run {number}")
            found = bench.run(subject, compared, task, chosen, scratch=scratch, say=console.say)
            runs.append(report.to_json(found))
            # Runs are published: file names say enough, folders are nobody's business.
            for one in runs[-1]["results"]:
                one["level"]["path"] = Path(one["level"]["path"]).name
            text = json.dumps(runs[-1], indent=1, ensure_ascii=False)
            (ours.out / f"run-{number}.json").write_text(text + "\n", encoding="utf-8")
            drawn = plots.draw(found, ours.out)
            report.write_markdown(found, ours.out / "report.md", drawn)
    print((ours.out / "report.md").read_text("utf-8"))
    if len(runs) > 1:
        (ours.out / "stability.md").write_text(stability(runs), encoding="utf-8")
        print(stability(runs))


def read_runs(folder: Path, like: dict[str, str]) -> list[dict[str, Any]]:
    """The runs in a folder, oldest first; raises BadOption where they are of something else."""
    runs: list[dict[str, Any]] = []
    while (path := folder / f"run-{len(runs) + 1}.json").exists():
        run = json.loads(path.read_text("utf-8"))
        if any(run[name] != like[name] for name in SAME):
            raise BadOption(f"{path} is a run of {run['model']} on other texts; name another --out")
        runs.append(run)
    return runs


def stability(runs: Sequence[dict[str, Any]]) -> str:
    """Speeds, quality and verdicts of each run side by side, as Markdown.

    Levels are those that are in every run.
    """
    by_level = [{one["level"]["name"]: one for one in run["results"]} for run in runs]
    names = [name for name in by_level[0] if all(name in run for run in by_level)]
    rows: list[str] = []
    speed_apart: list[float] = []
    ratio_apart: list[float] = []
    changed: list[str] = []
    for name in names:
        each = [run[name] for run in by_level]
        said = [one["verdict"] for one in each]
        if len({_words(one) for one in said}) > 1:
            changed.append(name)
        scores = [
            one["quality"]["by_dim"][max(one["quality"]["by_dim"], key=int)]
            for one in each
            if one["quality"]
        ]
        speeds = [one["costs"]["tokens_per_s"] for one in each if one["costs"]]
        references = [run[names[0]]["costs"]["tokens_per_s"] for run in by_level]
        ratios = [
            one["costs"]["tokens_per_s"] / reference
            for one, reference in zip(each, references, strict=True)
            if one["costs"]
        ]
        speed_apart.append(_apart(speeds))
        ratio_apart.append(_apart(ratios))
        cells = (
            name,
            ", ".join(f"{one:,.0f}" for one in speeds) or "-",
            f"{100 * speed_apart[-1]:.0f} %",
            ", ".join(f"{one:.2f}x" for one in ratios) or "-",
            f"{100 * ratio_apart[-1]:.0f} %",
            ", ".join(dict.fromkeys(f"{one:.4f}" for one in scores)) or "-",
            "; ".join(dict.fromkeys(said)),
        )
        rows.append(f"| {' | '.join(cells)} |")
    advice = list(dict.fromkeys(run["advice"] for run in runs))
    lines = [
        f"# The same comparison {len(runs)} times: {runs[0]['model']}",
        "",
        f"| level | tokens/s | apart | of {names[0]} | apart | quality | verdicts |",
        "| --- | --- | ---: | --- | ---: | --- | --- |",
        *rows,
        "",
        f"- speeds of a level are at most {100 * max(speed_apart):.0f} % apart, their ratios to "
        f"{names[0]} at most {100 * max(ratio_apart):.0f} %",
        f"- verdicts: {len(names) - len(changed)} of {len(names)} levels get the same words in "
        f"every run, whatever the numbers{': not ' if changed else ''}{', '.join(changed)}",
        f"- advice: {'the same' if len(advice) == 1 else 'not the same'} in every run",
        *(f"  - {one}" for one in advice),
    ]
    return "\n".join(lines) + "\n"


def _apart(values: Sequence[float]) -> float:
    """How much larger the largest is than the smallest, as a share; 0 for none."""
    return max(values) / min(values) - 1 if values else 0.0


def _words(verdict: str) -> str:
    """A verdict without its numbers."""
    return re.sub(r"-?\d[\d.,]*", "#", verdict)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GgufEmbedError as error:
        raise SystemExit(f"{error}") from error
