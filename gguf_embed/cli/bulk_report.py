"""What a person reads of a job: before it, and at its end."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console
from gguf_embed.errors import duration
from gguf_embed.system.files import printable

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.jobs.forecast import Forecast
    from gguf_embed.jobs.job import JobReport


def print_report(
    report: JobReport,
    made_with: Mapping[str, object],
    args: argparse.Namespace,
    *,
    dim: int,
    failed_file: Path,
    open_s: float,
    embed_s: float,
) -> None:
    """What a job has done."""
    failed_name = printable(failed_file) if report.n_failed else None
    shape = [report.n_rows, dim]
    summary: dict[str, Any] = {
        "file": args.output,
        "shape": shape,
        "n_texts": report.n_rows,
        "n_tokens": report.n_tokens,
        "n_computed_tokens": report.n_computed_tokens,
        "tokens_per_s": round(report.tokens_per_s, 1),
        "n_truncated": report.n_truncated,
        "first_truncated": report.first_truncated,
        "n_failed": report.n_failed,
        "first_failed": report.first_failed,
        "failed_file": failed_name,
        "n_shards": report.n_shards,
        "n_kept_shards": report.n_kept_shards,
        "n_kept_texts": report.n_kept_rows,
        "n_cached_texts": report.n_cached_rows,
        "open_s": round(open_s, 3),
        "embed_s": round(embed_s, 3),
        "made_with": made_with,
    }
    if args.json and not args.quiet:
        console.print_json("embed", summary)
    elif not args.quiet:
        console.say(
            f"{console.counted(report.n_rows, 'text')}, "
            f"{console.counted(report.n_tokens, 'token')} in {embed_s:.2f} s "
            f"({report.tokens_per_s:,.0f} tokens/s); {report.n_truncated:,} truncated; "
            f"{made_with['model']} {made_with['quant']}; {args.output}: "
            f"{made_with['vector_type']} {tuple(shape)}"
        )
        if report.n_kept_rows or report.n_cached_rows:
            console.say(
                f"not computed again: {console.counted(report.n_kept_rows, 'text')} of "
                f"{console.counted(report.n_kept_shards, 'shard')} done before, "
                f"{console.counted(report.n_cached_rows, 'text')} from the cache"
            )
        if report.n_truncated:
            more = ", ..." if report.n_truncated > len(report.first_truncated) else ""
            places = ", ".join(report.first_truncated)
            console.say(f"truncated to {made_with['n_ctx']} tokens: {places}{more}")
    if report.n_failed:
        console.say(f"{console.counted(report.n_failed, 'row')} without a vector, in {failed_name}")


def print_forecast(seen: Forecast, args: argparse.Namespace, embedder: Embedder) -> None:
    """What a job will take."""
    if args.json:
        console.print_json("forecast", asdict(seen))
        return
    mib = 2**20
    bars = max((each.n_texts for each in seen.histogram), default=1)
    console.print_pairs(
        [
            ("texts", f"{seen.n_texts:,} in {console.counted(seen.n_shards, 'shard')}"),
            (
                "tokens",
                f"{seen.n_tokens:,}; {seen.n_computed_tokens:,} to compute; "
                f"longest text {seen.most_tokens:,}",
            ),
            ("too long", f"{seen.n_too_long:,} (more than {embedder.n_ctx:,} tokens)"),
            ("unusable", f"{seen.n_unusable:,}"),
            ("speed", f"{seen.tokens_per_s:,.0f} tokens/s, measured on a sample"),
            ("time", duration(seen.seconds)),
            ("memory", f"{seen.memory_bytes / mib:,.0f} MiB"),
            ("result", f"{seen.result_bytes / mib:,.1f} MiB"),
        ]
    )
    console.out("")
    console.print_table(
        ("tokens", "texts", ""),
        [
            (
                f"to {each.most_tokens:,}",
                f"{each.n_texts:,}",
                "#" * round(30 * each.n_texts / bars),
            )
            for each in seen.histogram
        ],
    )
