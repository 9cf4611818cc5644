"""`gguf-embed index list`: which indexes there are, and how one stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gguf_embed.cli import console
from gguf_embed.cli.hits import near
from gguf_embed.errors import BadInput, counted

if TYPE_CHECKING:
    from gguf_embed.index.facts import IndexStatus


def print_indexes(names: list[str], *, as_json: bool) -> int:
    """All of them as a table, or some in full; returns 0. Raises BadInput for one that is not."""
    from gguf_embed.index.index import Index
    from gguf_embed.index.places import indexes_home, named_indexes

    found: dict[str, IndexStatus] = {}
    for name in names or named_indexes():
        try:
            with Index.open(name) as index:
                found[name] = index.status()
        except BadInput as error:
            if names:
                raise
            console.say(f"{name}: {error}")
    if as_json:
        rows = [{"name": name, **as_dict(status)} for name, status in found.items()]
        console.print_json("index-list", {"indexes": rows})
        return 0
    if not found:
        console.say(f"no index in {indexes_home()}; make one: gguf-embed index FOLDER -o NAME")
    elif names:
        for name, status in found.items():
            _print_status(name, status)
    else:
        columns = ("name", "model", "files", "passages", "MiB", "updated", "folders")
        console.print_table(columns, [_row(name, status) for name, status in found.items()])
    return 0


def _row(name: str, status: IndexStatus) -> tuple[str, ...]:
    return (
        name,
        f"{status.facts.space.model_id} {status.facts.space.quant}",
        f"{status.n_files:,}",
        f"{status.n_passages:,}",
        f"{status.n_bytes / 2**20:,.1f}",
        status.updated_at.partition("+")[0].replace("T", " ") or "not finished",
        ", ".join(near(folder.path) for folder in status.folders),
    )


def _print_status(name: str, status: IndexStatus) -> None:
    rows = [
        ("index", f"{name}, {near(status.place)}"),
        ("model", status.facts.space.shown),
        ("passages", f"{status.n_passages:,} of at most {status.facts.chunk_tokens} tokens"),
        ("files", f"{status.n_files:,}"),
        ("size", f"{status.n_bytes / 2**20:,.1f} MiB"),
        ("updated", status.updated_at or "not finished"),
        ("metadata", ", ".join(status.metadata_keys) or "none: bring it up to date"),
    ]
    if status.unfinished:
        rows.append(("missing", f"{counted(status.unfinished, 'file')}: run it again"))
    for folder in status.folders:
        about = f": {folder.about}" if folder.about else ""
        n = counted(status.files_of.get(folder.id, 0), "file")
        rows.append(("folder", f"{near(folder.path)} ({n}){about}"))
    for pattern in status.selection.include:
        rows.append(("include", pattern))
    for pattern in status.selection.exclude:
        rows.append(("exclude", pattern))
    if not status.selection.gitignore:
        rows.append(("gitignore", "not regarded"))
    paths = {folder.id: folder.path for folder in status.folders}
    for each in status.unread:
        rows.append(("not read", f"{near(paths[each.folder] / each.name)}: {each.reason}"))
    console.print_pairs([(name, console.plain(value)) for name, value in rows])


def as_dict(status: IndexStatus) -> Mapping[str, object]:
    """For programs."""
    from gguf_embed.system.files import printable

    space = status.facts.space
    paths = {folder.id: folder.path for folder in status.folders}
    return {
        "file": printable(status.place),
        "model": space.model_id,
        "quant": space.quant,
        "fingerprint": space.fingerprint,
        "dim": space.dim,
        "chunk_tokens": status.facts.chunk_tokens,
        "overlap": status.facts.overlap,
        "n_files": status.n_files,
        "n_passages": status.n_passages,
        "n_unused_vectors": status.n_dead_rows,
        "n_bytes": status.n_bytes,
        "updated_at": status.updated_at,
        "n_unfinished": status.unfinished,
        "metadata_keys": list(status.metadata_keys),
        "include": list(status.selection.include),
        "exclude": list(status.selection.exclude),
        "gitignore": status.selection.gitignore,
        "folders": [
            {
                "folder": printable(folder.path),
                "about": folder.about,
                "n_files": status.files_of.get(folder.id, 0),
            }
            for folder in status.folders
        ],
        "unread": [
            {"source": printable(paths[each.folder] / each.name), "reason": each.reason}
            for each in status.unread
        ],
    }
