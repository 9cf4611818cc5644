"""Is this the fastest way to embed these texts here? One run, side by side, on equal terms.

    python benchmarks/peers.py MODEL.gguf --workload mixed queries --llama-server PATH

Same texts, same model file, same cores. Every engine runs in its own process, one at a time;
rounds are interleaved, in another order each, so that a machine that slows down slows all. A peer
whose options matter enters twice: as it comes, and with the best of a list of settings, chosen
for it on the start of the workload. A time counts only if the vectors agree with ours.

Prints the ceiling, a table per workload, and one line of JSON last; `--out` keeps that in a file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import machine
import numpy as np
import numpy.typing as npt
import workloads
from contenders import Load
from workloads import Workload

from gguf_embed.gguf.header import Header, read_header
from gguf_embed.native.model import Model
from gguf_embed.vectors import Pooling

Vectors = npt.NDArray[np.float32]

PEERS = (
    *("untuned", "llama-cpp-python", "llama-server", "ik-llama-cpp"),
    *("sentence-transformers", "onnxruntime", "fastembed"),
)
OURS = "gguf-embed"
WARM_UP_TEXTS = 4
BUSY = 0.5  # load average before we start
MAX_SERVER_CTX = 65_536  # tokens in all slots: 7 GiB of cache for Qwen3-Embedding-0.6B
COMMAND_S = 3600  # a command that takes longer has hung

# Lowest cosine with our vector of the same text, by what both computed with. Quantized kernels
# depend on the number of rows, so like is not bit-equal to like; other weights (float32 against
# a quantization) differ by what the quantization costs. Vectors of different texts are far below.
TOLERANCE_FLOAT, TOLERANCE_QUANT, TOLERANCE_OTHER_WEIGHTS = 0.999, 0.99, 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the table: an engine, and the settings that it may choose from."""

    name: str
    load: Load
    candidates: tuple[dict[str, Any], ...]  # one: no choice
    tolerance: float


@dataclass(slots=True, kw_only=True)
class Result:
    """What became of an entry; `error` says why it has no times that count."""

    entry: Entry
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    tried: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    seconds: list[list[float]] = field(default_factory=list[list[float]])  # per round, per call
    min_cosine: float = 1.0
    peak_bytes: int = 0
    error: str | None = None

    def rates(self, n_tokens: int) -> list[float]:
        """Tokens/s of each round."""
        return [n_tokens / sum(calls) for calls in self.seconds]


class PeerError(Exception):
    """A peer crashed, hung, refused or answered something else than we did."""


