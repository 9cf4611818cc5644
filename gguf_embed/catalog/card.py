"""What is known of one model, as a value.

A wrong pooling, prompt or end token gives wrong vectors in silence, so these are data with a
source, not code. A fact without a source is left out of the file; the GGUF header or the Hub
answers it at run time. Scores name where they were published, and over how many of a benchmark's
tasks the mean was taken.

A file is pinned to a full commit hash of its repository. Where none is known `revision` is
"main": an abbreviated hash is no pin, because huggingface_hub does not resolve one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gguf_embed.errors import BadOption
from gguf_embed.gguf import quants
from gguf_embed.gguf.layout import Shape
from gguf_embed.vectors import Pooling

ModelKind = Literal["embedder", "reranker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One published quality figure; `tasks` is "41/41" where the mean is over that many."""

    benchmark: str
    value: float  # 0 to 100
    source: str
    tasks: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One GGUF of a model; without a repository it is part of this package."""

    quant: str  # as llama-quantize names it
    repo: str  # "owner/name" on the Hub, "" for the built-in file
    revision: str  # 40 hex digits, or "main"; "" for the built-in file
    name: str  # path inside the repository
    n_bytes: int | None
    sha256: str | None

    @property
    def builtin(self) -> bool:
        """Whether it is installed with this package (builtin_path)."""
        return not self.repo

    @property
    def pinned(self) -> bool:
        """Whether its bytes cannot change: it ships here, or its commit is known."""
        return self.revision != "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of one model. None: not known, ask the file's header."""

    id: str  # the name of its TOML file
    title: str
    kind: ModelKind
    family: str | None  # the sizes of one model; their vectors do not mix
    aliases: tuple[str, ...]
    source_repo: str  # the original weights
    licence: str  # SPDX identifier where there is one
    licence_url: str | None
    commercial: bool  # whether the licence permits commercial use
    architecture: str  # as in GGUF
    shape: Shape | None
    parameters: int | None  # of the original weights
    pooling: Pooling
    causal: bool
    add_bos: bool | None
    add_eos: bool | None  # the text must end with eos_id, also when it was cut
    bos_token: str | None  # [CLS] in BERT vocabularies, <s> in XLM-R
    bos_id: int | None
    eos_token: str | None  # [SEP] in BERT vocabularies, </s> in XLM-R
    eos_id: int | None
    # name -> what is put in front of the text; rerankers: none
    prompts: Mapping[str, str] = field(hash=False)
    task_prompt: str | None  # the query prompt with "{task}", where the task can be chosen
    default_task: str | None
    rerank_template: str | None  # with "{task}", "{query}", "{document}"; None: a plain pair
    dim: int  # length of a vector; 1 for a reranker's score
    mrl_min: int | None  # vectors may be cut to any length from here up
    mrl_dims: tuple[int, ...]  # or to these lengths, longest first
    # Tokens of the longest text it was trained and scored with, special tokens included: what
    # sentence-transformers calls max_seq_length. It may take longer ones, see n_ctx_train.
    max_seq_length: int
    languages: str
    scores: tuple[Score, ...]
    files: tuple[ModelFile, ...]  # best quality first, one per quantization
    build: str | None  # what makes a file where none is pinned, in words
    notes: str
    header_names: tuple[str, ...]  # further values of general.name or general.basename

    @property
    def n_ctx_train(self) -> int | None:
        """Tokens of the longest text that it can take, as its GGUF says; None: ask the file."""
        return None if self.shape is None else self.shape.n_ctx_train

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that find() knows it by: id, aliases, original and GGUF repositories."""
        repos = (file.repo for file in self.files if not file.builtin)
        return tuple(dict.fromkeys((self.id, *self.aliases, self.source_repo, *repos)))

    def prompt(self, name: str, task: str | None = None) -> str:
        """What goes in front of a text, as it is: no space is added between them.

        `task` describes, in English, what the query is for; only the "query" prompt of
        instruction-tuned models takes one. Raises BadOption.
        """
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none, it is a reranker"
            raise BadOption(f"{self.id} has no prompt {name!r}; its prompts: {known}")
        if task is None:
            return self.prompts[name]
        if name != "query" or self.task_prompt is None:
            raise BadOption(
                f"the prompt {name!r} of {self.id} is fixed and takes no task; leave the task out"
            )
        return self.task_prompt.replace("{task}", task)

    def file(self, quant: str) -> ModelFile:
        """The file of that quantization, in any case of letters. Raises BadOption."""
        for file in self.files:
            if file.quant == quants.parse(quant):
                return file
        known = ", ".join(file.quant for file in self.files) or "none"
        raise BadOption(f"{self.id} has no file in {quant!r}; known quantizations: {known}")
