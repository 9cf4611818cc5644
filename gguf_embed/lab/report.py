"""What a bench found, for people: verdicts in words, tables, JSON, a Markdown report.

The rules behind the words are told in docs/evaluation.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from gguf_embed.errors import OutputFailed, counted
from gguf_embed.lab.levels import Level
from gguf_embed.lab.metrics import AS_GOOD, MIN_PASSAGES, MOSTLY_SAME, SAME_RESULTS
from gguf_embed.lab.quality import Quality
from gguf_embed.lab.results import Costs, Report, Result
from gguf_embed.machine.measured import Loss

AS_FAST = 1.07  # ratio of speeds, either way, that is no difference
TRIMMED = 5  # from so many rounds the best and the worst ratio are left out


# ---------------------------------------------------------------------------------------------
# In words


def verdict(report: Report, result: Result) -> str:
    """One line on a level against the reference."""
    reference = report.results[0]
    if result.failure is not None:
        return f"fails on this machine: {result.failure}"
    if result is reference:
        return "the reference"
    name = report.reference
    said = [_quality_in_words(result.quality, name)] if result.quality else []
    if result.costs and reference.costs:
        said.append(_speed_in_words(result.costs, reference.costs, "" if said else name))
    said.append(f"{_percent(result.level.n_bytes / reference.level.n_bytes)} of the size")
    return ", ".join(said)


def _quality_in_words(quality: Quality, reference: str) -> str:
    loss = quality.loss
    if loss is None:
        share = f"{_percent(quality.overlap)} of the ten nearest are the same"
        if quality.n_passages < MIN_PASSAGES:
            return f"too few texts to tell it from {reference} ({share})"
        if quality.overlap >= SAME_RESULTS:
            return f"finds nearly the same texts as {reference} ({share})"
        if quality.overlap >= MOSTLY_SAME:
            return f"finds mostly the same texts as {reference} ({share})"
        return f"finds other texts than {reference} (only {share})"
    if loss.bound <= AS_GOOD:
        within = max(ceil(round(loss.bound * 1000, 6)) / 10, 0.1)
        return f"as good as {reference} within {within:.1f} % on these texts"
    low, high = (loss.low, loss.high) if loss.mean > 0 else (-loss.high, -loss.low)
    what = (
        f"loses {_percent(loss.mean, 1)} of"
        if loss.mean > 0
        else f"gains {_percent(-loss.mean, 1)} on"
    )
    chance = ", or it is chance" if low <= 0 else ""
    return f"{what} the quality of {reference}{chance} ({100 * low:.1f} to {_percent(high, 1)})"


def _speed_in_words(costs: Costs, reference: Costs, name: str) -> str:
    """`name` of the reference, where it has not been said yet."""
    ratio = _speed_ratio(costs, reference)
    if ratio is None:
        return "not surely faster or slower" + (f" than {name}" if name else "")
    if ratio == 1:
        return "as fast" + (f" as {name}" if name else "")
    factor = f"{max(ratio, 1 / ratio):.1f}x"
    return f"{factor} {'faster' if ratio > 1 else 'slower'}" + (f" than {name}" if name else "")


def _speed_ratio(costs: Costs, other: Costs) -> float | None:
    """How many times faster than the other; 1 where it is about the same, None if not sure.

    Rounds are compared one by one, as they ran side by side; of five and more the best and the
    worst are left out.
    """
    pairs = zip(costs.tokens_per_s_rounds, other.tokens_per_s_rounds, strict=True)
    ratios = sorted(a / b for a, b in pairs)
    inner = ratios[1:-1] if len(ratios) >= TRIMMED else ratios
    middle = median(inner)
    if inner[0] >= 1 / AS_FAST and inner[-1] <= AS_FAST:
        return 1.0
    if inner[0] <= 1 <= inner[-1]:
        return None
    return middle


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def advice(report: Report) -> str:
    """What to take: of the levels that are as good as the reference, the fast and the small."""
    working = [(r, r.costs) for r in report.results if r.costs is not None]
    good = [(r, costs) for r, costs in working if r.quality and r.quality.as_good]
    among = good or working
    _, fastest = max(among, key=lambda one: one[1].tokens_per_s)
    # Of those that the rounds do not tell from the fastest, the smallest: a second run agrees.
    fast = min((r for r, costs in among if _speed_ratio(costs, fastest) in (None, 1)), key=_n_bytes)
    small = min((r for r, _ in among), key=_n_bytes)
    of = f"of the levels as good as {report.reference}" if good else "of these levels"
    open_end = ""
    if not good:
        judged = any(r.quality for r, _ in working)
        open_end = f"; {'too few texts to compare' if judged else 'not compared for'} quality"
    if fast is small:
        return f"take {fast.level.name}: {of} it is the fastest and the smallest{open_end}"
    return (
        f"take {fast.level.name} for speed or {small.level.name} for size: {of} these are the "
        f"fastest and the smallest{open_end}"
    )


def _n_bytes(result: Result) -> int:
    return result.level.n_bytes


# ---------------------------------------------------------------------------------------------
# In tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as they are shown, and what the columns mean."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(report: Report) -> tuple[Table, ...]:
    """Speed and size, then quality, then quality of shorter vectors; those that were measured."""
    found = [_costs_table(report)]
    judged = [(r.level.name, r.quality) for r in report.results if r.quality is not None]
    if judged:
        found.append(_quality_table(report, judged))
        if len(judged[0][1].by_dim) > 1:
            found.append(_dims_table(report, judged))
    return tuple(found)


def _costs_table(report: Report) -> Table:
    measured = [r.costs for r in report.results if r.costs is not None]
    has_gpu = any(costs.gpu_bytes is not None for costs in measured)
    columns = ("level", "size", "tokens/s", "spread", "one text", "load", "RAM")
    columns += ("GPU",) if has_gpu else ()
    rows: list[tuple[str, ...]] = []
    for result in report.results:
        costs, level = result.costs, result.level
        cells = [level.name + ("*" if level.fallbacks else ""), shown_bytes(level.n_bytes)]
        if costs is None:
            cells += ["-"] * (len(columns) - 2)
        else:
            cells += [
                f"{costs.tokens_per_s:,.0f}",
                f"\u00b1{_percent(costs.spread)}" if report.rounds > 1 else "-",
                f"{costs.latency_s * 1000:.1f} ms",
                f"{costs.load_s:.2f} s",
                shown_bytes(costs.peak_bytes),
            ]
            cells += [shown_bytes(costs.gpu_bytes or 0)] if has_gpu else []
        types = ", ".join(f"{kind} {_percent(n)}" for kind, n in level.types.items() if n >= 0.01)
        rows.append((*cells, types))
    notes = [
        f"tokens/s: median of {_rounds(report)} of {measured[0].n_texts:,} texts "
        f"({measured[0].n_tokens:,} tokens), spread: half their range; one text: median time of a "
        f"single query; RAM: peak of the process, {shown_bytes(measured[0].python_bytes)} before "
        "the model",
    ]
    notes += [
        f"* {r.level.name}: {_fallbacks(r.level)}" for r in report.results if r.level.fallbacks
    ]
    return Table(
        title="Size and speed",
        columns=(*columns, "types of weights"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _rounds(report: Report) -> str:
    return f"{report.rounds} interleaved rounds" if report.rounds > 1 else "one round"


def _fallbacks(level: Level) -> str:
    """What llama.cpp put in place of the level's own types."""
    said: list[str] = []
    for length in dict.fromkeys(one.row_length for one in level.fallbacks):
        swaps = [
            f"{one.given} for {one.wanted} ({one.n_tensors})"
            for one in level.fallbacks
            if one.row_length == length
        ]
        said.append(
            f"matrices with rows of {length:,}, which do not fill its blocks: {', '.join(swaps)}"
        )
    return "; ".join(said)


