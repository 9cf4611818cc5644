"""The proof of a model file: before this process loads it, a child has.

A file can pass every check of its header and still make llama.cpp abort, or give vectors that mean
nothing. So the first time that this machine meets a file, a child process loads it as it will run,
tokenizes hard texts and decodes. Its verdict is kept for the file as it lies there, for the build
of llama.cpp, the CPU, the GPUs that hold layers and the way it runs. `engine/trial.py` is what the
child does.

The self-test asks another question, and comes first: which kernels of this build work on this CPU?
It needs a tiny model only, and answers for flash attention, weight repacking and GPUs one by one,
so that a model can run without the broken one. The proof runs the file with what is left.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf_embed.engine.trier import trier
from gguf_embed.errors import BadModelFile, GgufEmbedError, NativeFailed, OutputFailed
from gguf_embed.machine.tested import cpu_id
from gguf_embed.native.library import build_id
from gguf_embed.system import paths
from gguf_embed.system.child import Ending, Worker
from gguf_embed.system.files import printable, write_whole
from gguf_embed.vectors import Pooling

_log = logging.getLogger(__name__)

VERSION = 3  # of what is tried; a new one proves every file again
TIMEOUT_S = 120.0
SLOWEST_BYTES_PER_S = 10e6  # a disk on which a file takes longer than TIMEOUT_S
SAID_BEFORE_BYTES = 1 << 30  # a file that takes a while is named before, not only after
_HEAD_BYTES = 1 << 18
_SMALL_BYTES = 1 << 23

# What the child was at when it ended, as a message says it.
_STAGES = {
    "start": "starts",
    "load": "loads it",
    "tokenize": "tokenizes with it",
    "decode": "computes vectors with it",
    "tap": "reads its last layer",
    "accelerator": "computes with the accelerator",
}
WITH_ACCELERATOR = "accelerator"  # the last stage: the file itself is proved by then


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofSettings:
    """How a file will run here."""

    pooling: Pooling
    causal: bool
    encoder: bool
    n_ctx: int
    n_threads: int
    first_token: int | None = None
    end_token: int | None = None
    n_gpu_layers: int = 0
    gpus: tuple[str, ...] = ()  # what those that hold layers are
    repack: bool = True
    flash_attn: bool = True
    tap: bool = True
    accelerator: bool = False  # try it as well


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What is wrong, "" for nothing: with the file, and with the accelerator beside it."""

    file: str
    accelerator: str = ""
    proven: bool = True  # not where the child was killed or too slow


def prove(
    path: Path,
    settings: ProofSettings,
    *,
    on_status: Callable[[str], None] | None = None,
    on_safe: Callable[[], None] | None = None,
    worker: Worker | None = None,
) -> str:
    """Return where the file is safe to load here; the first time a child process tries it.

    `worker` is a `trier` where the caller has one. `on_safe` is called once the file is proved,
    while the child goes on with the accelerator. Returns why it is not to run with the
    accelerator, "" where it may or that was not asked. Raises BadModelFile where llama.cpp dies of
    it or its vectors mean nothing, which is kept, and NativeFailed where the child was killed or
    too slow, which is not.
    """
    identity = _identity(path)
    kept = paths.home() / "proof" / f"{_key(identity, settings)}.json"
    verdict = _read(kept, identity)
    if verdict is None:
        with ExitStack() as held:
            used = worker or held.enter_context(trier())
            verdict = _try(path, settings, identity["n_bytes"], on_status, on_safe, used)
        if verdict.proven and _identity(path) == identity:
            _keep(kept, identity, verdict)
    if verdict.file:
        raise BadModelFile(f"{printable(path)}: {verdict.file}")
    return verdict.accelerator


