"""Files that are compressed, as what is in them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, cast

from gguf_embed.errors import BadInput
from gguf_embed.io.extras import import_pyarrow
from gguf_embed.io.sources import TextSource


@contextmanager
def unpacked(stream: IO[bytes], source: TextSource) -> Generator[IO[bytes]]:
    """The bytes that a source holds, whatever it is packed with. Raises BadInput."""
    if source.packing is None:
        yield stream
        return
    try:
        if source.packing == ".gz":
            with gzip.open(stream) as inner:
                yield cast("IO[bytes]", inner)
        else:
            with _zstd(stream, source.name) as inner:
                yield inner
    except (EOFError, zlib.error) as error:
        raise BadInput(f"{source.name}: damaged or cut off: {error}; copy it again") from error


@contextmanager
def _zstd(stream: IO[bytes], name: str) -> Generator[IO[bytes]]:
    pyarrow = import_pyarrow(name)
    with pyarrow.CompressedInputStream(stream, "zstd") as inner:
        yield cast("IO[bytes]", io.BufferedReader(inner))
