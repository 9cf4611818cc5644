"""Which builds of llama.cpp were tested on this CPU. Loads nothing, and is read in a moment: the
child that tests is started before the rest of this package is read.
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

from gguf_embed.system import paths

# Of the children that try something: threads that wait for each other sleep, since they have little
# to compute, and on a busy machine to spin costs a hundred times that. ggml would start a debugger
# at an abort, which takes seconds.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}


def folder() -> Path:
    """Where the verdicts are kept, a file for each build, CPU and GPU."""
    return paths.home() / "selftest"


def any_tested() -> bool:
    """Whether any build was tested on this CPU."""
    return any(folder().glob(f"*-{cpu_id()}-cpu.json"))


@cache
def cpu_id() -> str:
    """A short hash of the CPU's model and feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        text = "\n".join(line for line in lines if line.startswith(("model name", "flags", "Feat")))
    except OSError:
        text = f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
