"""What a user's name for a model means: one file, several to choose from, or none.

    source = resolve("qwen3-embedding:8b", "Q4_K_M")   # asks nothing of the network yet

Names: a card's id or alias, `owner/repo`, `hf:owner/repo/file.gguf`, the first two with an
optional `:QUANT`, repositories and files with an optional `@revision`; a path; an Ollama tag.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.errors import BadOption, ModelNotFound
from gguf_embed.gguf import quants
from gguf_embed.store import hub
from gguf_embed.store.failures import what_is_here
from gguf_embed.store.local import (
    SHARD,
    Places,
    Source,
    best_first,
    catalog_files,
    from_card,
    local_models,
    located,
    quant_of,
    repository_here,
)
from gguf_embed.store.safe_names import Named, fault
from gguf_embed.system.files import printable

_HUB_NAME = re.compile(
    r"(?P<prefix>hf:)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?P<file>[^@:\\]+))?(?:@(?P<revision>[\w./-]+))?"
)


_MOST_PARTS = 1000

Sources: TypeAlias = tuple[Source, ...]


def sources(name: str | Path, *, at: Places | None = None) -> tuple[Source, ...]:
    """Every file that `name` can mean, best quality first, with `path` where it is here.

    Asks the Hub only for the files of a repository that the catalog does not know, and only when
    online. Raises ModelNotFound, which names what is near.
    """
    check_name(name)
    if isinstance(name, Path) or _is_path(name):
        return (_local_file(Path(name)),)
    at = at or hub.places()
    name, quant = _split_quant(name)
    if card := catalog.find(name):
        found = _card_sources(card, name, at)
    elif match := _HUB_NAME.fullmatch(name):
        found = _hub_sources(name, match, at)
    else:
        found = tuple(model for model in local_models(at) if model.name == name)
    if not found and _is_folder(name):
        return (_local_file(Path(name)),)  # refused, with what is in it
    if not found:
        near = catalog.nearest(name)
        hint = f"Did you mean {' or '.join(near)}?" if near else what_is_here(at)
        raise ModelNotFound(
            f"no model is called {name!r}. {hint} Other names: owner/repo or "
            "hf:owner/repo/file.gguf for the Hub, a path for a file"
        )
    return found if quant is None else (_first(_of_quant(found, quant)),)


def offered(
    name: str | Path, quant: str | None = None, *, here: bool = True, at: Places | None = None
) -> tuple[Source, ...]:
    """The files to choose from where `name` is to be run; all of that `quant`, where it is given.

    They are those of `sources`, but of a model that is built in the built-in file alone, so that
    the same name gives the same vectors whatever else was fetched. A repository of which a fitting
    file is here is not asked again: what was fetched stays what is used, and another state of it
    is had by naming the revision; unless `here` is False. Raises ModelNotFound, BadOption.
    """
    check_name(name)
    if isinstance(name, Path) or _is_path(name):
        if quant:
            raise BadOption(f"{name} is one file; it cannot be had as {quant}, leave that out")
        return (_local_file(Path(name)),)
    bare, in_name = _split_quant(name)
    if quant and in_name and quants.parse(quant) != quants.parse(in_name):
        raise BadOption(f"{name} says {in_name}, but {quant} was asked for; give one of them")
    quant = quant or in_name
    card = catalog.find(bare)
    if card is not None:
        builtin = tuple(from_card(card, file) for file in card.files if file.builtin)
        if fitting := _fitting(builtin, quant):
            return fitting
    at = at or hub.places()
    match = _HUB_NAME.fullmatch(bare)
    if here and match and not match["file"] and not card:
        found = repository_here(match["repo"], match["revision"], at)
        if fitting := _fitting(found, quant):
            return fitting
    return _of_quant(sources(bare, at=at), quant)


def resolve(name: str | Path, quant: str | None = None, *, at: Places | None = None) -> Source:
    """The one file that `name` means, with its `path` where it is already here.

    Of those `offered` the best that is here, else Q8_0, else the best there is.
    """
    return _first(offered(name, quant, at=at))


def named_here(name: str, quant: str | None = None, *, at: Places | None = None) -> Sources:
    """The files on this machine that `name` means, best quality first; asks no network.

    Raises ModelNotFound where there is none, and BadOption.
    """
    check_name(name)
    at = at or hub.places()
    bare, in_name = _split_quant(name)
    quant = quant or in_name
    match, card = _HUB_NAME.fullmatch(bare), catalog.find(bare)

    def is_meant(source: Source) -> bool:
        if card is not None:
            return source.card is not None and source.card.id == card.id
        if match is None:
            return source.name == bare
        same = (source.repo or source.name).lower() == match["repo"].lower()
        return same and match["file"] in (None, source.file)

    found = best_first(source for source in local_models(at) if is_meant(source))
    if fitting := _fitting(found, quant):
        return fitting
    have = ", ".join(source.quant or source.file for source in found)
    here = f" as {quant}, only as {have}" if found else ""
    raise ModelNotFound(
        f"{bare} is not on this machine{here}; `gguf-embed models` shows what is, `gguf-embed "
        f"pull {bare}` fetches it"
    )


def _first(found: tuple[Source, ...]) -> Source:
    here = (source for source in found if source.path)
    usual = (source for source in found if source.quant == "Q8_0")
    return next(here, None) or next(usual, None) or found[0]


def _of_quant(found: tuple[Source, ...], quant: str | None) -> tuple[Source, ...]:
    """Those in that quantization; raises ModelNotFound, which names what there is."""
    if fitting := _fitting(found, quant):
        return fitting
    have = ", ".join(replace(s, name=s.quant or s.file, quant=None).label_with_size for s in found)
    raise ModelNotFound(f"{found[0].name} has no {quant}; it has: {have}")


def _fitting(found: tuple[Source, ...], quant: str | None) -> tuple[Source, ...]:
    if quant is None:
        return found
    return tuple(source for source in found if source.quant == quants.parse(quant))


def check_name(name: str | Path) -> None:
    """Refuse what a variable without a value gives: as a path it would be this folder."""
    if isinstance(name, str) and not name.strip():
        raise BadOption("the name of the model is empty; give one of `gguf-embed models`")


def _is_path(name: str) -> bool:
    """Whether it can only be meant as a path."""
    if name.startswith("hf:") or catalog.find(name):
        return False
    looks = name.startswith(("/", ".", "~", "\\")) or name.lower().endswith(".gguf")
    return looks or _is_file(Path(name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _is_folder(name: str) -> bool:
    with suppress(OSError, ValueError):
        return Path(name).is_dir()
    return False


def quant_in(name: str | Path) -> str | None:
    """The quantization that a name says, as in `bge-m3:Q8_0`; a path says none."""
    return None if isinstance(name, Path) or _is_path(name) else _split_quant(name)[1]


def _split_quant(name: str) -> tuple[str, str | None]:
    """`owner/repo:Q8_0@main` -> `owner/repo@main`, `Q8_0`; an alias may hold a colon itself."""
    bare, at_sign, revision = name.partition("@")
    head, _, tail = bare.rpartition(":")
    if head and re.fullmatch(quants.PATTERN, tail, re.IGNORECASE) and catalog.find(name) is None:
        return head + at_sign + revision, tail
    return name, None


def _local_file(path: Path) -> Source:
    with suppress(RuntimeError):  # "~nobody" is a name like any other
        path = path.expanduser()
    shown = printable(path)
    if _is_file(path):
        _check_parts(path)
        return Source(
            name=shown,
            quant=quant_of(path.name),
            file=path.name,
            n_bytes=path.stat().st_size,
            path=path,
            where="file",
        )
    why, folder, beside = "does not exist", path.parent, list[str]()
    with suppress(OSError, ValueError):  # what no system call takes does not exist either
        if path.is_dir():
            why, folder = "is a directory, not a GGUF file", path
        elif path.exists():  # opening a pipe would wait for ever
            why = "is a pipe or a device; copy the model to a file on a disk"
        beside = sorted(printable(Path(file.name)) for file in folder.glob("*.gguf"))[:5]
    here = f"; {printable(folder)} holds {', '.join(beside)}" if beside else ""
    raise ModelNotFound(
        f"{shown} {why}{here}; a file on the Hub is written hf:owner/repo/file.gguf"
    )


def _check_parts(path: Path) -> None:
    """A split model is opened by its first part, with the others beside it."""
    part = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name, re.IGNORECASE)
    if part is None or not 1 <= int(part[2]) <= _MOST_PARTS:
        return
    stem = path.name[: part.start()]
    names = [f"{stem}-{i:05}-of-{part[2]}{path.suffix}" for i in range(1, int(part[2]) + 1)]
    if missing := [name for name in names if not _is_file(path.parent / name)]:
        raise ModelNotFound(
            f"{printable(path)} is part {int(part[1])} of {int(part[2])} of a split model, and "
            f"{printable(Path(missing[0]))} is not beside it; bring all parts, or join them where "
            "they are with llama.cpp's llama-gguf-split --merge"
        )
    if int(part[1]) != 1:
        raise BadOption(
            f"{printable(path)} is part {int(part[1])} of {int(part[2])} of a split model; pass "
            f"the first, {printable(path.parent / names[0])}"
        )


def _card_sources(card: ModelCard, name: str, at: Places) -> tuple[Source, ...]:
    """A card's files, and others of that model that are here; or those of the repository named."""
    found = [located(from_card(card, file), at) for file in card.files]
    known = {source.path for source in found}
    for model in local_models(at):
        if model.card and model.card.id == card.id and model.path not in known:
            found.append(model)
    in_repo = [source for source in found if (source.repo or "").lower() == name.lower()]
    if not found:
        way = card.build or f"llama.cpp's convert_hf_to_gguf.py from {card.source_repo}"
        raise ModelNotFound(
            f"{card.id} is known, but no GGUF of it is; make one with {way} and pass its path, or "
            "name one that you trust as hf:owner/repo/file.gguf"
        )
    return tuple(in_repo or found)


