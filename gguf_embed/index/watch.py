"""Changes in folders, as they come; needs the extra `watch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf_embed.errors import BadOption


def changed(folders: Sequence[Path], *, place: Path) -> Iterator[None]:
    """Comes back each time after files have changed and things were quiet for half a second.

    What is written into the index, at `place`, does not count.
    """
    try:
        from watchfiles import watch
    except ImportError as error:
        raise BadOption(
            "--watch needs watchfiles: pip install 'gguf-embed[watch]', or run the command again "
            "by a timer of yours"
        ) from error
    there = [folder for folder in folders if folder.exists()]

    def counts(change: object, path: str) -> bool:
        return place not in Path(path).parents

    for _ in watch(*there, watch_filter=counts, debounce=2_000, step=500, raise_interrupt=True):
        yield None
