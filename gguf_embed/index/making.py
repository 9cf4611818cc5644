"""Make an index, update it, or embed it anew by another model while the old one serves.

wanted = Wanted(folders={Path("handbook"): "the staff handbook"})
report = make_index(place, embedder, wanted)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.index.facts import FORMAT, IndexFacts, Space
from gguf_embed.index.generations import (
    begin,
    generation_folder,
    only_writer,
    open_parts,
    read_facts,
    read_pointer,
    switch,
    tidied,
)
from gguf_embed.index.tables import Tables
from gguf_embed.index.update import Update, UpdateReport, choice_of
from gguf_embed.io.flow import Progress
from gguf_embed.system.files import printable

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.jobs.cache import VectorCache

_log = logging.getLogger(__name__)

CHUNK_TOKENS: Final = 256  # of a passage where nobody says
TIDY_ROWS: Final = 1024  # unused vectors that are worth the work of leaving them out


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user says of an index; None and empty leave it as it is."""

    folders: Mapping[Path, str | None] = field(default_factory=dict[Path, "str | None"])
    remove: Sequence[Path] = ()
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    gitignore: bool | None = None
    chunk_tokens: int | None = None
    overlap: int | None = None
    rebuild: bool = False


def facts_of_index(place: Path) -> IndexFacts | None:
    """What the index there is made of; None where there is none. Raises BadInput."""
    pointer = read_pointer(place)
    return None if pointer is None else read_facts(generation_folder(place, pointer.generation))


def make_index(
    place: Path,
    embedder: Embedder,
    wanted: Wanted,
    *,
    model: str,
    begun: Callable[[int], Progress] | None = None,
    cache: VectorCache | None = None,
) -> UpdateReport:
    """Bring the index at a place up to date, and make it where there is none.

    `model` is what opens the same model again, `cache` where else vectors may be known. A run that
    is killed leaves what it has finished, and the next one goes on. Raises BadInput for an index of
    another model unless it is to be made anew; OutputFailed, DoesNotFit, NativeFailed.
    """
    with only_writer(place):
        pointer = read_pointer(place)
        old = None if pointer is None else pointer.generation
        old_facts = None
        if old is not None:
            try:
                old_facts = read_facts(generation_folder(place, old))
            except BadInput:
                if not wanted.rebuild:
                    raise
        facts = facts_for(embedder, model, wanted, old_facts)
        if old_facts is not None and not wanted.rebuild:
            check_same(old_facts, facts, place)
            facts = old_facts
        if old is not None and not wanted.rebuild:
            return _updated(place, old, facts, embedder, wanted, begun, cache)
        generation = 1 if old is None else old + 1
        tables, vectors = begin(place, generation, facts)
        with tables:
            with tables.writing():
                if old is not None and old_facts is not None:
                    _take_over(tables, place, old, old_facts)
                _apply(tables, wanted)
            if old is None:
                switch(place, generation)  # it answers from its first batch on
            report = Update(
                tables=tables,
                vectors=vectors,
                facts=facts,
                embedder=embedder,
                begun=begun,
                cache=cache,
            ).run()
        if old is not None:
            switch(place, generation)
        return report


def _updated(
    place: Path,
    generation: int,
    facts: IndexFacts,
    embedder: Embedder,
    wanted: Wanted,
    begun: Callable[[int], Progress] | None,
    cache: VectorCache | None,
) -> UpdateReport:
    folder = generation_folder(place, generation)
    tables, vectors = open_parts(folder, facts, writable=True)
    with tables:
        with tables.writing():
            _apply(tables, wanted)
        report = Update(
            tables=tables,
            vectors=vectors,
            facts=facts,
            embedder=embedder,
            begun=begun,
            cache=cache,
        ).run()
        n_dead = tables.n_rows() - report.n_passages
        tidy = n_dead > TIDY_ROWS and 4 * n_dead > report.n_passages
        if tidy:
            generation = tidied(place, generation, facts, tables)
    if tidy:
        switch(place, generation)
    return report


