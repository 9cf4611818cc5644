"""One turn of one level, in a child: what it is, how fast it is, or its vectors.

answer = turn({"do": "speed", "path": ..., "card": ..., "settings": {...}, ...}, say)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gguf_embed.catalog import catalog
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import open_file, prove_file
from gguf_embed.engine.tune import SHORT_S, tune
from gguf_embed.engine.tune_record import read_record
from gguf_embed.errors import GgufEmbedError
from gguf_embed.gguf.layout import shape_of
from gguf_embed.machine.measured import shape_key
from gguf_embed.native import library
from gguf_embed.plan.settings import Settings
from gguf_embed.system.child import Child, take_job, tell
from gguf_embed.vectors import Pooling, Vectors

MAX_LATENCIES_S = 4.0  # single texts take no longer, once there are MIN_LATENCIES of them
MIN_LATENCIES = 8
WARM_UP_TEXTS = 8  # at most, and a quarter of what is timed
TRIAL_TEXTS = (2, 8, 32, 128)  # embedded for a rough speed, until one time is long enough
TRIAL_S = 0.5


class TurnFailed(Exception):
    """A child could not do its job; the message is the reason."""


def turn(
    job: Mapping[str, Any], say: Callable[[str], None], *, module: str = "gguf_embed.lab.worker"
) -> dict[str, Any]:
    """A child's answer to one job; raises TurnFailed with its reason."""
    answer: dict[str, Any] | None = None
    with Child(module, job) as child:
        for said in child.answers():
            if "status" in said:
                say(said["status"])
            elif "failure" in said:
                raise TurnFailed(said["failure"])
            else:
                answer = said
        ending = child.ending
    if answer is not None and ending.ok:
        return answer
    if ending.signal:
        raise TurnFailed(f"its process died of {ending.reason}")
    raise TurnFailed(ending.reason or "its process ended without an answer")


def work(job: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """In the child: the answer to a job, or what is wrong with the level."""
    try:
        return _JOBS[job["do"]](job, say)
    except GgufEmbedError as error:
        return {"failure": " ".join(str(error).split())}


def _open(job: Mapping[str, Any], say: Callable[[str], None], *, tuned: bool = False) -> Embedder:
    """The level; with `tuned` its best settings are searched for before, unless they are known."""
    path = Path(job["path"])
    given = dict(job["settings"])
    if "pooling" in given:
        given["pooling"] = Pooling(given["pooling"])
    settings = Settings(**given)
    card = catalog.find(job["card"]) if job["card"] else None
    if tuned and settings.tune and not settings.decide_speed:
        target = prove_file(path, card, settings, on_status=say).target
        if read_record(target) is None:
            say(f"measuring the best settings of {path.name}, about {SHORT_S:.0f} s, once")
            tune(target, budget_s=SHORT_S)
    return Embedder(open_file(path, card, settings, on_status=say))


def _do_open(job: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What the model is, how it was tuned, and a rough speed."""
    with _open(job, say, tuned=True) as embedder:
        texts: list[str] = job["passages"]
        prompt = embedder.prompt("document")
        rough = 0.0
        for n_texts in TRIAL_TEXTS:
            began = time.perf_counter()
            embedder.encode(texts[:n_texts], prompt=prompt, truncate="end", progress=False)
            seconds = time.perf_counter() - began
            rough = len(texts[:n_texts]) / seconds
            if seconds > TRIAL_S:
                break
        tuned = read_record(embedder.target)
        return {
            "dim": embedder.dim,
            "shape": shape_key(
                shape_of(embedder.header), embedder.pooling, causal=embedder.mode.causal
            ),
            "texts_per_s": rough,
            "settings": asdict(tuned.settings) if tuned else None,
        }


def _do_speed(job: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to load, to embed the passages, and each single query."""
    python_bytes = peak_bytes()
    gpu_before = _gpu_free_bytes()
    began = time.perf_counter()
    with _open(job, say) as embedder:
        load_s = time.perf_counter() - began
        texts: list[str] = job["passages"]
        prompt = embedder.prompt("document")
        n_first = max(1, min(WARM_UP_TEXTS, len(texts) // 4))
        embedder.encode(texts[:n_first], prompt=prompt, truncate="end", progress=False)
        began = time.perf_counter()
        blocks = list(embedder.stream(texts, prompt=prompt, truncate="end"))
        seconds = time.perf_counter() - began
        latencies: list[float] = []
        for text in job["queries"]:
            if len(latencies) >= MIN_LATENCIES and sum(latencies) > MAX_LATENCIES_S:
                break
            began = time.perf_counter()
            embedder.encode_query(text, truncate="end")
            latencies.append(time.perf_counter() - began)
        gpu_after = _gpu_free_bytes()
        return {
            "load_s": load_s,
            "seconds": seconds,
            "n_texts": len(texts),
            "n_tokens": int(sum(block.token_counts.sum() for block in blocks)),
            "n_gpu_layers": embedder.run_settings.n_gpu_layers,
            "latencies": latencies[1:] or latencies,  # the first one warms up
            "python_bytes": python_bytes,
            "peak_bytes": peak_bytes(),
            "gpu_bytes": None if gpu_before is None else max(0, gpu_before - (gpu_after or 0)),
        }


def _do_vectors(job: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Unit vectors of all texts, as arrays in the file `target`."""
    with _open(job, say) as embedder:
        arrays: dict[str, Vectors] = {}
        n_truncated = 0
        for name, prompt_name in (
            ("passages", "document"),
            ("queries", "query"),
            ("parallel", "document"),
        ):
            blocks = list(
                embedder.stream(job[name], prompt=embedder.prompt(prompt_name), truncate="end")
            )
            arrays[name] = np.concatenate(
                [np.empty((0, embedder.dim), np.float32), *(block.vectors for block in blocks)]
            )
            n_truncated += int(sum(block.truncated.sum() for block in blocks))
        np.savez(job["target"], **arrays)  # pyright: ignore[reportArgumentType]
        return {"n_truncated": n_truncated}


_JOBS: Mapping[str, Callable[[Mapping[str, Any], Callable[[str], None]], dict[str, Any]]] = {
    "open": _do_open,
    "speed": _do_speed,
    "vectors": _do_vectors,
}


def peak_bytes() -> int:
    """The most RAM that this process has held so far."""
    try:
        # Not getrusage here: Linux carries the parent's peak over into a child.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu_free_bytes() -> int | None:
    """Free memory of all GPUs together; None without any."""
    free = [d.free_bytes for d in library.devices() if d.kind in ("gpu", "igpu")]
    return sum(free) if free else None


if __name__ == "__main__":
    tell(work(take_job(), lambda line: tell({"status": line})))