def _try(
    path: Path,
    settings: ProofSettings,
    n_bytes: int,
    on_status: Callable[[str], None] | None,
    on_safe: Callable[[], None] | None,
    worker: Worker,
) -> _Verdict:
    """What is wrong with the file, and with the accelerator beside it."""
    if on_status is not None and n_bytes > SAID_BEFORE_BYTES:
        on_status(f"proving {printable(Path(path.name))} in a child process, once")
    started = time.monotonic()
    job = {"path": os.fsdecode(path), **asdict(settings), "pooling": int(settings.pooling)}
    stage, verdict, accelerator = "start", None, None
    error, message = None, ""
    timeout_s = TIMEOUT_S + n_bytes / SLOWEST_BYTES_PER_S
    for answer in worker.answers(job, timeout_s=timeout_s):
        stage = str(answer.get("stage", stage))
        verdict = answer.get("verdict", verdict)
        accelerator = answer.get("accelerator", accelerator)
        error = answer.get("error", error)
        message = str(answer.get("message", message))
        if answer.get("stage") == WITH_ACCELERATOR and verdict == "" and on_safe is not None:
            on_safe()
    if error:
        raise _raised(error, message)
    ending = worker.ending
    proven = True
    if verdict == "" and stage == WITH_ACCELERATOR and accelerator is None:
        accelerator = f"the process that tried it ended: {ending.reason or 'no vectors'}"
        proven = ending.crashed
    elif verdict is None or not ending.ok:
        verdict = _verdict_of(path, stage, ending)
    if on_status is not None:
        taken_s = time.monotonic() - started
        on_status(f"proved {printable(Path(path.name))} in a child process, once: {taken_s:.1f} s")
    return _Verdict(file=str(verdict), accelerator=str(accelerator or ""), proven=proven)


def _verdict_of(path: Path, stage: str, ending: Ending) -> str:
    """Of a child that ended without one: the file's fault where its native code crashed.

    Raises NativeFailed for any other end.
    """
    doing = _STAGES.get(stage, stage)
    if ending.crashed and stage != "start":
        return (
            f"llama.cpp dies when it {doing} ({ending.reason}); the file is damaged or made for "
            "another version: fetch it again or convert it anew"
        )
    raise NativeFailed(
        f"{printable(path)}: not proved safe to load: the child process that tries it ended as it "
        f"{doing}: {ending.reason or 'no verdict'}; see that memory and disk are free, then try "
        "again"
    )


def _raised(name: object, message: str) -> GgufEmbedError:
    """An error of our own that the child met; it is not kept."""
    return BadModelFile(message) if name == "BadModelFile" else NativeFailed(message)


def _identity(path: Path) -> dict[str, Any]:
    """What makes a file another one, however it is called.

    A small one is its bytes, wherever they lie. To read a large one takes longer than to prove it.
    """
    try:
        stat = path.stat()
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            if stat.st_size <= _SMALL_BYTES:
                whole = hashlib.sha256(head + file.read())
                return {"n_bytes": stat.st_size, "sha256": whole.hexdigest()}
    except OSError as error:
        raise BadModelFile(f"{printable(path)}: {error.strerror or error}") from error
    return {
        "n_bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
        "head": hashlib.sha256(head).hexdigest(),
    }


def _key(identity: Mapping[str, Any], settings: ProofSettings) -> str:
    """One name per file, build, CPU, GPUs in use and way to run."""
    way = {**asdict(settings), "n_gpu_layers": settings.n_gpu_layers != 0}
    del way["n_ctx"], way["n_threads"]  # sizes, not ways
    whole = (VERSION, dict(identity), build_id(), cpu_id(), way)
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def _read(kept: Path, identity: Mapping[str, Any]) -> _Verdict | None:
    """The kept verdict; None where there is none that can be read as one."""
    with suppress(OSError, ValueError, RecursionError):
        read: object = json.loads(kept.read_text("utf-8"))
        if isinstance(read, dict):
            verdict: object = read.get("verdict")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            accelerator: object = read.get("accelerator", "")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            of: object = read.get("of")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            if isinstance(verdict, str) and isinstance(accelerator, str) and of == identity:
                return _Verdict(file=verdict, accelerator=accelerator)
    return None


def _keep(kept: Path, identity: Mapping[str, Any], verdict: _Verdict) -> None:
    try:
        said = {"verdict": verdict.file, "accelerator": verdict.accelerator, "of": identity}
        text = json.dumps(said, indent=1)
        write_whole(kept, text + "\n", make_folder=True)
    except OutputFailed as error:
        _log.info("the proof is not kept: %s", error)