class Child:
    """An engine in a process group of its own, driven line by line (see contenders.py)."""

    def __init__(self, load: Load, scratch: Path) -> None:
        self._scratch = scratch
        self._log = (scratch / "log.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("contenders.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self.facts = self._ask({"do": "load", **asdict(load)})
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def run(self, work: Workload) -> tuple[list[float], Vectors]:
        """Seconds of each call, and the vectors."""
        texts, vectors = self._scratch / "texts.json", self._scratch / "vectors.npy"
        texts.write_text(json.dumps(asdict(work)))
        answer = self._ask({"do": "run", "texts": str(texts), "vectors": str(vectors)})
        return answer["seconds"], np.load(vectors)

    def stop(self) -> int:
        """End it; its peak memory in bytes."""
        try:
            return int(self._ask({"do": "stop"})["peak_bytes"])
        finally:
            self.kill()

    def kill(self) -> None:
        """End whatever of it is left, a server that it started included."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.stdin:
                with contextlib.suppress(OSError):  # a broken pipe: it is gone
                    self._process.stdin.close()
            self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            if not select.select([stdout], [], [], COMMAND_S)[0]:
                raise PeerError(f"no answer to {request['do']!r} in {COMMAND_S} s")
            line = stdout.readline()
        if not line:
            raise PeerError(f"{self._end()} during {request['do']!r}{self._last_words()}")
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise PeerError(answer["error"])
        return answer

    def _end(self) -> str:
        status = self._process.wait()
        return f"died of {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().split("\n")
        said = " | ".join(line.strip() for line in lines[-4:] if line.strip())
        return f": {said[-300:]}" if said else ""


def entries(args: argparse.Namespace, header: Header, work: Workload, n: int) -> list[Entry]:
    """Who takes part in a workload whose longest text is `n` tokens; ours is the first."""
    base = Load(kind=OURS, model=str(args.model), n_threads=args.threads, max_tokens=n)
    peer_model = args.peer_model or args.model
    like = TOLERANCE_FLOAT if header.quant in ("F16", "F32", "BF16") else TOLERANCE_QUANT
    if peer_model != args.model:
        like = TOLERANCE_OTHER_WEIGHTS
    llama_cpp = replace(base, kind="llama-cpp-python", model=str(peer_model))
    splits = header.causal and header.pooling is Pooling.LAST
    server = replace(base, kind="llama-server", model=str(peer_model), binary=args.llama_server)
    torch = replace(base, kind="sentence-transformers", model=str(args.st_model))
    asked = set(args.peers)
    table = [(OURS, base, ({},), like, True)]
    table += [("gguf-embed untuned", base, ({"tune": False},), like, "untuned" in asked)]
    wanted = "llama-cpp-python" in asked
    table += [
        ("Llama.embed", llama_cpp, ({},), like, wanted),
        ("Llama.embed, best", llama_cpp, llama_cpp_settings(n), like, wanted),
    ]
    wanted = "llama-server" in asked and args.llama_server is not None
    table += [
        ("llama-server", server, ({},), like, wanted),
        ("llama-server, best", server, server_settings(n, work.one_by_one, splits), like, wanted),
    ]
    wanted = "sentence-transformers" in asked and args.st_model is not None
    table += [
        (f"sentence-transformers {dtype}", torch, settings, TOLERANCE_OTHER_WEIGHTS, wanted)
        for dtype in ("float32", "bfloat16")
        for settings in (torch_settings(dtype, work.one_by_one),)
    ]
    wanted = "onnxruntime" in asked and args.onnx_model is not None
    onnx = replace(base, kind="onnxruntime", model=str(args.onnx_model))
    table += [
        (f"ONNX Runtime {name}", onnx, settings, TOLERANCE_OTHER_WEIGHTS, wanted)
        for name in ("float32", "int8")
        for settings in (onnx_settings(name, work.one_by_one),)
    ]
    wanted = "fastembed" in asked and args.onnx_model is not None
    onnx = replace(onnx, kind="fastembed")
    table += [
        (f"fastembed {name}", onnx, settings, TOLERANCE_OTHER_WEIGHTS, wanted)
        for name in ("float32", "int8")
        for settings in (onnx_settings(name, work.one_by_one),)
    ]
    ik = replace(llama_cpp, kind="ik-llama-cpp")
    wanted = "ik-llama-cpp" in asked and importlib.util.find_spec("ik_llama_cpp") is not None
    table += [("ik_llama.cpp, best", ik, ik_settings(n, work.one_by_one), like, wanted)]
    return [
        Entry(name=name, load=load, candidates=candidates, tolerance=tolerance)
        for name, load, candidates, tolerance, wanted in table
        if wanted
    ]


def llama_cpp_settings(max_tokens: int) -> tuple[dict[str, Any], ...]:
    """For `Llama`: batch and microbatch of equal size, as encoders and embeddings need it."""
    return tuple(
        {"n_ctx": size, "n_batch": size, "n_ubatch": size, "flash_attn": flash}
        for size in dict.fromkeys(_sizes(max_tokens))
        for flash in (True, False)
    )


def server_settings(max_tokens: int, one_by_one: bool, splits: bool) -> tuple[dict[str, Any], ...]:
    """For llama-server: slots, microbatch, flash attention, repacking, ways to send the texts.

    `splits`: it can spread a text over microbatches, as it does for last-token pooling.
    """
    small, large = (512, 2048) if splits else _sizes(max_tokens)
    slot = -(-(max_tokens + 1) // 256) * 256  # a text that fills its slot is refused
    most = max(1, MAX_SERVER_CTX // slot)

    def flags(slots: int, size: int, flash: str, *more: str) -> tuple[str, ...]:
        slots = min(slots, most)
        batch = ("-b", str(size), "-ub", str(size), "-fa", flash)
        return ("-np", str(slots), "-c", str(slots * slot), *batch, *more)

    one = "--kv-unified"
    if one_by_one:
        grid = [flags(1, small, flash, one) for flash in ("auto", "on", "off")]
        grid += [flags(1, small, "on", one, "--no-repack")]
        return tuple({"flags": list(f), "per_request": 1, "base64": True} for f in grid)
    grid = [flags(slots, small, "on", one) for slots in (1, 4, 8, 16, 64)]
    grid += [flags(4, small, "auto", one), flags(16, small, "off", one), flags(16, small, "on")]
    grid += [flags(slots, large, "on", one) for slots in (4, 16, 64)]
    grid += [flags(16, large, "off", one)]
    grid += [flags(slots, small, "on", one, "--no-repack") for slots in (4, 16)]
    # dict.fromkeys: for long texts some of these are the same.
    many = [{"flags": list(f), "per_request": 64, "base64": True} for f in dict.fromkeys(grid)]
    ways = ((1, 16), (32, 4), (1024, 1))
    many += [
        {
            "flags": list(flags(16, small, "on", one)),
            "per_request": per_request,
            "concurrency": concurrency,
            "base64": True,
        }
        for per_request, concurrency in ways
    ]
    return tuple(many)


def ik_settings(max_tokens: int, one_by_one: bool) -> tuple[dict[str, Any], ...]:
    """For ik_llama.cpp: run-time repacking, microbatch."""
    sizes = list(dict.fromkeys(_sizes(max_tokens)))[: 1 if one_by_one else None]
    return tuple({"repack": repack, "n_ubatch": n} for repack in (True, False) for n in sizes)


def torch_settings(dtype: str, one_by_one: bool) -> tuple[dict[str, Any], ...]:
    """For sentence-transformers: batch sizes."""
    sizes = (1,) if one_by_one else (1, 4, 8, 16, 32)
    return tuple({"dtype": dtype, "batch_size": size} for size in sizes)


def onnx_settings(name: str, one_by_one: bool) -> tuple[dict[str, Any], ...]:
    """For ONNX Runtime: batch sizes; fastembed's is 256."""
    sizes = (1,) if one_by_one else (1, 4, 8, 16, 32, 256)
    return tuple({"file": f"{name}.onnx", "batch_size": size} for size in sizes)


def _sizes(max_tokens: int) -> tuple[int, int]:
    """A small and a large microbatch that hold the longest text."""
    needed = -(-max_tokens // 256) * 256
    return max(512, needed), max(2048, needed)


def beginning(work: Workload, lengths: Sequence[int], n_tokens: int) -> Workload:
    """The first texts of a workload, about `n_tokens` tokens of them and at least one text."""
    n = sum(total <= n_tokens for total in accumulate(lengths))
    return replace(work, texts=work.texts[: max(n, 1)])


def check(found: Vectors, reference: Vectors, tolerance: float) -> float:
    """The lowest cosine of corresponding rows; PeerError if it is below the tolerance."""
    expected = reference[: len(found)]
    if found.shape != expected.shape:
        raise PeerError(f"vectors of shape {found.shape}, ours are {expected.shape}")
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = np.einsum("ij,ij->i", found, expected) / norms
    worst = int(np.argmin(np.where(np.isnan(cosines), -2, cosines)))
    if not cosines[worst] >= tolerance:
        raise PeerError(
            f"vectors disagree: cosine {cosines[worst]:.4f} at row {worst}, "
            f"{np.mean(cosines < tolerance):.0%} of rows below {tolerance}"
        )
    return float(cosines[worst])


def choose(entry: Entry, probe: Workload, reference: Vectors, scratch: Path) -> Result:
    """The entry with its fastest settings on the probe; each candidate is warmed, then timed."""
    result = Result(entry=entry, settings=entry.candidates[0])
    if len(entry.candidates) == 1:
        return result
    best = float("inf")
    for settings in entry.candidates:
        outcome: dict[str, Any] = {"settings": settings}
        try:
            with opened(entry, settings, scratch) as child:
                child.run(replace(probe, texts=probe.texts[:WARM_UP_TEXTS]))
                seconds, vectors = child.run(probe)
            check(vectors, reference, entry.tolerance)
            outcome["seconds"] = sum(seconds)
        except PeerError as error:
            outcome["error"] = str(error)
        result.tried.append(outcome)
        if outcome.get("seconds", best) < best:
            best, result.settings = outcome["seconds"], settings
        note(f"  {entry.name}: {settings} {outcome.get('seconds', outcome.get('error'))}")
    if best == float("inf"):
        result.error = f"no settings worked; first: {result.tried[0]['error']}"
    return result


@contextlib.contextmanager
def opened(entry: Entry, settings: dict[str, Any], scratch: Path) -> Iterator[Child]:
    """The engine of `entry`, ended on leaving."""
    where = Path(tempfile.mkdtemp(dir=scratch))
    child = Child(replace(entry.load, settings=settings), where)
    try:
        yield child
    finally:
        child.kill()
        shutil.rmtree(where)


def race(
    args: argparse.Namespace, listed: Sequence[Entry], work: Workload, lengths: Sequence[int]
) -> list[Result]:
    """Run a workload with every entry: choose settings, warm up, then interleaved rounds."""
    with tempfile.TemporaryDirectory(prefix="peers-") as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        warm_up = replace(work, texts=work.texts[:WARM_UP_TEXTS])
        ours = stack.enter_context(opened(listed[0], listed[0].candidates[0], scratch))
        note(f"{work.name}: reference vectors")
        ours.run(warm_up)
        reference = ours.run(work)[1]
        probe = beginning(work, lengths, args.probe_tokens)
        note(f"{work.name}: choosing settings on {len(probe.texts)} texts")
        results = [choose(entry, probe, reference, scratch) for entry in listed]
        children: dict[str, Child] = {}
        for result in results:
            if result.error is not None:
                continue
            with recorded(result):
                child = ours
                if result is not results[0]:
                    child = stack.enter_context(opened(result.entry, result.settings, scratch))
                    child.run(warm_up)
                result.facts = child.facts
                children[result.entry.name] = child
        for turn in range(args.rounds):
            shift = turn % len(results)
            for result in results[shift:] + results[:shift]:
                if result.error is not None:
                    continue
                with recorded(result):
                    seconds, vectors = children[result.entry.name].run(work)
                    lowest = check(vectors, reference, result.entry.tolerance)
                    result.min_cosine = min(result.min_cosine, lowest)
                    result.seconds.append(seconds)
                    note(f"  round {turn + 1}: {result.entry.name} {sum(seconds):.2f} s")
        for result in results:
            if result.error is None:
                with recorded(result):
                    result.peak_bytes = children[result.entry.name].stop()
    return results


@contextlib.contextmanager
def recorded(result: Result) -> Iterator[None]:
    """A peer's failure goes into its result and takes its times away; the others go on."""
    try:
        yield
    except PeerError as error:
        result.error = str(error)
        note(f"  {result.entry.name}: {error}")


def note(text: str) -> None:
    """Progress, on stderr: stdout holds the result only."""
    print(text, file=sys.stderr, flush=True)


def speed_summary(results: Sequence[Result], work: Workload, n_tokens: int) -> list[dict[str, Any]]:
    """Per entry: median and range of rounds, and ours against it, round by round."""
    ours = results[0].rates(n_tokens)
    rows: list[dict[str, Any]] = []
    for result in results:
        row: dict[str, Any] = {
            "name": result.entry.name,
            "model": result.entry.load.model,
            "settings": result.settings,
            "facts": result.facts,
            "tried": result.tried,
            "error": result.error,
        }
        rows.append(row)
        if result.error is not None:
            continue
        rates = result.rates(n_tokens)
        ratios = [mine / theirs for mine, theirs in zip(ours, rates, strict=False)]
        row |= {
            "seconds": [sum(calls) for calls in result.seconds],
            "tokens_per_s": statistics.median(rates),
            "tokens_per_s_range": [min(rates), max(rates)],
            "texts_per_s": statistics.median(rates) * len(work.texts) / n_tokens,
            "ours_is_times": statistics.median(ratios) if ratios else None,
            "ours_is_times_range": [min(ratios), max(ratios)] if ratios else None,
            "peak_bytes": result.peak_bytes,
            "min_cosine": result.min_cosine,
            "tolerance": result.entry.tolerance,
        }
        if work.one_by_one:
            calls = [seconds for round_ in result.seconds for seconds in round_]
            row["latency_s"] = {f"p{q}": float(np.percentile(calls, q)) for q in (50, 99)}
            row["http_s"] = result.facts.get("http_s", 0.0)
    if work.one_by_one and rows[0]["error"] is None:
        # The cost of HTTP is not the engine's: it is taken off before latencies are compared.
        mine = rows[0]["latency_s"]["p50"]
        for row in rows:
            if row["error"] is None:
                row["ours_is_times"] = (row["latency_s"]["p50"] - row["http_s"]) / mine
    return rows


def table(rows: Sequence[dict[str, Any]], one_by_one: bool) -> str:
    """The summary as aligned text; failures and chosen settings are lines below it."""
    head = ["engine", "tokens/s", "range", "texts/s", "ours is", "peak MiB", "min cos"]
    if one_by_one:
        head[1:4] = ["p50 ms", "p99 ms", "of it HTTP"]
    lines, remarks = [head], list[str]()
    for row in rows:
        if row["error"] is not None:
            lines.append([row["name"], *["-"] * 6])
            remarks.append(f"{row['name']}: no result: {row['error']}")
            continue
        if one_by_one:
            latency = row["latency_s"]
            cells = [1e3 * latency["p50"], 1e3 * latency["p99"], 1e3 * row["http_s"]]
            speed = [f"{cell:.2f}" for cell in cells]
        else:
            low, high = row["tokens_per_s_range"]
            speed = [
                f"{row['tokens_per_s']:,.0f}",
                f"{low:,.0f}-{high:,.0f}",
                f"{row['texts_per_s']:,.1f}",
            ]
        times = row["ours_is_times"]
        shown = "-" if times is None else f"{times:.2f}x"
        memory = f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append([row["name"], *speed, shown, memory, f"{row['min_cosine']:.4f}"])
        if row["settings"]:
            remarks.append(f"{row['name']}: {json.dumps(row['settings'])}")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*aligned, *remarks])


