"""A GGUF in another quantization: llama.cpp's own quantizer, planned before and proved after.

    forecast = plan(Path("model-F16.gguf"), Recipe(level="Q4_K_M"))  # types, bytes, fallbacks
    made = make(forecast, Path("model-Q4_K_M.gguf"))                 # whole and verified, or absent

The native work is done in a child process (`-m gguf_embed.lab.quantize`): llama.cpp cannot be
interrupted, and gives up on some files by aborting its process.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from gguf_embed.catalog import catalog
from gguf_embed.engine.canaries import SHORT as CANARIES
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import Settings
from gguf_embed.errors import (
    BadModelFile,
    BadOption,
    DoesNotFit,
    GgufEmbedError,
    NativeFailed,
    OutputFailed,
)
from gguf_embed.gguf import quants
from gguf_embed.gguf.check import check_embedder
from gguf_embed.gguf.header import (
    Header,
    read_header,
)
from gguf_embed.gguf.imatrix import Imatrix, read_imatrix
from gguf_embed.gguf.quants import BLOCK, FILE_TYPES, TYPE_NAMES
from gguf_embed.gguf.tensors import TensorInfo, tensor_bytes
from gguf_embed.lab.metrics import CosineStats, cosine_stats
from gguf_embed.machine import probe as hardware
from gguf_embed.native import library as llama
from gguf_embed.store import hub
from gguf_embed.store.local import Source, mib
from gguf_embed.vectors import Pooling, Vectors

Progress: TypeAlias = Callable[[int, int, str], None]  # tensors done, tensors in all, last name

# What llama_ftype_get_default_type knows; NVFP4 files are made elsewhere.
LEVELS: Final = tuple(name for name in FILE_TYPES.values() if name != "NVFP4")
EXACT: Final = quants.EXACT  # levels to quantize from, cheapest download first
TENSOR_TYPES: Final = quants.WRITABLE_TYPES  # for single tensors
_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT: Final = "output.weight"
# Without an importance matrix these are noise (llama-quant.cpp, tensor_requires_imatrix).
_NEED_IMATRIX: Final = quants.IMATRIX_TYPES

# The header gains a few keys: the level, where an importance matrix came from.
_NEW_KEYS_BYTES: Final = 1024
_ALIGNMENT: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is asked for; names are taken as llama.cpp spells them, in any case."""

    level: str
    token_embedding_type: str | None = None
    output_type: str | None = None
    pure: bool = False  # every matrix in the level's main type, no mixture
    imatrix: Path | None = None
    force: bool = False  # also from a source that has lost precision already
    n_threads: int | None = None  # None: every usable core


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A new file, and how near its vectors of `CANARIES` are to the source's.

    `apart` is the yardstick: the mean cosine of different canaries in the source.
    """

    path: Path
    n_bytes: int
    canaries: CosineStats
    apart: float
    seconds: float


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
    found = [source for source in hub.sources(name) if source.quant in EXACT]
    found.sort(key=lambda source: (source.path is None, EXACT.index(source.quant or "")))
    source = found[0] if found else hub.resolve(name)
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


def plan(path: Path, recipe: Recipe) -> Forecast:
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
    _run(path, path, recipe, dry_run=True, on_line=log.append)
    new_types = {match[3]: match[4] for match in map(_TENSOR.match, log) if match}
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
        return name and _known("tensor type", name, quants.parse_type(name), TENSOR_TYPES)

    return replace(
        recipe,
        level=level_named(recipe.level),
        token_embedding_type=of_type(recipe.token_embedding_type),
        output_type=of_type(recipe.output_type),
        n_threads=recipe.n_threads or hardware.probe().usable_cores,
    )


_TYPES: Final = {name.lower(): name for name in TYPE_NAMES.values()}
# [  7/ 101] blk.0.attn_k.weight - [384, 384, 1, 1], type = f16, size = 0.28 MiB -> 0.10 MiB (q5_0)
_TENSOR: Final = re.compile(r"\[ *(\d+)/ *(\d+)\] (\S+) .*?(?:\((\w+)\))?$")
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
    for type_name, names in (
        (recipe.token_embedding_type, _EMBEDDINGS),
        (recipe.output_type, (_OUTPUT,)),
    ):
        for tensor in map(source.tensor, names):
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


# ------------------------------------------------------------------------------- the making


def make(
    forecast: Forecast,
    target: Path,
    *,
    on_progress: Progress | None = None,
    on_status: Callable[[str], None] | None = None,
) -> Made:
    """Write the forecast file as `target`, which appears only whole and verified.

    Verified: it has the types of the forecast, loads, and embeds `CANARIES` much as its source.
    An older `target` is replaced. Raises DoesNotFit (the disk), OutputFailed or NativeFailed.
    """
    began = time.monotonic()
    _check_target(forecast, target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    _create(temporary, target)
    try:
        if on_status is not None:
            on_status("embedding with the source")
        reference = _embed(forecast.path, forecast)
        others = ~np.eye(len(CANARIES), dtype=np.bool_)
        apart = float((reference @ reference.T)[others].mean())
        _write(forecast, temporary, target, on_progress)
        if on_status is not None:
            on_status("embedding with the result")
        canaries = _verify(forecast, temporary, reference, apart)
        n_bytes = temporary.stat().st_size
        _put(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return Made(
        path=target,
        n_bytes=n_bytes,
        canaries=canaries,
        apart=apart,
        seconds=time.monotonic() - began,
    )


def _check_target(forecast: Forecast, target: Path) -> None:
    if target.suffix.lower() != ".gguf":
        raise BadOption(f"-o {target}: name a file that ends in .gguf")
    if target.is_dir():
        raise BadOption(f"-o {target}: is a directory; name a file in it")
    if target.exists() and target.samefile(forecast.path):
        raise BadOption(f"-o {target}: is the source itself; choose another name")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise OutputFailed(f"{target}: there is no directory {folder}; make it: mkdir -p {folder}")
    free_bytes = shutil.disk_usage(folder).free
    if forecast.n_bytes > free_bytes:
        raise DoesNotFit(
            f"{target}: {forecast.recipe.level} of {forecast.path.name} takes "
            f"{mib(forecast.n_bytes)}, the disk of {folder} has {mib(free_bytes)} free; make room, "
            "or name a file on another disk",
            needed_bytes=forecast.n_bytes,
            free_bytes=free_bytes,
        )


def _create(temporary: Path, target: Path) -> None:
    """An empty file in place of the result: what cannot be written is told before the work."""
    try:
        temporary.open("xb").close()
    except OSError as error:
        raise OutputFailed(
            f"{target}: cannot be written: {error.strerror or error}; choose another -o, or "
            "check the permission of its directory"
        ) from error


def _write(forecast: Forecast, temporary: Path, target: Path, on_progress: Progress | None) -> None:
    def listen(line: str) -> None:
        if on_progress is not None and (match := _TENSOR.match(line)):
            on_progress(int(match[1]), int(match[2]), match[3])

    try:
        _run(forecast.path, temporary, forecast.recipe, dry_run=False, on_line=listen)
    except NativeFailed as error:
        if "iostream" not in str(error):  # all that C++ says of a write that failed
            raise
        free_bytes = shutil.disk_usage(target.absolute().parent).free
        raise OutputFailed(
            f"{target}: only {temporary.stat().st_size} of about {forecast.n_bytes} bytes could be "
            f"written, {free_bytes} are free on that disk; make room, or choose another -o"
        ) from error


def _verify(forecast: Forecast, temporary: Path, reference: Vectors, apart: float) -> CosineStats:
    """Refuse what is no nearer to its source than texts that have nothing in common."""
    what = f"the {forecast.recipe.level} of {forecast.path.name}"
    try:
        written = {tensor.name: tensor.type for tensor in read_header(temporary).tensors}
        canaries = cosine_stats(_embed(temporary, forecast), reference)
    except GgufEmbedError as error:
        raise NativeFailed(f"{what} does not embed and was removed: {error}") from error
    if written != {tensor.name: tensor.type for tensor in forecast.tensors}:
        raise NativeFailed(
            f"{what} has other tensor types than llama.cpp's dry run said and was removed; "
            "please report it"
        )
    if canaries.mean <= apart:
        raise NativeFailed(
            f"{what} gives other vectors than its source and was removed: their mean cosine is "
            f"{canaries.mean:.3f}, and {apart:.3f} between different texts; take more bits"
        )
    return canaries


def _embed(path: Path, forecast: Forecast) -> Vectors:
    """The vectors of `CANARIES`, shape (n, dim), unit length."""
    header = forecast.source
    pooling = header.pooling
    if pooling not in (Pooling.MEAN, Pooling.CLS, Pooling.LAST):
        # A reranker, or a file that does not say. Both sides are pooled alike, so any will do.
        pooling = Pooling.LAST if header.causal else Pooling.MEAN
    settings = Settings(pooling=pooling, n_threads=forecast.recipe.n_threads, tune=False)
    with Embedder.open(path.absolute(), settings=settings) as embedder:
        return embedder.encode(CANARIES)


def _put(temporary: Path, target: Path) -> None:
    """On disk, then in place."""
    try:
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise OutputFailed(f"{target}: cannot be replaced: {error.strerror or error}") from error


# -------------------------------------------------------------------------------- the child


def _run(
    source: Path, target: Path, recipe: Recipe, *, dry_run: bool, on_line: Callable[[str], None]
) -> None:
    """llama.cpp's quantizer in a process of its own, which ends when this call does."""
    task = {key: value for key, value in asdict(recipe).items() if key != "imatrix"}
    task |= {"source": str(source.absolute()), "target": str(target.absolute())}
    task |= {"dry_run": dry_run, "imatrix": recipe.imatrix and str(recipe.imatrix.absolute())}
    command = [sys.executable, "-m", "gguf_embed.lab.quantize", json.dumps(task)]
    last = ""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
        ) as child,
    ):
        assert child.stdout is not None, "asked for"
        try:
            for line in child.stdout:
                last = line if line.startswith("[") else last
                on_line(line.rstrip("\n"))
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines() or [""]
    if code == 0:
        return
    if code == _REFUSED:
        raise NativeFailed(said[-1])
    death = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    cause = next((line for line in said if "ASSERT" in line or "fatal" in line), said[-1])
    at = f" after {last.partition(' - ')[0].strip()}" if last else ""
    raise NativeFailed(f"{source}: llama.cpp's quantizer died: {death}{at}; {cause}")


