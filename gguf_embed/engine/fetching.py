"""What a fetch will mean, said in one line as soon as its speed is known.

fetching qwen3-embedding-8b Q8_0 (7,675 MiB), once: about 12 min at 11 MiB/s; 96,000 MiB of disk
free; then about 0.1 texts/s, in 8,912 MiB of RAM
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from gguf_embed.errors import duration
from gguf_embed.plan import speed
from gguf_embed.plan.plan import Plan
from gguf_embed.store.download import OnDownload
from gguf_embed.store.local import Places, Source, mib
from gguf_embed.system.files import free_bytes

FIRST_S: Final = 2.0  # of a transfer, which tell how fast it will be
SHORT_S: Final = 10.0  # and less is not told


def announced(
    source: Source,
    plan: Plan | None,
    at: Places,
    *,
    on_status: Callable[[str], None],
    on_download: OnDownload | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> OnDownload:
    """To be called while it is fetched: the line goes to `on_status`, then all to `on_download`.

    `plan`: how it will run, where that is known.
    """
    began: list[tuple[float, int]] = []
    said: list[str] = []

    def moved(here: int, total: int) -> None:
        if not began:
            began.append((clock(), here))
        at_s, first = began[0]
        lasted_s = clock() - at_s
        if not said and (lasted_s >= FIRST_S or here >= total):
            rate = (here - first) / lasted_s if lasted_s > 0 else 0.0
            said.append(in_one_line(source, plan, at, rate, total - here))
            on_status(said[0])
        if on_download is not None:
            on_download(here, total)

    return moved


def in_one_line(
    source: Source, plan: Plan | None, at: Places, bytes_per_s: float, left_bytes: int
) -> str:
    """Size, time, free disk, expected speed and memory, as far as they are known."""
    parts: list[str] = []
    left_s = left_bytes / bytes_per_s if bytes_per_s > 0 else 0.0
    if left_s > SHORT_S:
        parts.append(f"about {duration(left_s)} at {bytes_per_s / 2**20:,.1f} MiB/s")
    free = free_bytes(at.cache)
    if free is not None:
        parts.append(f"{mib(free)} of disk free")
    if plan is not None:
        where = "RAM" if plan.tier == "cpu" else f"the memory of {plan.chosen.where}"
        then = f"{mib(plan.chosen.needed_bytes)} of {where}"
        if plan.chosen.tokens_per_s is not None:
            then = f"about {speed.in_words(plan.chosen.tokens_per_s)}, in {then}"
        parts.append(f"then {then}")
    return f"fetching {source.label_with_size}, once: {'; '.join(parts)}"
