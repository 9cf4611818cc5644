"""What a call of `embed` is to do: its texts, their rows, and the model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from gguf_embed.cli import chunking, console, manners, options

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.io.record import OnBadRow, Reading, Record
    from gguf_embed.io.sources import TextSources
    from gguf_embed.io.write import RowContent
    from gguf_embed.plan.settings import RunSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Texts, and what their rows hold."""

    sources: TextSources
    reading: Reading
    content: RowContent
    chunks: bool
    total_bytes: int | None  # to read; None: nobody knows before the end

    def records(self, args: argparse.Namespace, on_bad_row: OnBadRow | None) -> Iterator[Record]:
        """All texts; a row that cannot be read goes to `on_bad_row`, or is an error."""
        from gguf_embed.io.read import given, read

        stdin = console.stdin()
        return chain(
            given(args.text),
            read(self.sources, self.reading, stdin=stdin, on_bad_row=on_bad_row),
        )


def find_task(args: argparse.Namespace, *, chunks: bool) -> Task:
    """The task of the arguments. Raises BadInput, BadOption."""
    from gguf_embed.io.read import check_keep
    from gguf_embed.io.record import Reading
    from gguf_embed.io.write import RowContent

    sources = options.find(args.inputs, args, quiet=args.quiet)
    reading = Reading(
        field=args.field,
        id_field=args.id_field,
        whole_file=args.whole_file or chunks,
        keep=() if args.keep == "all" else tuple(filter(None, (args.keep or "").split(","))),
        keep_all=args.keep == "all",
    )
    check_keep(sources, reading)
    return Task(
        sources=sources,
        reading=reading,
        content=RowContent(text=args.with_text, fields=bool(args.keep)),
        chunks=chunks,
        total_bytes=None if args.text else sources.total_bytes,
    )


def opened_model(
    args: argparse.Namespace, *, isolated: bool, before: RunSettings | None = None
) -> AbstractContextManager[Embedder]:
    """The model here, as it ran `before` if it can, or the one that is served elsewhere."""

    def open_it() -> Embedder:
        if args.server is not None:
            from gguf_embed.engine.embedder import Embedder

            return Embedder.connect(args.server, args.model)
        model: str = args.model or options.default_model()
        settings = options.settings(args)
        if before is not None and not settings.decide_speed:
            settings = replace(settings, run=before)
        return options.open_embedder(model, settings, quiet=args.quiet, isolated=isolated)

    return manners.opened(args, open_it)


def prompt_of(embedder: Embedder, args: argparse.Namespace) -> str:
    """What stands in front of each text."""
    if args.prompt_name is None:
        return args.prompt or ""
    return embedder.prompt(args.prompt_name)


def chunked(
    embedder: Embedder, records: Iterator[Record], prompt: str, args: argparse.Namespace
) -> Iterator[Record]:
    """The chunks of all records."""
    return (part for record in records for part in chunking.parts(embedder, record, prompt, args))
