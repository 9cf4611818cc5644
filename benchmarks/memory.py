"""Predicted memory against what llama.cpp reports, per device and part, as a Markdown table.

    python benchmarks/memory.py FILE.gguf ... [--n-ctx N] [--max-batch-tokens N] [--n-gpu-layers N]

Each file is planned for this machine (or run as the options say), really loaded, and its contexts
are made as the engine makes them, the one for long texts too, and each is filled once. At the end:
how much less memory each GPU has free, and how much the process has grown.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gguf_embed.catalog import catalog
from gguf_embed.engine.runner import Runner
from gguf_embed.gguf.header import read_header
from gguf_embed.machine import probe as hardware
from gguf_embed.native import library
from gguf_embed.native.model import Model
from gguf_embed.plan.contexts import longest_ordinary
from gguf_embed.plan.memory import HOST, MIB
from gguf_embed.plan.plan import make_plan
from gguf_embed.plan.settings import Settings
from gguf_embed.plan.variants import variant_of

REPORTED = (
    ("weights", re.compile(r"load_tensors: +(\S+) model buffer size = +([\d.]+) MiB")),
    ("cache", re.compile(r"llama_kv_cache: +(\S+) KV buffer size = +([\d.]+) MiB")),
    ("compute", re.compile(r"sched_reserve: +(\S+) compute buffer size = +([\d.]+) MiB")),
)
PARTS = ("weights", "cache", "compute")


class Reports(logging.Handler):
    """Sums of llama.cpp's reports in MiB, by (device, part)."""

    def __init__(self) -> None:
        super().__init__()
        self.mib: dict[tuple[str, str], float] = defaultdict(float)

    def emit(self, record: logging.LogRecord) -> None:
        for part, pattern in REPORTED:
            if found := pattern.search(record.getMessage()):
                buffer = found[1].split("_")[0]  # "CPU_Mapped", "MTL0_Mapped"
                # Pinned memory is RAM: CUDA_Host, Vulkan_Host, SYCL_Host.
                host = found[1].endswith("_Host") or buffer == HOST
                self.mib[HOST if host else buffer, part] += float(found[2])


def measure(path: Path, settings: Settings) -> dict[str, Any]:
    """Load and run one file in this process; predicted and reported MiB by device and part."""
    header = read_header(path)
    card = catalog.by_header(header)
    machine = hardware.probe()
    the_variant = variant_of(header, card=card)
    plan = make_plan([the_variant], machine, settings)
    run = plan.run
    reports = Reports()
    log = logging.getLogger("gguf_embed.llama")
    log.setLevel(logging.DEBUG)
    log.addHandler(reports)

    process = psutil.Process()
    free_before = {d.name: d.free_bytes for d in library.devices() if d.kind != "cpu"}
    rss_before = process.memory_info().rss
    model = Model(path, n_gpu_layers=run.n_gpu_layers, repack=False)
    rng = np.random.default_rng(0)
    with Runner(model, the_variant.mode, run) as runner:
        lengths = [run.max_batch_tokens] * run.n_contexts
        lengths += [run.n_ctx] if run.n_ctx > longest_ordinary(run, the_variant.mode) else []
        futures = [
            runner.submit([rng.integers(0, model.n_vocab, n).astype(np.int32)]) for n in lengths
        ]
        for future in futures:
            future.result()
        grown = process.memory_info().rss - rss_before
        free_after = {d.name: d.free_bytes for d in library.devices() if d.kind != "cpu"}
    model.close()
    predicted = {
        (name, part): getattr(memory, f"{part}_bytes") / MIB
        for name, memory in plan.memory.items()
        for part in PARTS
    }
    return {
        "file": path.name,
        "where": plan.chosen.where,
        "n_ctx": run.n_ctx,
        "max_batch_tokens": run.max_batch_tokens,
        "parts": [
            (device, part, predicted.get((device, part), 0.0), reports.mib.get((device, part), 0.0))
            for device, part in sorted({*predicted, *reports.mib})
        ],
        "in_all": [
            (HOST, plan.memory[HOST].used_bytes / MIB, grown / MIB),
            *(
                (name, plan.memory[name].used_bytes / MIB, (before - free_after[name]) / MIB)
                for name, before in free_before.items()
                if name in plan.memory
            ),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--n-ctx", type=int)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--n-gpu-layers", type=int)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        settings = Settings(
            n_ctx=args.n_ctx,
            max_batch_tokens=args.max_batch_tokens,
            n_gpu_layers=args.n_gpu_layers,
        )
        print(json.dumps(measure(args.files[0], settings)))
        return
    print("| file, context, microbatch | where | part | predicted MiB | actual MiB |")
    print("| --- | --- | --- | --- | --- |")
    options = [a for a in sys.argv[1:] if a not in map(str, args.files)]
    for path in args.files:
        # A process for each, so that one does not run in what another has left.
        command = [sys.executable, __file__, str(path), "--child", *options]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        run = f"{found['file']}, {found['n_ctx']:,}, {found['max_batch_tokens']}"
        for device, part, predicted, actual in found["parts"]:
            if predicted or actual:
                print(f"| {run} | {device} | {part} | {predicted:,.1f} | {actual:,.1f} |")
        for device, predicted, actual in found["in_all"]:
            name = "in all (process grew)" if device == HOST else "in all (free memory fell)"
            print(f"| {run} | {device} | {name} | {predicted:,.1f} | {actual:,.1f} |")


if __name__ == "__main__":
    main()