def compare(
    args: argparse.Namespace, header: Header, peak: float, work: Workload
) -> dict[str, Any]:
    """One workload, run and printed."""
    count = token_counter(args.model)
    lengths = [count(work.prompt + text) for text in work.texts]
    n_tokens = sum(lengths)
    weight_flops = machine.weight_flops_per_token(header)
    attention_flops = machine.attention_flops_per_token(header, lengths)
    ceiling = peak / (weight_flops + attention_flops)
    listed = entries(args, header, work, max(lengths))
    rows = speed_summary(race(args, listed, work, lengths), work, n_tokens)
    print(
        f"\n{work.name}: {len(lengths):,} texts, {n_tokens:,} tokens (mean {np.mean(lengths):.0f}, "
        f"longest {max(lengths):,}), {args.rounds} rounds, {args.threads} threads\n"
        f"ceiling of float32 arithmetic: {ceiling:,.0f} tokens/s "
        f"({weight_flops / 1e6:,.0f} + attention {attention_flops / 1e6:,.0f} MFLOP/token; "
        f"{peak / 1e9:,.0f} GFLOP/s by numpy)\n" + table(rows, work.one_by_one)
    )
    return {
        "workload": work.name,
        "sha256": work.sha256,
        "n_texts": len(lengths),
        "n_tokens": n_tokens,
        "max_tokens": max(lengths),
        "flops_per_token": {"weights": weight_flops, "attention": attention_flops},
        "ceiling_tokens_per_s": ceiling,
        "engines": rows,
    }