def facts_for(
    embedder: Embedder, model: str, wanted: Wanted | None = None, old: IndexFacts | None = None
) -> IndexFacts:
    """What an index by this model would be made of. Raises BadOption."""
    from gguf_embed import __version__

    wanted = wanted or Wanted()
    prompt = embedder.prompt("document")
    space = embedder.fingerprint(prompt=prompt)
    known = old.chunk_tokens if old is not None else min(CHUNK_TOKENS, embedder.n_ctx)
    chunk_tokens = wanted.chunk_tokens or known
    if chunk_tokens > embedder.n_ctx:
        raise BadOption(
            f"--chunk-tokens {chunk_tokens}: {embedder.model_id} takes {embedder.n_ctx} tokens here"
        )
    overlap = wanted.overlap
    return IndexFacts(
        format=FORMAT,
        space=Space(
            model=model,
            model_id=embedder.model_id,
            quant=embedder.quant,
            fingerprint=space.id,
            sha256=space.sha256,
            pooling=space.pooling,
            prompt=prompt,
            dim=space.dim,
        ),
        chunk_tokens=chunk_tokens,
        overlap=(old.overlap if old is not None else 0) if overlap is None else overlap,
        made_by=__version__,
    )


def check_same(kept: IndexFacts, now: IndexFacts, place: Path) -> None:
    """Refuse to mix vector spaces, or passages of two sizes, in one index. Raises BadInput."""
    if kept.space.fingerprint != now.space.fingerprint:
        raise BadInput(
            f"{printable(place)} is made by {kept.space.shown}, and this is {now.space.shown}: "
            "their vectors cannot be compared; leave --model out, or embed it all anew with "
            "--rebuild, while the old index goes on to answer"
        )
    if (kept.chunk_tokens, kept.overlap) != (now.chunk_tokens, now.overlap):
        raise BadInput(
            f"{printable(place)} has passages of {kept.chunk_tokens} tokens with an overlap of "
            f"{kept.overlap}, not {now.chunk_tokens} and {now.overlap}; leave the options out, or "
            "make it anew with --rebuild"
        )


def _take_over(tables: Tables, place: Path, old: int, facts: IndexFacts) -> None:
    """The folders and patterns of the generation before."""
    try:
        before, _ = open_parts(generation_folder(place, old), facts, writable=False)
        with before:
            folders, selection = before.folders(), before.selection()
    except BadInput as error:  # damaged: the user names the folders again
        _log.warning("its folders are not known any more: %s", error)
        return
    for folder in folders:
        tables.set_folder(folder.path, folder.about)
    tables.set_selection(selection)


def _apply(tables: Tables, wanted: Wanted) -> None:
    """The user's words to the tables. Raises BadInput, BadOption."""
    known = {folder.path: folder for folder in tables.folders()}
    for path in wanted.remove:
        if path not in known:
            shown = ", ".join(printable(each) for each in known) or "none"
            raise BadInput(f"--remove {printable(path)}: not in this index; its folders: {shown}")
        tables.remove_folder(known.pop(path).id)
    for path, about in wanted.folders.items():
        for other in known:
            if other != path and (other in path.parents or path in other.parents):
                inner, outer = (path, other) if other in path.parents else (other, path)
                raise BadInput(
                    f"{printable(inner)} lies in {printable(outer)}: its files would be there "
                    "twice; leave one of them out"
                )
        tables.set_folder(path, about)
        known[path] = next(each for each in tables.folders() if each.path == path)
    if not known:
        raise BadInput("an index needs a folder; name one: gguf-embed index FOLDER -o NAME")
    kept = tables.selection()
    selection = replace(
        kept,
        include=kept.include if wanted.include is None else tuple(wanted.include),
        exclude=kept.exclude if wanted.exclude is None else tuple(wanted.exclude),
        gitignore=kept.gitignore if wanted.gitignore is None else wanted.gitignore,
    )
    choice_of(selection)  # what is no pattern is refused before it is kept
    if selection != kept or tables.fact("selection") is None:
        tables.set_selection(selection)
