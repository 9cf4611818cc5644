"""A model for MTEB: any of its text tasks runs on this engine (extra `mteb`, mteb 2).

import mteb
from gguf_embed.integrations.mteb import MtebModel

with MtebModel.open("qwen3-embedding-0.6b") as model:
    results = mteb.evaluate(model, mteb.get_tasks(tasks=["SciFact"]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from gguf_embed.catalog.catalog import BUILTIN
from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadOption
from gguf_embed.plan.settings import Settings
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Vectors


class TaskFacts(Protocol):
    """What is used of mteb's TaskMetadata."""

    name: str
    type: str  # "Retrieval", "STS", "Clustering", ...
    prompt: str | Mapping[str, str] | None  # what its queries are for, in words


class MtebModel(Closes):
    """What mteb calls an encoder (mteb.models.EncoderProtocol), around an open Embedder."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    @classmethod
    def open(cls, model: str | Path = BUILTIN, *, settings: Settings | None = None) -> MtebModel:
        """Open a model as `Embedder.open` does."""
        return cls(Embedder.open(model, settings=settings))

    def close(self) -> None:
        """Close the embedder."""
        self.embedder.close()

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: TaskFacts,
        hf_split: str,
        hf_subset: str,
        prompt_type: str | None = None,
        batch_size: int = 0,
        show_progress_bar: bool = False,
        precision: str = "float32",
    ) -> Vectors:
        """Unit vectors of the texts of all batches, shape (n, dim).

        Longer texts than the model takes are cut at the end, as mteb's own models do. The engine
        packs texts by their tokens, so `batch_size` has no meaning here.
        """
        if precision != "float32":
            raise BadOption(f"precision={precision!r}: vectors are float32; leave it out")
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self.prompt(task_metadata, prompt_type)
        return self.embedder.encode(
            texts, prompt=prompt, truncate="end", progress=show_progress_bar
        )

    def prompt(self, task: TaskFacts, prompt_type: str | None) -> str:
        """What goes in front of a task's texts; the choices are those of mteb for such models.

        A model that takes instructions gets the task's own for queries and for the texts of tasks
        that have no queries. Others have their query and document prompts for retrieval, and
        where a prompt is named as the task's type ("clustering"), that one.
        """
        embedder = self.embedder
        if prompt_type == "document":
            return embedder.prompt("document")
        if embedder.card is not None and embedder.card.task_prompt is not None:
            return embedder.prompt("query", task=_instruction(task) or None)
        if prompt_type == "query":
            return embedder.prompt("query")
        return embedder.prompts.get(task.type.lower(), "")

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of each row with each row, as mteb computes it: a tensor of shape (n, m)."""
        return import_module("mteb.similarity_functions").cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of each row with the same row, as mteb computes it: a tensor of shape (n,)."""
        return import_module("mteb.similarity_functions").pairwise_cos_sim(embeddings1, embeddings2)

    @cached_property
    def mteb_model_meta(self) -> Any:
        """mteb's ModelMeta. The revision is the file's SHA-256, so results are never mixed up."""
        model_meta: Any = import_module("mteb.models.model_meta")
        embedder, card = self.embedder, self.embedder.card
        facts: dict[str, Any] = {
            "name": f"gguf_embed/{embedder.model_id}-{embedder.quant}",
            "revision": embedder.fingerprint().sha256,
            "n_parameters": embedder.header.parameters,
            "max_tokens": embedder.n_ctx,
            "embed_dim": embedder.dim,
            "open_weights": True,
            "framework": ["GGUF"],
            "similarity_fn_name": model_meta.ScoringFunction.COSINE,
            "use_instructions": any(embedder.prompts.values()),
            "adapted_from": card.source_repo if card else None,
        }
        return model_meta.ModelMeta.create_empty(overwrites=facts)


def _instruction(task: TaskFacts) -> str:
    """What the queries of a task are for; "" where mteb does not say."""
    if isinstance(task.prompt, str):
        return task.prompt
    if task.prompt and (prompt := task.prompt.get("query")):
        return prompt
    abstask: Any = import_module("mteb.abstasks.abstask")
    return abstask.get_abstask_prompt(task.name)