_REFUSED: Final = 3


def _main(task: dict[str, Any]) -> int:
    """The child: llama.cpp's log on standard output; the reason of a refusal ends stderr."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would have to wait
    metadata: dict[str, str | int] = {}
    try:
        imatrix = read_imatrix(Path(task["imatrix"])) if task["imatrix"] else None
        if imatrix:
            metadata = _provenance(Path(task["imatrix"]), imatrix)
        params = llama.QuantizeParams(
            level=task["level"],
            token_embedding_type=task["token_embedding_type"],
            output_type=task["output_type"],
            pure=task["pure"],
            allow_requantize=task["force"],
            dry_run=task["dry_run"],
            n_threads=task["n_threads"],
            imatrix=imatrix.values if imatrix else {},
            metadata=metadata,
        )
        llama.quantize(Path(task["source"]), Path(task["target"]), params, _forward)
    except GgufEmbedError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return _REFUSED
    return 0


def _provenance(path: Path, imatrix: Imatrix) -> dict[str, str | int]:
    """The keys that llama-quantize puts into a file that an importance matrix helped to make."""
    keys: dict[str, str | int] = {"quantize.imatrix.file": path.name}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = imatrix.datasets[0]
    keys["quantize.imatrix.entries_count"] = len(imatrix.values)
    if imatrix.n_chunks:
        keys["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    return keys


def _forward(line: str) -> None:
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1])))
