"""The child process of the self-test: it decodes a tiny model of one weight type, stage by stage.

    {"stage": "plain", "result": "ok"} {"stage": "flash", "result": "ok"} ... {"done": true}

`selftest` starts it, explains its death and keeps what it says.
"""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguf_embed.errors import GgufEmbedError
from gguf_embed.gguf.quants import tolerance
from gguf_embed.machine.tiny_model import write_tiny_model
from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.model import Model
from gguf_embed.system import paths
from gguf_embed.system.child import DONE, take_job, tell
from gguf_embed.vectors import Pooling

GPU: Final = "gpu"  # a stage for machines that have one
OK: Final = "ok"
WRONG: Final = "wrong result"  # followed by the cosine

# Tests crash a stage on purpose: "repack:SIGILL".
FAULT_VARIABLE: Final = "GGUF_EMBED_SELFTEST_FAULT"


def refused(error: OSError) -> str:
    """What the operating system refused, with the next step."""
    reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    steps = {
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
        errno.EAGAIN: "raise the limit on processes (ulimit -u)",
        errno.ENOMEM: "free some memory",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
    }
    elsewhere = "make room, or set TMPDIR to a folder that can be written"
    return f"{reason}; {steps.get(error.errno or 0, elsewhere)}"


def answer(job: Mapping[str, Any]) -> None:
    """One job of the self-test; whoever calls this tells DONE after it.

    Tells the result of each stage as it ends, or why there can be none.
    """
    weight_type, stages = str(job["weight_type"]), job["stages"]
    try:
        try:
            _run_stages(weight_type, stages, None)
        except OSError as first:  # the usual place for temporary files is full or not ours
            try:
                paths.home().mkdir(parents=True, exist_ok=True)
                _run_stages(weight_type, stages, paths.home())
            except OSError:
                raise first from None
    except OSError as error:
        tell({"failure": refused(error)})
    except (GgufEmbedError, MemoryError) as error:
        tell({"failure": " ".join(str(error).split()) or "out of memory"})


def _run_stages(weight_type: str, stages: Sequence[str], folder: Path | None) -> None:
    fault = os.environ.get(FAULT_VARIABLE, "")
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made:
        path = Path(made) / "tiny.gguf"
        write_tiny_model(path, weight_type)
        # Two threads show what one does not: how work is split. The reference needs no other.
        reference = _vector(path, n_threads=1)
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
            right = cosine >= tolerance([weight_type])  # False for NaN as well
            tell({"stage": stage, "result": OK if right else f"{WRONG}, cosine {cosine:.4f}"})


def _vector(
    path: Path,
    *,
    flash: bool = False,
    repack: bool = False,
    n_gpu_layers: int = 0,
    n_threads: int = 2,
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A unit vector from 33 tokens: an odd number runs the tiled and the single-row kernels."""
    model = Model(path, repack=repack, n_gpu_layers=n_gpu_layers)
    params = ContextParams(
        n_ctx=256,
        n_ubatch=64,
        n_seq_max=1,
        n_threads=n_threads,
        pooling=Pooling.LAST,
        causal=True,
        flash_attn=flash,
    )
    with model, Context(model, params, encoder=False) as context:
        vector = context.run([np.arange(33, dtype=np.int32)])[0]
    return vector / np.linalg.norm(vector)


if __name__ == "__main__":
    while True:
        answer(take_job())
        tell(DONE)
