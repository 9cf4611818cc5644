"""A GGUF in another quantization, made by llama.cpp's own quantizer and proved before it appears.

expected = forecast(Path("model-F16.gguf"), Recipe(level="Q4_K_M"))
made = make(expected, Path("model-Q4_K_M.gguf"))  # whole and verified, or absent
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gguf_embed.engine.canaries import SHORT as CANARIES
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import open_file
from gguf_embed.errors import BadOption, GgufEmbedError, NativeFailed, OutputFailed
from gguf_embed.gguf.header import read_header
from gguf_embed.lab.forecast import Forecast
from gguf_embed.lab.metrics import CosineStats, cosine_stats
from gguf_embed.lab.quantize_child import TENSOR_LINE, run_quantizer
from gguf_embed.plan.settings import Settings
from gguf_embed.system.files import WholeFile, check_free, free_bytes
from gguf_embed.vectors import Pooling, Vectors

OnTensor: TypeAlias = Callable[[int, int, str], None]  # tensors done, tensors in all, last name


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


def make(
    forecast: Forecast,
    target: Path,
    *,
    on_progress: OnTensor | None = None,
    on_status: Callable[[str], None] | None = None,
) -> Made:
    """Write the forecast file as `target`, which appears only whole and verified.

    Verified: it has the types of the forecast, loads, and embeds `CANARIES` much as its source.
    An older `target` is replaced. Raises DoesNotFit (the disk), OutputFailed or NativeFailed.
    """
    began = time.monotonic()
    _check_target(forecast, target)
    say = on_status or _silent
    with WholeFile(target) as whole:  # what cannot be written is told before the work
        say("embedding with the source")
        reference = _embed(forecast.path, forecast)
        others = ~np.eye(len(CANARIES), dtype=np.bool_)
        apart = float((reference @ reference.T)[others].mean())
        _write(forecast, whole.temporary, target, on_progress)
        say("embedding with the result")
        canaries = _verify(forecast, whole.temporary, reference, apart)
        n_bytes = whole.temporary.stat().st_size
        whole.commit()
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
    check_free(
        forecast.n_bytes,
        folder,
        f"{target}: {forecast.recipe.level} of {forecast.path.name}",
        "make room, or name a file on another disk",
    )


def _silent(text: str) -> None:
    """A status that nobody asked for."""


def _write(forecast: Forecast, temporary: Path, target: Path, on_progress: OnTensor | None) -> None:
    def listen(line: str) -> None:
        if on_progress is not None and (match := TENSOR_LINE.match(line)):
            on_progress(int(match[1]), int(match[2]), match[3])

    try:
        run_quantizer(forecast.path, temporary, forecast.recipe, dry_run=False, on_line=listen)
    except NativeFailed as error:
        if "iostream" not in str(error):  # all that C++ says of a write that failed
            raise
        free = free_bytes(target.parent)
        raise OutputFailed(
            f"{target}: only {temporary.stat().st_size} of about {forecast.n_bytes} bytes could be "
            f"written, {free} are free on that disk; make room, or choose another -o"
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
    opened = open_file(path.absolute(), None, settings, rerankers=True)
    with Embedder(opened) as embedder:
        return embedder.encode(CANARIES, progress=False)