def _hub_sources(name: str, match: re.Match[str], at: Places) -> tuple[Source, ...]:
    repo, file, revision = match["repo"], match["file"], match["revision"]
    named: tuple[tuple[Named, str | None], ...] = (
        ("repository", repo),
        ("file", file),
        ("revision", revision),
    )
    for kind, said in named:
        if said is not None and (reason := fault(kind, said)):
            raise BadOption(f"{name!r}: {said!r} cannot name a {kind}, it {reason}")
    if file is None:
        here = repository_here(repo, revision, at) if at.offline else ()
        return here or hub.repository_files(repo, revision, at)
    if not match["prefix"] or not file.lower().endswith(".gguf"):
        raise BadOption(
            f"{name}: write hf:owner/repo/file.gguf for one file, owner/repo for all of them"
        )
    if SHARD.search(file):
        raise BadOption(
            f"{name} is a part of a split GGUF; name a whole one, or join the parts with "
            "llama.cpp's llama-gguf-split --merge and pass the path"
        )
    return (located(_hub_file(repo, file, revision), at),)


def _hub_file(repo: str, file: str, revision: str | None) -> Source:
    """One file of a repository; pinned and with its hash where the catalog knows it."""
    for card, known in catalog_files():
        if (known.repo, known.name) == (repo, file) and revision in (None, known.revision):
            return from_card(card, known)
    return Source(
        name=f"hf:{repo}/{file}",
        quant=quant_of(file),
        card=catalog.find(repo),
        repo=repo,
        revision=revision or "main",
        file=file,
    )
