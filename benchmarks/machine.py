"""What a figure was measured on, and the ceiling that it is measured against."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from gguf_embed import __version__
from gguf_embed.gguf.header import Header
from gguf_embed.machine import probe as hardware
from gguf_embed.machine.machine import machine_to_json
from gguf_embed.native import library

PACKAGES = ("llama-cpp-python", "numpy", "sentence-transformers", "torch", "transformers")
GEMM_SIZE = 2048
# Best of ten float32 products, in a process without limits on BLAS threads.
_GEMM = f"""
import time, numpy
a = numpy.random.default_rng(0).standard_normal(({GEMM_SIZE}, {GEMM_SIZE}), dtype=numpy.float32)
times = []
for _ in range(10):
    start = time.perf_counter()
    a @ a
    times.append(time.perf_counter() - start)
print(2 * {GEMM_SIZE}**3 / min(times))
"""


def facts(llama_server: str | None) -> dict[str, Any]:
    """The machine, the versions, the builds; plain values for JSON."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": json.loads(machine_to_json(hardware.probe())),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "gguf_embed": __version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "llama_cpp": library.system_info().strip(),
        "llama_server": _server_version(llama_server) if llama_server else None,
    }


def gemm_flops_per_s() -> float:
    """float32 operations/s of numpy's matmul on the cores that this process may use."""
    limits = ("OPENBLAS_", "OMP_", "MKL_", "BLIS_", "VECLIB_")
    free = {name: value for name, value in os.environ.items() if not name.startswith(limits)}
    done = subprocess.run(
        [sys.executable, "-c", _GEMM], env=free, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def weight_flops_per_token(header: Header) -> int:
    """2 x the weights that every token is multiplied with: all matrices but the embedding tables.

    The tied language-model head of a causal model is such a table: an embedder needs none.
    """
    tables = {"token_embd.weight", "position_embd.weight", "token_types.weight"}
    matrices = (t for t in header.tensors if len(t.shape) == 2 and t.name not in tables)
    return 2 * sum(t.shape[0] * t.shape[1] for t in matrices)


def attention_flops_per_token(header: Header, lengths: Sequence[int]) -> float:
    """Mean over the tokens of texts of these lengths: scores and their weighted sum of values.

    A token of a causal model sees on average (n + 1) / 2 tokens, of an encoder all n.
    """
    seen = sum(n * (n + 1) / 2 if header.causal else n * n for n in lengths) / sum(lengths)
    return 4 * header.n_layer * header.n_head * header.key_length * seen


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _server_version(binary: str) -> str:
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return " ".join((done.stdout + done.stderr).split())
