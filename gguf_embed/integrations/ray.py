"""Ray Data: a column of texts becomes a column of vectors, on all machines (extra `ray`).

import ray
from gguf_embed.integrations.ray import embed_dataset

texts = ray.data.read_parquet("texts/")
embed_dataset(texts, model="qwen3-embedding-0.6b", column="text").write_parquet("vectors/")

`gguf-embed embed ... -o DIR/ --ray auto` is the same as a job that goes on after a kill.
"""

# pyright: basic, reportMissingImports=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportArgumentType=false
# Types are checked where the partner is not installed, and `ray` is taken for this file.

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pyarrow
import ray
import ray.data

from gguf_embed.catalog import BUILTIN
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.options import EncodeOptions
from gguf_embed.errors import BadInput, BadOption
from gguf_embed.jobs.ray_model import ClusterModel
from gguf_embed.plan.settings import Settings

BATCH_ROWS = 1024


def embed_dataset(
    dataset: ray.data.Dataset,
    *,
    model: str | Path | Embedder = BUILTIN,
    column: str = "text",
    vectors: str = "vector",
    settings: Settings | None = None,
    isolated: bool = True,
    workers: int | tuple[int, int] | None = None,
    **options: Unpack[EncodeOptions],
) -> ray.data.Dataset:
    """The dataset with a column of float32 vectors, which is computed when it is read.

    The driver opens the model, and each worker opens the very same file on its machine. `workers`
    is how many there are, or the least and the most; by default one for each machine. Options are
    those of `Embedder.encode`.
    """
    opened = model if isinstance(model, Embedder) else Embedder.open(model, settings=settings)
    try:
        opened.encode([], **options)  # checks them
        shipped = ClusterModel.of(opened, options, isolated=isolated)
    finally:
        if opened is not model:
            opened.close()
    n_machines = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    least, most = workers if isinstance(workers, tuple) else (workers or 1, workers or n_machines)
    if not 1 <= least <= most:
        raise BadOption(f"workers={workers!r}: pass a number from 1, or the least and the most")
    return dataset.map_batches(
        _Embeds,
        fn_constructor_args=(shipped, column, vectors),
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        batch_format="pyarrow",
        batch_size=BATCH_ROWS,
        num_cpus=1,
    )


class _Embeds:
    """The model on one machine."""

    def __init__(self, model: ClusterModel, column: str, vectors: str) -> None:
        self._embedder, self._options = model.open(), model.options
        self._column, self._vectors = column, vectors

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        if self._column not in batch.column_names:
            known = ", ".join(batch.column_names)
            raise BadInput(f"there is no column {self._column!r}; the columns are {known}")
        texts: list[Any] = batch.column(self._column).to_pylist()
        made = self._embedder.encode(texts, progress=False, **self._options)
        flat = pyarrow.array(np.ascontiguousarray(made).reshape(-1), pyarrow.float32())
        column = pyarrow.FixedSizeListArray.from_arrays(flat, made.shape[1])
        if self._vectors in batch.column_names:
            batch = batch.drop_columns([self._vectors])
        return batch.append_column(self._vectors, column)
