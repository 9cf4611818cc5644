"""Fetching a model that a client asks for: only where the server was started with --allow-pull."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeAlias

from gguf_embed.catalog import catalog
from gguf_embed.errors import ModelNotFound, shown
from gguf_embed.server.offers import plain
from gguf_embed.store import download, names
from gguf_embed.store.local import Source

# Fetches a file; gets a function to be called with (bytes here, bytes in all).
Fetch: TypeAlias = Callable[[Source, download.OnDownload], Path]


class Puller:
    """One pull at a time for each model; several may watch it."""

    def __init__(self, threads: Executor, fetch: Fetch | None = None) -> None:
        self._threads = threads
        self._fetch = fetch or _fetch

    async def pull(self, name: str) -> AsyncIterator[dict[str, object]]:
        """Steps as Ollama tells them, the last one left to the caller.

        Raises ModelNotFound for a name that is not in the catalog, and what fetching raises.
        """
        card = catalog.find(plain(name))
        if card is None:
            near = ", ".join(catalog.nearest(name)) or "see `gguf-embed models`"
            raise ModelNotFound(f"model {shown(name)} cannot be pulled; there is: {near}")
        yield {"status": "pulling manifest"}
        loop = asyncio.get_running_loop()
        source = await loop.run_in_executor(self._threads, lambda: names.resolve(card.id))
        moved: asyncio.Queue[tuple[int, int | None]] = asyncio.Queue()

        def on_download(done: int, total: int | None) -> None:
            loop.call_soon_threadsafe(moved.put_nowait, (done, total))

        digest = f"sha256:{source.sha256 or 'unknown'}"
        step = {"status": f"pulling {digest[7:19]}", "digest": digest}
        fetching = loop.run_in_executor(self._threads, lambda: self._fetch(source, on_download))
        last = -1
        while not fetching.done():
            news = asyncio.ensure_future(moved.get())
            await asyncio.wait({fetching, news}, return_when=asyncio.FIRST_COMPLETED)
            if not news.done():
                news.cancel()
                continue
            done, total = news.result()
            while not moved.empty():
                done, total = moved.get_nowait()
            if total and (share := 200 * done // total) != last:
                last = share
                yield {**step, "total": total, "completed": done}
        await fetching
        if source.n_bytes:
            yield {**step, "total": source.n_bytes, "completed": source.n_bytes}
        yield {"status": "verifying sha256 digest"}


def _fetch(source: Source, on_download: download.OnDownload) -> Path:
    return download.fetch(source, progress=on_download)