def _quality_table(report: Report, judged: Sequence[tuple[str, Quality]]) -> Table:
    first = judged[0][1]
    columns = ["level", "cosine", "1st pct", "least", "same top 10"]
    columns += ["recall@10"] if first.recall is not None else []
    columns += ["nDCG@10 of reference"]
    columns += ["nDCG@10", "lost (95 %)"] if first.ndcg is not None else []
    columns += ["translations"] if first.matching is not None else []
    rows: list[tuple[str, ...]] = []
    for name, quality in judged:
        cosine, loss = quality.cosine, quality.loss
        cells = [name, f"{cosine.mean:.4f}", f"{cosine.p1:.4f}", f"{cosine.min:.4f}"]
        cells += [_percent(quality.overlap, 1)]
        cells += [_percent(quality.recall, 1)] if quality.recall is not None else []
        cells += [f"{quality.ndcg_of_reference:.4f}"]
        if quality.ndcg is not None:
            cells += [
                f"{quality.ndcg:.4f}",
                _interval(loss) if loss and name != report.reference else "-",
            ]
        cells += [_percent(quality.matching, 1)] if quality.matching is not None else []
        rows.append(tuple(cells))
    r = report.reference
    notes = [f"cosine: of each text's vector to its vector in {r}: mean, 1st percentile, least"]
    notes += [f"same top 10: of the ten nearest texts of each text, share that {r} has too"]
    if first.recall is not None:
        notes += [f"recall@10: of the ten passages that {r} finds for a query, share found"]
    notes += [f"nDCG@10 of reference: the ranking of {r} is the truth; 1 is the same order"]
    if first.ndcg is not None:
        notes += ["nDCG@10: by the qrels; lost: share of the reference's, and its 95 % interval"]
    if first.matching is not None:
        notes += ["translations: share found first among 125 sentences, mean over 42 directions"]
    if any(quality.n_truncated for _, quality in judged):
        notes += [f"longer than the model takes, and cut: {counted(first.n_truncated, 'text')}"]
    return Table(title="Quality", columns=tuple(columns), rows=tuple(rows), notes=tuple(notes))