def token_counter(model: Path) -> Callable[[str], int]:
    """Counts tokens as the model's own tokenizer does, special tokens included; no weights."""
    vocabulary = Model(model, no_alloc=True)
    return lambda text: len(vocabulary.tokenize(text.encode()))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("model", type=Path, help="GGUF that all llama.cpp-based engines run")
    add("--workload", nargs="+", default=["mixed"], choices=workloads.NAMES)
    add("--n", type=int, default=200, help="texts per workload")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for each engine")
    add("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    add("--peer-model", type=Path, help="another GGUF for the peers, e.g. another quantization")
    add("--llama-server", default=shutil.which("llama-server"), help="binary; default: on PATH")
    add("--st-model", type=Path, help="directory for sentence-transformers: the same model")
    add("--onnx-model", type=Path, help="directory of to_onnx.py: the same model")
    add("--probe-tokens", type=int, default=4096, help="for choosing the peers' settings")
    add("--out", type=Path, help="file for the JSON, e.g. benchmarks/results/NAME.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    # Every engine inherits this, also one that would take all cores whatever it is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    header = read_header(args.model)
    count = token_counter(args.model)
    works = [workloads.make(name, args.n, count) for name in args.workload]
    peak = machine.gemm_flops_per_s()
    start = time.perf_counter()
    run: dict[str, Any] = {
        "model": {
            "file": args.model.name,
            "bytes": args.model.stat().st_size,
            "architecture": header.architecture,
            "quant": header.quant,
            "parameters": header.parameters,
        },
        "threads": args.threads,
        "rounds": args.rounds,
        "gemm_flops_per_s": peak,
        **machine.facts(args.llama_server),
    }
    print(f"{args.model.name} on {run['machine']['cpu_model']}, {args.threads} threads")
    if run["load_average"][0] > BUSY:
        print(f"load average {run['load_average'][0]:.1f}: other work is running, expect noise")
    try:
        run["workloads"] = [compare(args, header, peak, work) for work in works]
    except PeerError as error:
        raise SystemExit(f"{OURS}: {error}") from error
    run["wall_s"] = round(time.perf_counter() - start, 1)
    # Results are published: file names say enough, folders are nobody's business.
    for path in filter(None, (args.model, args.peer_model, args.st_model)):
        run = json.loads(json.dumps(run).replace(json.dumps(str(path)), json.dumps(path.name)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(run, indent=1) + "\n")
    print(json.dumps(run))


if __name__ == "__main__":
    main()
