"""What quantizing a GGUF will give, by llama.cpp's own decision; nothing is written.

forecast(Path("model-F16.gguf"), Recipe(level="Q4_K_M"))  # types, bytes, fallbacks
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Final

from gguf_embed.catalog import catalog
from gguf_embed.errors import BadModelFile, BadOption, NativeFailed
from gguf_embed.gguf import quants
from gguf_embed.gguf.check import check_embedder
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.gguf.imatrix import Imatrix, read_imatrix
from gguf_embed.gguf.quants import BLOCK, EXACT, FILE_TYPES, TYPE_NAMES
from gguf_embed.gguf.tensors import TensorInfo, tensor_bytes
from gguf_embed.lab.quantize_child import TENSOR_LINE, Recipe, run_quantizer
from gguf_embed.machine.probe import probe
from gguf_embed.store import hub, names
from gguf_embed.store.local import Source

# What llama_ftype_get_default_type knows; NVFP4 files are made elsewhere.
LEVELS: Final = tuple(name for name in FILE_TYPES.values() if name != "NVFP4")
_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT: Final = "output.weight"
# Without an importance matrix these are noise (llama-quant.cpp, tensor_requires_imatrix).
_NEED_IMATRIX: Final = quants.IMATRIX_TYPES

# The header gains a few keys: the level, where an importance matrix came from.
_NEW_KEYS_BYTES: Final = 1024
_ALIGNMENT: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """Matrices whose rows are not whole blocks of the type that the level gives them."""

    row_length: int
    wanted: str
    given: str
    n_tensors: int

    def __str__(self) -> str:
        block = BLOCK[self.wanted][0]
        matrices = "1 matrix has" if self.n_tensors == 1 else f"{self.n_tensors} matrices have"
        return (
            f"{matrices} rows of {self.row_length}, not whole blocks of {block}: "
            f"{self.wanted} fell back to {self.given}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What quantizing will give, by llama.cpp's own decision; nothing has been written."""

    path: Path  # of the source
    source: Header
    recipe: Recipe
    tensors: tuple[TensorInfo, ...]  # of the result; offsets are 0
    fallbacks: tuple[Fallback, ...]
    n_bytes: int  # of the result; at most a kilobyte too many

    @property
    def types(self) -> Mapping[str, int]:
        """How many tensors have which type, the most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())


def level_named(name: str) -> str:
    """The level as llama.cpp spells it; raises BadOption, which names those that are near."""
    return _known("level", name, quants.parse(name), LEVELS)


def _known(what: str, name: str, found: str, known: Sequence[str]) -> str:
    if found in known:
        return found
    near = difflib.get_close_matches(found, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise BadOption(f"no {what} is called {name!r}; {hint}Known: {', '.join(known)}")


# ------------------------------------------------------------------------------- the source


def find_source(name: str, *, force: bool = False) -> Source:
    """The file to quantize: of several, one that has lost nothing, and one that is here first.

    Unless `force`, a quantized file that is not here is refused before gigabytes are fetched.
    """
    found = [source for source in names.sources(name) if source.quant in EXACT]
    found.sort(key=lambda source: (source.path is None, EXACT.index(source.quant or "")))
    source = found[0] if found else names.resolve(name)
    if source.path is None and not force:
        check_exact(hub.remote_header(source))
    return source


def check_exact(source: Header) -> None:
    """Refuse a source that is quantized itself, and name a better one where it is known."""
    lossy = [tensor for tensor in source.tensors if BLOCK[tensor.type][0] > 1]
    if not lossy:
        return
    instead = "an F16, BF16 or F32 file of it"
    if card := catalog.by_header(source):
        known = {file.quant for file in card.files}
        instead = next((f"{card.id}:{level}" for level in EXACT if level in known), instead)
    raise BadOption(
        f"{source.source} is quantized already ({source.quant}, {len(lossy)} of "
        f"{len(source.tensors)} tensors): a second time adds loss to loss; quantize {instead}, or "
        "insist with --force (force=True)"
    )


# ----------------------------------------------------------------------------- the forecast


def forecast(path: Path, recipe: Recipe) -> Forecast:
    """What quantizing the file at `path` will give; takes milliseconds, whatever its size.

    Raises BadOption for a recipe that cannot be followed or would give a bad file, BadModelFile
    for a source that is no whole model.
    """
    recipe = _spelled(recipe)
    source = read_header(path)
    _check_source(source, recipe)
    imatrix = read_imatrix(recipe.imatrix) if recipe.imatrix else None
    if imatrix:
        _check_imatrix(source, recipe, imatrix)

    log: list[str] = []
    run_quantizer(path, path, recipe, dry_run=True, on_line=log.append)
    new_types = {match[3]: match[4] for match in map(TENSOR_LINE.match, log) if match}
    if new_types.keys() != {tensor.name for tensor in source.tensors}:
        raise NativeFailed(
            f"{path}: llama.cpp named {len(new_types)} of {len(source.tensors)} tensors in its dry "
            "run; its log is not what is known here: install llama-cpp-python 0.3.36"
        )
    tensors = tuple(
        _retyped(tensor, _TYPES[new_type.lower()])
        if (new_type := new_types[tensor.name])
        else tensor
        for tensor in source.tensors
    )
    _check_needs(recipe, tensors, imatrix)
    data_bytes = sum(_padded(tensor.n_bytes) for tensor in tensors)
    return Forecast(
        path=path,
        source=source,
        recipe=recipe,
        tensors=tensors,
        fallbacks=_fallbacks(log, tensors, recipe),
        n_bytes=_padded(source.header_bytes + _NEW_KEYS_BYTES) + data_bytes,
    )


def _spelled(recipe: Recipe) -> Recipe:
    """The recipe in llama.cpp's own names, with a number of threads."""

    def of_type(name: str | None) -> str | None:
        return name and _known("tensor type", name, quants.parse_type(name), quants.WRITABLE_TYPES)

    return replace(
        recipe,
        level=level_named(recipe.level),
        token_embedding_type=of_type(recipe.token_embedding_type),
        output_type=of_type(recipe.output_type),
        n_threads=recipe.n_threads or probe().usable_cores,
    )


