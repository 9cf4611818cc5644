"""A server of fakes with little patience, for tests: `python serve_child.py [SOCKET | CERT KEY]`.

A text "wait N" takes N seconds; its address is the first line of standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from gguf_embed.engine.backend import BatchLimits, Outcome
from gguf_embed.native.model import Tokens
from gguf_embed.server import logs
from gguf_embed.server.limits import Limits
from gguf_embed.server.offers import Offer
from gguf_embed.server.run import ServeOptions, serve
from gguf_embed.testing import FakeBackend, FakeEmbedder

WAIT = crc32(b"wait") & 0x7FFFFFFF
SECONDS = {crc32(str(n).encode()) & 0x7FFFFFFF: n / 10 for n in range(1000)}


class Waiting(FakeBackend):
    """Takes as long as a text says, in tenths of a second."""

    def run(self, sequences: Sequence[Tokens], **how: Any) -> Outcome:
        for ids in sequences:
            if len(ids) == 4 and ids[1] == WAIT:
                time.sleep(SECONDS[int(ids[2])])
        return super().run(sequences, **how)


def main() -> None:
    logs.set_up(json_lines=True, requests=True)
    files = [*map(Path, sys.argv[1:])]
    options = ServeOptions(
        offers=(Offer(id="fake", names=frozenset({"fake"}), model="fake"),),
        only_these=True,
        port=0,
        unix_socket=files[0] if len(files) == 1 else None,
        tls_cert=files[0] if len(files) == 2 else None,
        tls_key=files[1] if len(files) == 2 else None,
        limits=Limits(read_s=0.5, write_s=0.5, max_body_bytes=100_000),
        preload=True,
    )
    few = BatchLimits(max_tokens=16, max_seqs=2)
    serve(
        options,
        lambda address: print(address, flush=True),
        open_model=lambda offer, left: FakeEmbedder.open(backend=Waiting(dim=1024, limits=few)),
    )


if __name__ == "__main__":
    main()
