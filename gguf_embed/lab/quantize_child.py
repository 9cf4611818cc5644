"""llama.cpp's quantizer in a child process.

It cannot be interrupted, and gives up on some files by aborting its process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gguf_embed.errors import GgufEmbedError, NativeFailed
from gguf_embed.gguf.imatrix import Imatrix, read_imatrix
from gguf_embed.native import quantizer
from gguf_embed.native.quantizer import QuantizeParams
from gguf_embed.system.child import Child, take_job, tell

# [  7/ 101] blk.0.attn_k.weight - [384, 384, 1, 1], type = f16, size = 0.28 MiB -> 0.10 MiB (q5_0)
TENSOR_LINE: Final = re.compile(r"\[ *(\d+)/ *(\d+)\] (\S+) .*?(?:\((\w+)\))?$")


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


def run_quantizer(
    source: Path, target: Path, recipe: Recipe, *, dry_run: bool, on_line: Callable[[str], None]
) -> None:
    """Write `target`, or with `dry_run` only log what would be; `on_line` gets llama.cpp's log.

    The child ends when this call does. Raises NativeFailed.
    """
    job = {key: value for key, value in asdict(recipe).items() if key != "imatrix"}
    job |= {"source": str(source.absolute()), "target": str(target.absolute())}
    job |= {"dry_run": dry_run, "imatrix": recipe.imatrix and str(recipe.imatrix.absolute())}
    last = ""
    with Child("gguf_embed.lab.quantize_child", job) as child:
        for said in child.answers():
            if "failure" in said:
                raise NativeFailed(said["failure"])
            line = str(said["log"])
            last = line if line.startswith("[") else last
            on_line(line)
        ending = child.ending
    if not ending.ok:
        at = f" after {last.partition(' - ')[0].strip()}" if last else ""
        raise NativeFailed(f"{source}: llama.cpp's quantizer died{at}: {ending.reason}")


def _quantize(task: dict[str, Any]) -> None:
    """In the child: tells llama.cpp's log line by line, and why it was refused."""
    metadata: dict[str, str | int] = {}
    try:
        imatrix = read_imatrix(Path(task["imatrix"])) if task["imatrix"] else None
        if imatrix:
            metadata = _provenance(Path(task["imatrix"]), imatrix)
        params = QuantizeParams(
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
        quantizer.quantize(
            Path(task["source"]), Path(task["target"]), params, lambda line: tell({"log": line})
        )
    except GgufEmbedError as error:
        tell({"failure": " ".join(str(error).split())})


def _provenance(path: Path, imatrix: Imatrix) -> dict[str, str | int]:
    """The keys that llama-quantize puts into a file that an importance matrix helped to make."""
    keys: dict[str, str | int] = {"quantize.imatrix.file": path.name}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = imatrix.datasets[0]
    keys["quantize.imatrix.entries_count"] = len(imatrix.values)
    if imatrix.n_chunks:
        keys["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    return keys


if __name__ == "__main__":
    _quantize(take_job())