_TYPES: Final = {name.lower(): name for name in TYPE_NAMES.values()}
_FALLBACK: Final = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +\d+ \(required for type +(\w+)\) "
    r".*-> falling back to +(\w+)"
)


def _retyped(tensor: TensorInfo, type_name: str) -> TensorInfo:
    return TensorInfo(
        name=tensor.name,
        shape=tensor.shape,
        type=type_name,
        offset=0,
        n_bytes=tensor_bytes(type_name, tensor.shape),
    )


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _check_source(source: Header, recipe: Recipe) -> None:
    check_embedder(source)
    if source.split[1] > 1:
        raise BadModelFile(
            f"{source.source}: part of a model in {source.split[1]} files; join them with "
            "llama.cpp's llama-gguf-split --merge, then quantize the whole"
        )
    if source.quant == recipe.level and not (recipe.token_embedding_type or recipe.output_type):
        raise BadOption(f"{source.source} is {recipe.level} already; copy the file")
    if not recipe.force:
        check_exact(source)
    for type_name, chosen in (
        (recipe.token_embedding_type, _EMBEDDINGS),
        (recipe.output_type, (_OUTPUT,)),
    ):
        for tensor in map(source.tensor, chosen):
            if tensor and type_name and tensor.shape[0] % BLOCK[type_name][0]:
                # llama.cpp does not look: its release builds would write garbage.
                raise BadOption(
                    f"{source.source}: {tensor.name} has rows of {tensor.shape[0]}, not whole "
                    f"{type_name} blocks of {BLOCK[type_name][0]}; choose a type of blocks of 32, "
                    "such as Q8_0"
                )


def _fallbacks(
    log: Sequence[str], tensors: Sequence[TensorInfo], recipe: Recipe
) -> tuple[Fallback, ...]:
    """What llama.cpp warned of, and the one case in which it says nothing."""
    found = Counter[tuple[int, str, str]]()
    warned: set[str] = set()
    for match in filter(None, map(_FALLBACK.match, log)):
        warned.add(match[1])
        found[int(match[2]), _TYPES[match[3].lower()], _TYPES[match[4].lower()]] += 1
    for tensor in tensors:
        if tensor.name not in warned and (wanted := _silent_fallback(tensor, recipe)):
            found[tensor.shape[0], wanted, tensor.type] += 1
    return tuple(
        Fallback(row_length=row_length, wanted=wanted, given=given, n_tensors=n)
        for (row_length, wanted, given), n in found.most_common()
    )


def _silent_fallback(tensor: TensorInfo, recipe: Recipe) -> str | None:
    """The K-quant that the output matrix, mostly the embedding table, would have been given.

    llama.cpp takes Q8_0 where the level's own blocks of 256 do not fill the rows, unwarned.
    """
    is_embedding = tensor.name in _EMBEDDINGS
    chosen = recipe.pure or recipe.output_type or (is_embedding and recipe.token_embedding_type)
    usual = recipe.level in ("Q8_0", "MXFP4_MOE", *EXACT)
    if chosen or usual or not (is_embedding or tensor.name == _OUTPUT):
        return None
    if tensor.type != "Q8_0":
        return None
    return "Q5_K" if recipe.level.startswith(("IQ1", "IQ2", "IQ3_XXS")) else "Q6_K"


def _check_imatrix(source: Header, recipe: Recipe, imatrix: Imatrix) -> None:
    """Refuse another model's importance matrix; llama.cpp would after minutes of work."""
    wrong = f"{recipe.imatrix} is of another model than {source.source}"
    tensors = [tensor for tensor in source.tensors if tensor.name in imatrix.values]
    if not tensors:
        raise BadOption(f"{wrong}: no tensor of it is among the {len(imatrix.values)} there")
    for tensor in tensors:
        n_values, n_inputs = (
            len(imatrix.values[tensor.name]),
            prod(tensor.shape[:1] + tensor.shape[2:]),
        )
        if n_values != n_inputs and tensor.name not in _EMBEDDINGS:  # there llama.cpp goes without
            raise BadOption(f"{wrong}: {tensor.name} has {n_inputs} inputs, there {n_values}")


def _check_needs(recipe: Recipe, tensors: Iterable[TensorInfo], imatrix: Imatrix | None) -> None:
    """Refuse the lowest levels without an importance matrix for each tensor that they shrink."""
    needing = {*_NEED_IMATRIX, "Q2_K"} if recipe.level == "Q2_K_S" else _NEED_IMATRIX
    exempt = {*_EMBEDDINGS, _OUTPUT, *(imatrix.values if imatrix else ())}
    missing = [t for t in tensors if t.type in needing and t.name not in exempt]
    if missing:
        step = f"{recipe.imatrix} lacks it" if imatrix else "pass one with --imatrix FILE"
        raise BadOption(
            f"{recipe.level} is noise without an importance matrix ({len(missing)} tensors, the "
            f"first is {missing[0].name} in {missing[0].type}): {step}, or take Q2_K or more"
        )
