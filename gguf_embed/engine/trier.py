"""The child process that tries the build and the file, started before this process is ready."""

from __future__ import annotations

from contextlib import suppress

from gguf_embed.machine.tested import ENVIRONMENT, any_tested
from gguf_embed.system.child import Worker


def trier() -> Worker:
    """What tries files, and before them the build: `prove` and the self-test can share one."""
    return Worker("gguf_embed.engine.trial", environment=ENVIRONMENT)


def started_trier() -> Worker:
    """The same; on a machine that is new it reads its modules from now on, while this process
    reads the rest of its own, and plans.
    """
    worker = trier()
    if not any_tested():
        with suppress(OSError):  # no process to be had: whoever needs it says so
            worker.start()
    return worker
