"""The first decode of an unknown build happens in a child process.

A llama.cpp build can die on a CPU that it was not made for (SIGILL), or on one whose AMX tiles its
compiler configured wrongly (SIGSEGV); neither can be caught. So a child decodes a tiny model per
weight type: plain, with flash attention, with weight repacking, and on the GPU where a model is
to run there. What crashes there is not used, and the verdict is kept per build, CPU and GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from gguf_embed.errors import NativeFailed
from gguf_embed.native import library
from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.model import Model
from gguf_embed.native.quantizer import quantize_rows
from gguf_embed.system import paths
from gguf_embed.vectors import Pooling

_log = logging.getLogger(__name__)

Stage: TypeAlias = Literal["plain", "flash", "repack"]
STAGES: tuple[Stage, ...] = ("plain", "flash", "repack")
GPU = "gpu"  # a stage too, for machines that have one
TIMEOUT_S = 120
OK = "ok"
MIN_COSINE = 0.99  # between kernels for the same weights; a wrong kernel gives noise near 0

# Tests crash a stage on purpose: "repack:SIGILL".
FAULT_VARIABLE = "GGUF_EMBED_SELFTEST_FAULT"

REINSTALL = (
    'CMAKE_ARGS="-DCMAKE_CXX_FLAGS=-fno-tree-dse\\ -fno-dse\\ -fno-strict-aliasing" '
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What works for one weight type: per stage "ok" or what went wrong, e.g. "SIGILL"."""

    weight_type: str
    plain: str = "not run"
    flash: str = "not run"
    repack: str = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """What a model of several weight types may use on this machine."""

    flash: bool
    repack: bool
    remark: str | None  # one line for the user where something had to be given up
    gpu: bool = True


def check(weight_types: Sequence[str], *, gpus: Sequence[str] = ()) -> Working:
    """What is safe for these weight types; runs the child for those without a verdict yet.

    `gpus` describe the GPUs that are to hold layers; they are tested only where there are any.
    Raises NativeFailed where even the plain path crashes: the build is not for this CPU.
    """
    known = verdicts()
    missing = [t for t in dict.fromkeys(weight_types) if t not in known]
    if missing:
        known = {**known, **run(missing)}
    asked = [known[t] for t in weight_types]
    broken = next((v for v in asked if v.plain != OK), None)
    if broken is not None:
        raise NativeFailed(
            f"llama.cpp's self-test failed on this CPU ({broken.weight_type}: {broken.plain}); "
            'rebuild it for this machine: CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install '
            "--force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
        )
    lost = [
        f"{stage} ({v.weight_type}: {getattr(v, stage)})"
        for v in asked
        for stage in ("flash", "repack")
        if getattr(v, stage) != OK
    ]
    on_gpu = _check_gpu(weight_types, gpus) if gpus else {}
    lost += [f"{GPU} ({name}: {result})" for name, result in on_gpu.items() if result != OK]
    remark = (
        f"self-test: this llama.cpp build fails at {', '.join(lost)}; running without. "
        "`gguf-embed doctor` tells how to get the speed back"
        if lost
        else None
    )
    return Working(
        flash=all(v.flash == OK for v in asked),
        repack=all(v.repack == OK for v in asked),
        remark=remark,
        gpu=all(result == OK for result in on_gpu.values()),
    )


def _check_gpu(weight_types: Sequence[str], gpus: Sequence[str]) -> dict[str, str]:
    """The result of each weight type on these GPUs, kept like the verdicts."""
    path = _file(gpus)
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, TypeError):
        known = {str(name): str(result) for name, result in json.loads(path.read_text()).items()}
    missing = [name for name in dict.fromkeys(weight_types) if name not in known]
    for name in missing:
        results, failure = _child(name, (GPU,))
        known[name] = failure or results[GPU]
    if missing:
        _keep(path, known)
    return {name: known[name] for name in weight_types}


def verdicts() -> dict[str, Verdict]:
    """The kept verdicts of this build on this CPU, by weight type."""
    try:
        kept = json.loads(_file().read_text())
        return {name: Verdict(**fields) for name, fields in kept.items()}
    except (OSError, ValueError, TypeError):
        return {}


def run(weight_types: Sequence[str]) -> dict[str, Verdict]:
    """Test these weight types in child processes, keep and return their verdicts."""
    found = {name: _test(name) for name in weight_types}
    merged = {**verdicts(), **found}
    _keep(_file(), {name: _fields(verdict) for name, verdict in merged.items()})
    return found


