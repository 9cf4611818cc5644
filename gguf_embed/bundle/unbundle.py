"""A model that was carried here: verified, proved by its canaries, installed.

    arrived = unbundle(Path("carry"))

Nothing of the folder is believed before it was checked, and nothing is installed before the model
gave the vectors here that it gave where it was bundled.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_embed.bundle import wheels
from gguf_embed.bundle.canary_child import canary_vectors
from gguf_embed.bundle.check import SUMS, BadSums, faults, read_sums
from gguf_embed.bundle.format import (
    ABOUT,
    Canaries,
    Licence,
    Status,
    read_canaries,
    read_description,
    read_sizes,
)
from gguf_embed.catalog import catalog
from gguf_embed.errors import BadInput, FetchFailed, GgufEmbedError, NativeFailed
from gguf_embed.gguf.header import read_header
from gguf_embed.gguf.quants import tolerance
from gguf_embed.lab.metrics import CosineStats, cosine_stats, cosines
from gguf_embed.store import hub, local
from gguf_embed.store import names as store_names
from gguf_embed.store.local import Places, Source, file_sha256
from gguf_embed.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A model that was carried here: `name` is what it is called from now on, without network."""

    name: str
    source: Source  # with its place on this machine
    licence: Licence
    canaries: CosineStats  # carried vectors against those of this machine
    n_canaries: int
    min_cosine: float  # what was asked of each canary
    n_files: int  # that were verified
    sums_sha256: str


def unbundle(folder: Path, *, on_status: Status | None = None, at: Places | None = None) -> Arrived:
    """Verify a bundle, prove its model by the canaries, then install it into our store.

    Opens no socket, and runs the model in a child process. Raises BadInput for what is no bundle,
    FetchFailed for one that is not as it was written (every such file is named), BadModelFile for
    a file that cannot be run, NativeFailed where this machine gives other vectors; nothing is
    installed then.
    """
    say = on_status or wheels.silent
    at = replace(at or hub.places(), offline=True)
    say(f"verifying {folder}")
    sums = _verified(folder)
    description, canaries = read_description(folder), read_canaries(folder)
    source = description.source
    paths = [path for path, sha256 in sums.items() if sha256 == source.sha256]
    if len(paths) != 1:
        raise FetchFailed(
            f"{folder}: {len(paths)} files have the model's sha256, {source.sha256}; nothing was "
            "installed"
        )
    _check_known(source)
    source = replace(source, card=local.card_of(source))
    path = folder / paths[0]
    say(f"embedding the canaries of {source.label}")
    header = read_header(path)
    card = source.card or catalog.by_header(header)
    vectors = canary_vectors(path, card, canaries.texts, plain=False)
    asked = tolerance(header.matrix_types)
    _check_canaries(source, canaries, vectors, asked)
    say("installing")
    stored = _installed(path, source, at)
    return Arrived(
        name=_name(stored, at),
        source=stored,
        licence=description.licence,
        canaries=cosine_stats(vectors, canaries.vectors),
        n_canaries=len(canaries.texts),
        min_cosine=asked,
        n_files=len(sums) + 1,
        sums_sha256=file_sha256(folder / SUMS),
    )


def _verified(folder: Path) -> dict[str, str]:
    """Path -> sha256 of all files, which are as the manifest says."""
    manifest = folder / SUMS
    if manifest.is_symlink() or not manifest.is_file():
        what = "holds no" if folder.is_dir() else "is not a folder with"
        raise BadInput(
            f"{folder} {what} {SUMS}, so it is no bundle, or one that was not finished; make it "
            "with gguf-embed bundle MODEL -o DIR"
        )
    try:
        sums = dict(read_sums(folder))
    except BadSums as error:
        raise FetchFailed(f"{error}; nothing was installed") from error
    if found := faults(folder, sums, _sizes(folder, sums)):
        shown = "; ".join(found[:10])
        more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
        raise FetchFailed(
            f"{folder} is not as it was written: {shown}{more}. Nothing was installed; carry it "
            "here again"
        )
    return sums


def _sizes(folder: Path, sums: Mapping[str, str]) -> Mapping[str, object]:
    """The bytes that each file should have, where the file that says so is as it was."""
    with suppress(OSError):
        if file_sha256(folder / ABOUT) == sums.get(ABOUT):
            return read_sizes(folder)
    return {}


def _check_known(source: Source) -> None:
    """A file that claims to be one of the catalog must have the hash that the catalog knows."""
    for card, file in local.catalog_files():
        same = (file.repo, file.name) == (source.repo or "", source.file)
        if same and file.sha256 not in (None, source.sha256):
            raise FetchFailed(
                f"it says it is {card.id} {file.quant} ({source.file}), but that has sha256 "
                f"{file.sha256}, and this {source.sha256}; nothing was installed"
            )


def _check_canaries(source: Source, canaries: Canaries, vectors: Vectors, least: float) -> None:
    if vectors.shape != canaries.vectors.shape:
        raise FetchFailed(
            f"{source.label} gives vectors of {vectors.shape[1]} values, its canaries have "
            f"{canaries.vectors.shape[1]}: they are of another model; nothing was installed"
        )
    values = cosines(vectors, canaries.vectors)
    worst = int(values.argmin())
    if not values[worst] >= least:  # also where it is NaN
        n_far = len(values) - int((values >= least).sum())
        raise NativeFailed(
            f"{source.label} does not give here the vectors that it gave where it was "
            f"bundled: {n_far} of {len(values)} canaries differ, the cosine of "
            f"{canaries.texts[worst][:40]!r} is {values[worst]:.4f} and must be {least}; "
            "nothing was installed. gguf-embed doctor tells whether this llama.cpp works here"
        )


def _installed(path: Path, source: Source, at: Places) -> Source:
    for card, file in local.catalog_files():
        if file.builtin and file.sha256 == source.sha256:
            return local.from_card(card, file)  # it came with the package
    return local.install(path, source, at)


def _name(stored: Source, at: Places) -> str:
    """The shortest name that means this very file from now on; its path where none does."""
    names: list[str] = []
    for name in (stored.name, stored.repo):
        names += [name, f"{name}:{stored.quant}"] if name else []
    if stored.repo:
        names.append(f"hf:{stored.repo}/{stored.file}")
    for name in names:
        with suppress(GgufEmbedError):
            if store_names.resolve(name, at=at).path == stored.path:
                return name
    return str(stored.path)
