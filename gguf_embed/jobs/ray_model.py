"""One model file on every machine of a Ray cluster: the driver's own, by its hash.

A machine that has the file under the driver's path, or from an earlier job, uses that; the others
get it from the driver. It is verified, so that all vectors are of one space. Each machine plans and
measures for itself.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# Types are checked where Ray is not installed, and what it defines is unknown then.

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadOption, FetchFailed
from gguf_embed.plan.settings import Settings
from gguf_embed.store.local import file_sha256
from gguf_embed.system.files import WholeFile
from gguf_embed.system.paths import home

if TYPE_CHECKING:
    from gguf_embed.engine.options import EncodeOptions

PART_BYTES: Final = 32 << 20  # that travel at a time


@ray.remote(num_cpus=0)
class FileSource:
    """Reads a file of the driver's machine for the others."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, start: int) -> bytes:
        """The part from there on; empty at the end."""
        with Path(self._path).open("rb") as file:
            file.seek(start)
            return file.read(PART_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterModel:
    """What a machine needs to open the same model; travels."""

    path: str  # on the driver's machine
    sha256: str
    space: str  # the fingerprint that its vectors must have
    settings: Settings
    isolated: bool
    options: EncodeOptions
    source: Any  # the actor that reads the file

    @classmethod
    def of(
        cls, embedder: Embedder, options: EncodeOptions, *, isolated: bool = True
    ) -> ClusterModel:
        """The model of an open Embedder, on this cluster."""
        path = embedder.path.absolute()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        prompt_name = options.get("prompt_name")
        said: EncodeOptions = {**options}
        if prompt_name is not None:
            said = {**said, "prompt": embedder.prompt(prompt_name), "prompt_name": None}
        space = embedder.fingerprint(**said)
        # What decides vectors is as there; what decides speed is each machine's own.
        settings = replace(
            embedder.settings,
            quant=None,
            n_ctx=embedder.n_ctx,
            pooling=embedder.pooling,
            causal=embedder.mode.causal,
            allow_smaller=False,
            run=None,
        )
        if settings.exact:  # the last bits too, which what was measured there may change
            run = embedder.run_settings
            settings = replace(
                settings,
                flash_attn=run.flash_attn,
                repack=run.repack,
                tap=run.tap,
                accelerator=settings.accelerator if run.accelerator else False,
            )
        return cls(
            path=str(path),
            sha256=space.sha256,
            space=space.id,
            settings=settings,
            isolated=isolated,
            options=said,
            source=FileSource.options(scheduling_strategy=here).remote(str(path)),
        )

    def open(self) -> Embedder:
        """Open it on this machine. Raises BadOption where its vectors would be of another space."""
        embedder = Embedder.open(self._here(), settings=self.settings, isolated=self.isolated)
        try:
            found = embedder.fingerprint(**self.options)
            if found.id != self.space:
                raise BadOption(
                    f"{self.path}: this machine makes vectors of the space {found.id} of it, the "
                    f"driver of {self.space}; install the same version of gguf-embed on all, and "
                    "name the model by its file"
                )
        except BaseException:
            embedder.close()
            raise
        return embedder

    def _here(self) -> Path:
        own = Path(self.path)
        kept = home() / "cluster" / self.sha256[:16] / own.name
        for path in (own, kept):
            if path.is_file() and file_sha256(path) == self.sha256:
                return path
        kept.parent.mkdir(parents=True, exist_ok=True)
        with WholeFile(kept) as whole:
            start = 0
            while part := ray.get(self.source.read.remote(start)):
                with whole.writing():
                    whole.file.write(part)
                start += len(part)
            whole.commit()
        if file_sha256(kept) != self.sha256:
            kept.unlink()
            raise FetchFailed(f"{kept}: came from the driver with another hash; try again")
        return kept
