"""Does a job come to the same end, whatever kills it on the way?

    python benchmarks/jobs_faults.py --kills 50 --rows 20000
    python benchmarks/jobs_faults.py --kills 0 --memory-rows 100000 --fake   # memory alone

Embeds short texts with the built-in model, once undisturbed and once under kills at random
moments: SIGKILL, SIGTERM, and a disk that is full (a limit on the size of files: writing fails with
EFBIG as it would with ENOSPC). After each one the same command goes on with --resume. All files of
both results are compared byte for byte. Rows lost by a kill are those that were computed and are in
no shard. With --memory-rows another job's memory is sampled. Ends in a line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

WORDS = ("cat", "dog", "boat", "river", "house", "bread", "oven", "market", "table", "chair")
# The command, which writes into a file how many texts each of its microbatches had.
COMMAND = """
import os, signal, sys
from gguf_embed import cli
from gguf_embed.cli import options
from gguf_embed.jobs import job
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
real = job.Job._computed
def computed(self, microbatch):
    os.write(log, b"%d\\n" % microbatch.n_texts)
    real(self, microbatch)
job.Job._computed = computed
if sys.argv[1] == "fake":
    from gguf_embed.testing import FakeBackend, FakeEmbedder
    class Forgetful(FakeBackend):
        def run(self, sequences, **choices):
            self.microbatches.clear()  # which a test may look at
            return super().run(sequences, **choices)
    backend = Forgetful(dim=384)
    options.open_embedder = lambda *_, **__: FakeEmbedder.open(backend=backend)
sys.argv.pop(1)
sys.exit(cli.main())
"""


def write_rows(path: Path, n_rows: int) -> None:
    generator = random.Random(1)
    with path.open("w") as file:
        for row in range(n_rows):
            text = f"{generator.choice(WORDS)} {row}"  # none twice
            file.write(json.dumps({"id": row, "text": text, "n": row * 7}) + "\n")


def command(rows: Path, folder: Path, log: Path, shard_rows: int, *, fake: bool) -> list[str]:
    return [
        *(sys.executable, "-c", COMMAND, str(log), "fake" if fake else "real", "embed", str(rows)),
        *("-o", f"{folder}/", "--resume", "--id-field", "id", "--keep", "n", "--with-text"),
        *("--shard-rows", str(shard_rows), "--no-tune", "--no-isolated", "--quiet"),
    ]


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def computed(log: Path) -> int:
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def done_rows(folder: Path) -> int:
    path = folder / "manifest.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return sum(json.loads(line).get("n_rows", 0) for line in lines[1:] if line.endswith(b"}"))


def run_disturbed(
    call: list[str], folder: Path, kind: str, generator: random.Random, args: argparse.Namespace
) -> tuple[int, float]:
    """The exit code of one run, and the seconds from the signal to it."""
    if kind == "full disk":
        size = generator.randrange(1, args.shard_rows * 1500)  # less than a shard

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return subprocess.run(
            call, stderr=subprocess.DEVNULL, preexec_fn=limit, check=False
        ).returncode, 0.0
    process = subprocess.Popen(call, stderr=subprocess.DEVNULL)
    lock = folder / ".lock"
    # Counted from the moment of the lock, so that not every one dies while it starts.
    while process.poll() is None and not (lock.exists() and lock.read_text() == str(process.pid)):
        time.sleep(0.02)
    time.sleep(generator.uniform(0, args.most_s))
    began = time.monotonic()
    if process.poll() is None:
        process.send_signal(signal.SIGKILL if kind == "SIGKILL" else signal.SIGTERM)
    return process.wait(), time.monotonic() - began


def kill_again_and_again(
    args: argparse.Namespace, rows: Path, folder: Path, log: Path, whole: dict[str, str]
) -> dict[str, Any]:
    """Job after job, until there were as many kills as asked for; each is compared."""
    generator = random.Random(args.seed)
    call = command(rows, folder, log, args.shard_rows, fake=args.fake)
    ends: Counter[str] = Counter()
    identical: list[bool] = []
    lost: list[int] = []
    slowest_s = 0.0
    while len(lost) < args.kills:
        kind = generator.choice(("SIGKILL", "SIGTERM", "full disk"))
        before = computed(log) - done_rows(folder)
        code, seconds = run_disturbed(call, folder, kind, generator, args)
        if kind == "SIGTERM" and code:
            slowest_s = max(slowest_s, seconds)
        ends[f"{kind}: {code}" if code else "finished before"] += 1
        if code:
            lost.append(computed(log) - done_rows(folder) - before)
        print(f"{len(lost)} {kind} {code} {done_rows(folder)} rows", flush=True)
        if code == 0 or len(lost) == args.kills:
            subprocess.run(call, stderr=subprocess.DEVNULL, check=True)
            identical.append(digest(folder) == whole)
            if len(lost) < args.kills:
                shutil.rmtree(folder)
                log.write_text(str(computed(log) - args.rows) + "\n")
    return {
        "kills": len(lost),
        "ends": dict(ends),
        "slowest_exit_after_sigterm_s": round(slowest_s, 2),
        "jobs": len(identical),
        "byte_identical": all(identical),
        "most_rows_lost_by_a_kill": max(lost, default=0),
        "rows_lost_by_all_kills": sum(lost),
    }


def memory(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The memory of a longer job, as its rows go by."""
    rows, output, log = folder / "many.jsonl", folder / "many", folder / "many.log"
    write_rows(rows, args.memory_rows)
    process = psutil.Popen(
        command(rows, output, log, 2048, fake=args.fake), stderr=subprocess.DEVNULL
    )
    seen: list[dict[str, float]] = []
    while process.poll() is None:
        try:
            mib = process.memory_info().rss / 2**20
        except psutil.Error:
            break
        seen.append({"rows": computed(log), "rss_mib": round(mib, 1)})
        time.sleep(args.memory_rows / 100_000)
    step = max(1, len(seen) // 12)
    return seen[::step] + seen[-1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--shard-rows", type=int, default=500)
    parser.add_argument("--most-s", type=float, default=8.0)
    parser.add_argument("--memory-rows", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fake", action="store_true", help="an engine that computes nothing")
    args = parser.parse_args()
    result: dict[str, Any] = {"rows": args.rows, "shard_rows": args.shard_rows, "fake": args.fake}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.kills:
            rows = folder / "rows.jsonl"
            write_rows(rows, args.rows)
            began = time.monotonic()
            whole, log = folder / "whole", folder / "whole.log"
            call = command(rows, whole, log, args.shard_rows, fake=args.fake)
            subprocess.run(call, check=True)
            result["undisturbed_s"] = round(time.monotonic() - began, 1)
            expected = digest(whole)
            result["files"] = len(expected)
            folder_killed, log = folder / "killed", folder / "killed.log"
            result |= kill_again_and_again(args, rows, folder_killed, log, expected)
        if args.memory_rows:
            result["memory"] = memory(args, folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
