"""A GGUF inside the real sentence-transformers (5 or newer), as a module of it.

from sentence_transformers import SentenceTransformer
from gguf_embed.integrations.sentence_transformers_module import GgufModule

model = SentenceTransformer(modules=[GgufModule("qwen3-embedding-0.6b")])

Its evaluators, `util`, hard negatives and model cards work then; it cannot be trained. The package
hands over `batch_size` texts at a time: `encode(texts, batch_size=1024)` packs them best.
"""

# pyright: basic, reportMissingImports=false
# Types are checked where the partner is not installed, and what it defines is unknown then.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from gguf_embed.catalog import BUILTIN
from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadOption, kind_of
from gguf_embed.integrations.held import HeldEmbedder, encoded

try:
    from sentence_transformers.sentence_transformer.modules import InputModule
except ImportError:  # before 5.4
    from sentence_transformers.models import InputModule

_TEXTS: Final = "gguf_texts"  # what goes from `preprocess` to `forward`
_SAID: Final = ("dimensions", "truncate")  # of a call; the others are said when it is opened


class GgufModule(InputModule):
    """Texts to sentence embeddings, of length 1; a longer text is cut, as there, and logged.

    `choices` are those of `TextChoices`, less `task`: prompts are the package's own business, and
    `prompts` are the model's.
    """

    config_keys: list[str] = ["model", "choices"]  # noqa: RUF012

    def __init__(
        self,
        model: str | Path | Embedder = BUILTIN,
        choices: Mapping[str, Any] | None = None,
    ) -> None:
        """The name of a model, which is opened at its first use, or an open Embedder."""
        super().__init__()
        self.choices: dict[str, Any] = {"truncate": "end", **(choices or {})}
        if "task" in self.choices:
            raise BadOption("task: prompts are said to SentenceTransformer; leave it out")
        self.held = HeldEmbedder(model, **self.choices)
        self.model = self.held.name
        self.max_seq_length: int | None = self.choices.get("max_tokens")

    @property
    def prompts(self) -> dict[str, str]:
        """Those of the model, for `SentenceTransformer(modules=[module], prompts=...)`."""
        return dict(self.held.opened.prompts)

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.choices.get("dimensions") or self.held.opened.dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Texts with their prompt; tokens are the engine's."""
        for each in inputs:
            if not isinstance(each, str):
                raise BadOption(f"an input is {kind_of(each)}; a GGUF embedder takes one str each")
        return {_TEXTS: [(prompt or "") + each for each in inputs]}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """With their `sentence_embedding`."""
        said = {name: value for name, value in self.choices.items() if name in _SAID}
        said["max_tokens"] = self.max_seq_length
        vectors = encoded(self.held.opened, features[_TEXTS], progress=False, **said)
        return {**features, "sentence_embedding": torch.from_numpy(vectors)}

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Its config: the model's name and the choices, no weights."""
        self.held.as_dict()  # an open model has no name to keep
        self.save_config(output_path)
