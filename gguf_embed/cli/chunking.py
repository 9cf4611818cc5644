"""The chunks of `gguf-embed embed`: options, and vectors of chunks within their document."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.errors import BadInput, BadOption, BadText
from gguf_embed.io.flow import Progress, place

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.io.record import Record
    from gguf_embed.io.write import Writer

CHUNK_TOKENS = 256  # of --late-chunking where nobody says


def add_options(parser: argparse.ArgumentParser) -> None:
    """--chunk-tokens, --overlap, --late-chunking."""
    group = parser.add_argument_group("chunks")
    group.add_argument(
        "--chunk-tokens",
        type=options.positive,
        metavar="N",
        help="split files, rows and texts into chunks of at most N tokens of the model, special "
        "tokens and prompt included, at headings, paragraphs, lines, sentences, words",
    )
    group.add_argument(
        "--overlap",
        type=options.positive,
        metavar="N",
        help="begin a chunk with up to N tokens of the one before (default: none)",
    )
    group.add_argument(
        "--late-chunking",
        action="store_true",
        help="compute a document whole and make a chunk's vector of its tokens there, so that it "
        f"knows what is around it (chunks of {CHUNK_TOKENS} tokens unless --chunk-tokens says "
        "otherwise)",
    )


def wanted(args: argparse.Namespace) -> bool:
    """Whether there are to be chunks. Raises BadOption where other options contradict that."""
    chunks: bool = args.late_chunking or args.chunk_tokens is not None
    if args.overlap and not chunks:
        raise BadOption("--overlap is for chunks; say how long they are with --chunk-tokens")
    if chunks and args.truncate != "error":
        raise BadOption("--truncate: a chunk is never longer than the model takes; leave it out")
    if chunks and args.whole_file:
        raise BadOption("--whole-file makes one text of a file, --chunk-tokens several; choose one")
    return chunks


def about(embedder: Embedder, args: argparse.Namespace) -> dict[str, object]:
    """What the chunks are, for the description of the vectors."""
    return {
        "chunk_tokens": _max_tokens(embedder, args),
        "overlap": args.overlap or 0,
        "late_chunking": args.late_chunking,
    }


def parts(
    embedder: Embedder, record: Record, prompt: str, args: argparse.Namespace
) -> Iterator[Record]:
    """The chunks of a record. Raises BadOption, BadInput."""
    from gguf_embed.io.parts import parts_of

    max_tokens = _max_tokens(embedder, args)
    if max_tokens > embedder.n_ctx:
        raise BadOption(
            f"--chunk-tokens {max_tokens}: {embedder.model_id} takes {embedder.n_ctx} tokens here"
        )
    try:
        yield from parts_of(
            record,
            count_tokens=lambda texts: embedder.count_tokens([prompt + each for each in texts]),
            max_tokens=max_tokens,
            overlap=args.overlap or 0,
            of_row=record.source == "-" and args.field is not None,
        )
    except BadText as error:
        raise BadInput(f"{place(record)}: {error}") from error


def _max_tokens(embedder: Embedder, args: argparse.Namespace) -> int:
    return args.chunk_tokens or min(CHUNK_TOKENS, embedder.n_ctx)


@dataclass(frozen=True, slots=True, kw_only=True)
class LateDone:
    """What came of all documents."""

    n_tokens: int  # of the chunks
    n_windows: int  # documents that were longer than the model takes
    n_failed: int  # chunks


def embed_late(
    embedder: Embedder,
    records: Iterator[Record],
    writer: Writer,
    prompt: str,
    args: argparse.Namespace,
    *,
    progress: Progress,
    on_error: str,
) -> LateDone:
    """A row for each chunk of each document, its vector made within the document."""
    import numpy as np

    choices: dict[str, Any] = {
        "prompt": prompt,
        "dimensions": args.dimensions,
        "normalize": not args.no_normalize,
        "on_error": on_error,
    }
    n_tokens = n_windows = n_failed = read_bytes = 0
    for record in records:
        rows = list(parts(embedder, record, prompt, args))
        spans = [(row.part.start, row.part.end) for row in rows if row.part is not None]
        n_own = sum(row.part.n_tokens for row in rows if row.part is not None)
        if rows:
            vectors = embedder.encode_chunks(record.text, spans, windows=True, **choices)
            writer.write(rows, vectors, [False] * len(rows))
            failed = int(np.isnan(vectors).any(axis=1).sum())
            if failed:
                console.say(f"{place(record)}: {failed} of {len(rows)} chunks have no vector")
            n_failed += failed
            n_tokens += n_own
            if n_own > embedder.n_ctx:  # else it surely fits
                n_windows += int(embedder.count_tokens([prompt + record.text])[0]) > embedder.n_ctx
        progress.advance(len(rows), n_own, record.read_bytes - read_bytes)
        read_bytes = record.read_bytes
    if n_windows:
        console.say(
            f"{console.counted(n_windows, 'document')} longer than the {embedder.n_ctx} tokens of "
            f"{embedder.model_id}: computed in parts of as many chunks as fit"
        )
    return LateDone(n_tokens=n_tokens, n_windows=n_windows, n_failed=n_failed)