def _keep(path: Path, found: Mapping[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(found, file)
        Path(file.name).replace(path)
    except OSError as error:
        _log.info("self-test verdict not kept: %s", error)


def _fields(verdict: Verdict) -> dict[str, str]:
    return {
        "weight_type": verdict.weight_type,
        **{stage: getattr(verdict, stage) for stage in STAGES},
    }


def _file(gpus: Sequence[str] = ()) -> Path:
    device = hashlib.sha256(", ".join(gpus).encode()).hexdigest()[:16] if gpus else "cpu"
    return paths.home() / "selftest" / f"{library.build_id()}-{cpu_id()}-{device}.json"


def cpu_id() -> str:
    """A short hash of the CPU's model and feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        text = "\n".join(line for line in lines if line.startswith(("model name", "flags", "Feat")))
    except OSError:
        text = f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _test(weight_type: str) -> Verdict:
    """Run the stages one after the other; each crash costs one child and one stage."""
    verdict = Verdict(weight_type=weight_type)
    todo = list(STAGES)
    while todo:
        results, failure = _child(weight_type, todo)
        verdict = replace(verdict, **results)
        todo = todo[len(results) :]
        if failure is not None and todo:
            verdict = replace(verdict, **{todo.pop(0): failure})
        if verdict.plain != OK:
            break
    return verdict


def _child(weight_type: str, stages: Sequence[str]) -> tuple[Mapping[str, str], str | None]:
    """Results of the stages that ended, in order, and how the child died, if it did."""
    command = [sys.executable, "-m", "gguf_embed.machine.selftest", weight_type, *stages]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        output, code, errors = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as timeout:
        raw: object = timeout.stdout  # bytes on POSIX, text on Windows, None if there was none
        output, code = raw.decode() if isinstance(raw, bytes) else str(raw or ""), None
        errors = f"no answer in {TIMEOUT_S} s"
    results = dict(line.split("\t", 1) for line in output.splitlines() if "\t" in line)
    if code == 0:
        return results, None
    if code is None:
        return results, errors
    if code < 0:
        return results, signal.Signals(-code).name
    return results, (errors.strip().splitlines() or [f"exit code {code}"])[-1]


def _main(weight_type: str, stages: Sequence[str]) -> None:
    """The child: one line "stage<TAB>result" as each stage ends."""
    fault = os.environ.get(FAULT_VARIABLE, "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_tiny_model(path, weight_type)
        reference = _vector(path)
        for stage in stages:
            stage_fault, _, name = fault.partition(":")
            if stage == stage_fault:
                os.kill(os.getpid(), signal.Signals[name])
            vector = _vector(
                path,
                # As it will run on a GPU: flash attention falls back by itself where it cannot be.
                flash=stage in ("flash", GPU),
                repack=stage == "repack",
                n_gpu_layers=-1 if stage == GPU else 0,
            )
            cosine = float(vector @ reference)
            result = OK if cosine > MIN_COSINE else f"wrong result, cosine {cosine:.4f}"
            print(f"{stage}\t{result}", flush=True)


def _vector(
    path: Path, *, flash: bool = False, repack: bool = False, n_gpu_layers: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A unit vector from 33 tokens: an odd number runs the tiled and the single-row kernels."""
    model = Model(path, repack=repack, n_gpu_layers=n_gpu_layers)
    params = ContextParams(
        n_ctx=256,
        n_ubatch=64,
        n_seq_max=1,
        n_threads=2,
        pooling=Pooling.LAST,
        causal=True,
        flash_attn=flash,
    )
    with Context(model, params, encoder=False) as context:
        vector = context.run([np.arange(33, dtype=np.int32)])[0]
    model.close()
    return vector / np.linalg.norm(vector)


# A model that exercises the matrix kernels of one weight type: one llama layer, no tokenizer.
_ROW, _VOCAB = 256, 64  # 256 is the block length of K-quants
_SHAPES = {
    "token_embd.weight": (_VOCAB, _ROW),
    "output_norm.weight": (_ROW,),
    "blk.0.attn_norm.weight": (_ROW,),
    "blk.0.attn_q.weight": (_ROW, _ROW),
    "blk.0.attn_k.weight": (_ROW, _ROW),
    "blk.0.attn_v.weight": (_ROW, _ROW),
    "blk.0.attn_output.weight": (_ROW, _ROW),
    "blk.0.ffn_norm.weight": (_ROW,),
    "blk.0.ffn_gate.weight": (_ROW, _ROW),
    "blk.0.ffn_up.weight": (_ROW, _ROW),
    "blk.0.ffn_down.weight": (_ROW, _ROW),
}
_METADATA: dict[str, int | float | str] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": _ROW,
    "llama.feed_forward_length": _ROW,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.vocab_size": _VOCAB,
    "tokenizer.ggml.model": "no_vocab",
}
_ALIGNMENT = 32


def write_tiny_model(path: Path, weight_type: str) -> None:
    """Write a random model whose matrices are of `weight_type`, a few hundred KB."""
    rng = np.random.default_rng(0)
    infos, data = b"", b""
    for name, shape in _SHAPES.items():
        if len(shape) == 1:
            kind, raw = 0, np.ones(shape, np.float32).tobytes()
        else:
            values = rng.normal(0, _ROW**-0.5, shape).astype(np.float32)
            kind, raw = quantize_rows(values, weight_type)
        infos += _string(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % _ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(_SHAPES), len(_METADATA))
    for key, value in _METADATA.items():
        head += _string(key)
        match value:
            case str():
                head += struct.pack("<I", 8) + _string(value)
            case float():
                head += struct.pack("<If", 6, value)
            case int():
                head += struct.pack("<II", 4, value)
    head += infos
    path.write_bytes(head + b"\0" * (-len(head) % _ALIGNMENT) + data)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