def _interval(loss: Loss) -> str:
    # Adding 0 makes plus of a minus that rounding left.
    mean, low, high = (round(100 * one, 1) + 0.0 for one in (loss.mean, loss.low, loss.high))
    return f"{mean:+.1f} % ({low:+.1f} to {high:+.1f})"


def _dims_table(report: Report, judged: Sequence[tuple[str, Quality]]) -> Table:
    dims = tuple(judged[0][1].by_dim)
    notes = [f"{measure(report)} with vectors cut to their first values"]
    if not report.trained_dims:
        notes += [f"{report.model} was not trained for shorter vectors, or it is not known"]
    return Table(
        title="Shorter vectors",
        columns=("level", *(f"{dim:,}" for dim in dims)),
        rows=tuple(
            (name, *(f"{quality.by_dim[dim]:.4f}" for dim in dims)) for name, quality in judged
        ),
        notes=tuple(notes),
    )


def shown_bytes(n_bytes: int) -> str:
    """MiB; of small files with a decimal, as the levels of a small model lie close together."""
    mib = n_bytes / 2**20
    return f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.1f} MiB"


def measure(report: Report) -> str:
    """What `Quality.by_dim` holds, in words."""
    if report.has_qrels:
        return "nDCG@10"
    return f"nDCG@10 of the ranking of {report.reference}"


def headline(report: Report) -> str:
    """What was measured on what, in a line."""
    queries = f" and {report.n_queries:,} queries" if report.n_queries else ""
    return (
        f"{report.model}, {len(report.results)} levels, reference {report.reference}; "
        f"{report.n_passages:,} passages{queries}: {report.task}"
    )


# ---------------------------------------------------------------------------------------------
# For programs and for files


def to_json(report: Report) -> dict[str, Any]:
    """Plain values for JSON, verdicts and advice included."""
    plain = asdict(report)
    for result, fields in zip(report.results, plain["results"], strict=True):
        fields["level"]["path"] = str(result.level.path)
        fields["verdict"] = verdict(report, result)
        if result.costs is not None:
            fields["costs"]["spread"] = result.costs.spread
    return {**plain, "advice": advice(report)}


def markdown(report: Report, plots: Sequence[Path] = (), *, beside: Path = Path()) -> str:
    """The report as a file: verdicts, tables, plots (paths relative to `beside`), the machine."""
    lines = [f"# Quantization levels of {report.model}", "", headline(report) + ".", ""]
    lines += [f"- {r.level.name}: {verdict(report, r)}" for r in report.results]
    lines += ["", f"**{_capital(advice(report))}.**", ""]
    for table in tables(report):
        lines += [f"## {table.title}", "", _row(table.columns)]
        lines += [_row(["---", *["---:"] * (len(table.columns) - 1)])]
        lines += [_row(row) for row in table.rows]
        lines += ["", *(f"- {_escape(note)}" for note in table.notes), ""]
    for plot in plots:
        lines += [f"![{plot.stem}]({os.path.relpath(plot, beside).replace(os.sep, '/')})", ""]
    machine = report.machine
    lines += ["## Measured", "", *(f"- {remark}" for remark in report.remarks)]
    lines += [
        f"- {machine['cpu_model']}, {machine['usable_cores']} usable cores, {machine['os']}",
        f"- {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        f"- texts: {report.task}, sha256 {report.task_sha256[:16]}",
        f"- {_rounds(report)}, {report.seconds / 60:.0f} minutes in all",
    ]
    return "\n".join(lines) + "\n"


def write_markdown(report: Report, path: Path, plots: Sequence[Path] = ()) -> None:
    """Write the Markdown report; raises OutputFailed."""
    text = markdown(report, plots, beside=path.parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputFailed(f"{path}: not written: {error.strerror or error}") from error


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
