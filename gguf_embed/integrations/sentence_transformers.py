"""The shape of sentence-transformers, without it: change the import line of a script.

from gguf_embed.integrations.sentence_transformers import CrossEncoder, SentenceTransformer, util

model = SentenceTransformer("all-MiniLM-L6-v2")
scores = model.similarity(model.encode_query("a question"), model.encode_document(texts))

What is not supported raises BadOption with the way out. What differs:

- vectors have length 1 unless `normalize_embeddings=False`, also after `truncate_dim`;
- `similarity` gives arrays, and tensors for tensors;
- `batch_size` means nothing: the engine packs texts by their tokens;
- a text longer than `max_seq_length` is cut, as there, and the log tells how many were.

sentence_transformers_module.py runs a GGUF inside the real package, for its evaluators.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt

from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadOption, shown
from gguf_embed.integrations import sentence_util as util
from gguf_embed.integrations.cross_encoder import CrossEncoder as CrossEncoder
from gguf_embed.integrations.held import encoded
from gguf_embed.integrations.sentence_options import device_of, missing, refuse, settings_for
from gguf_embed.integrations.sentence_util import Precision
from gguf_embed.integrations.sentence_util import quantize_embeddings as quantize_embeddings
from gguf_embed.plan.settings import Settings
from gguf_embed.plan.values import check_number
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Vectors

__all__ = ["CrossEncoder", "SentenceTransformer", "quantize_embeddings", "util"]

_log = logging.getLogger(__name__)

Output = Literal["sentence_embedding", "token_embeddings"]

_DOCUMENT: Final = ("document", "passage", "corpus")  # names of the prompt, as there


class SentenceTransformer(Closes):
    """A model with the calls of sentence-transformers; see the file's text for what differs."""

    def __init__(
        self,
        model_name_or_path: str | Path | Embedder,
        *,
        device: str | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
        settings: Settings | None = None,
        **others: object,
    ) -> None:
        """A name, a path or an open Embedder; `settings` are those of gguf_embed."""
        refuse("SentenceTransformer", others)
        if isinstance(model_name_or_path, Embedder):
            if device is not None or settings is not None:
                raise BadOption("the model is open already; leave device and settings out")
            self.embedder = model_name_or_path
        else:
            self.embedder = Embedder.open(
                model_name_or_path, settings=settings_for(device, settings)
            )
        self._mine = self.embedder is not model_name_or_path
        self.prompts: dict[str, str] = {**self.embedder.prompts, **(prompts or {})}
        self.default_prompt_name = default_prompt_name
        if default_prompt_name is not None:
            self._prompt_named(default_prompt_name)
        self.truncate_dim = truncate_dim
        self.similarity_fn_name = similarity_fn_name or "cosine"
        card = self.embedder.card
        trained = card.max_seq_length if card else self.embedder.n_ctx
        self._max_seq_length = min(trained, self.embedder.n_ctx)

    def __repr__(self) -> str:
        return f"SentenceTransformer({self.embedder!r}, max_seq_length={self.max_seq_length})"

    def close(self) -> None:
        """Free the model, if it was opened here."""
        if self._mine:
            self.embedder.close()

    # -- what it is ----------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """ "cpu", or "cuda" where layers are on a GPU, whatever its kind."""
        return "cuda" if self.embedder.run_settings.n_gpu_layers else "cpu"

    @property
    def max_seq_length(self) -> int:
        """Tokens after which a text is cut; set it to cut elsewhere."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        number = check_number("max_seq_length", value, least=3)
        if number > self.embedder.n_ctx:
            raise BadOption(
                f"max_seq_length={number}: the model was opened for {self.embedder.n_ctx} tokens; "
                f"set less, or open it with settings=Settings(n_ctx={number})"
            )
        self._max_seq_length = number

    @property
    def similarity_fn_name(self) -> str:
        """ "cosine", "dot", "euclidean" or "manhattan"."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: str) -> None:
        name = str(getattr(value, "value", value))
        if name not in util.SIMILARITIES:
            raise BadOption(
                f"similarity_fn_name={shown(value)}: choose {', '.join(util.SIMILARITIES)}"
            )
        self._similarity_fn_name = name

    def get_max_seq_length(self) -> int:
        """`max_seq_length`."""
        return self.max_seq_length

    def get_sentence_embedding_dimension(self) -> int:
        """Length of a vector."""
        return min(self.truncate_dim or self.embedder.dim, self.embedder.dim)

    get_embedding_dimension = get_sentence_embedding_dimension

    # -- encode --------------------------------------------------------------------------------

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Output = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | Sequence[str] | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        pool: object = None,
        chunk_size: int | None = None,
        **others: object,
    ) -> Any:
        """(dim,) for a str, (n, dim) for several; see the file's text for what differs."""
        refuse("encode", others)
        self._check_device(device)
        text = self._prompt(prompt_name, prompt)
        one = isinstance(sentences, str)
        texts: list[str] = [sentences] if one else [*sentences]
        if output_value == "token_embeddings":
            rows: list[Any] = [self.embedder.token_vectors(text + each) for each in texts]
            rows = [util.as_tensor(each) for each in rows] if convert_to_tensor else rows
            return rows[0] if one else rows
        if output_value != "sentence_embedding":
            raise BadOption(
                f"output_value={shown(output_value)}: choose 'sentence_embedding' or "
                "'token_embeddings'"
            )
        vectors: npt.NDArray[Any] = encoded(
            self.embedder,
            texts,
            progress=show_progress_bar,
            prompt=text,
            dimensions=truncate_dim or self.truncate_dim,
            normalize=normalize_embeddings is not False,
            truncate="end",
            max_tokens=self.max_seq_length,
        )
        if precision != "float32":
            vectors = quantize_embeddings(vectors, precision)
        made: Any = util.as_tensor(vectors) if convert_to_tensor else vectors
        if one:
            return made[0]
        return made if convert_to_tensor or convert_to_numpy else [*made]

    def encode_query(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Any:
        """`encode` with the prompt "query", where the model has one."""
        return self._encode_as(("query",), sentences, prompt_name, prompt, options)

    def encode_document(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Any:
        """`encode` with the prompt "document", where the model has one."""
        return self._encode_as(_DOCUMENT, sentences, prompt_name, prompt, options)

    def _encode_as(
        self,
        names: Sequence[str],
        sentences: str | Sequence[str],
        prompt_name: str | None,
        prompt: str | None,
        options: dict[str, Any],
    ) -> Any:
        if prompt_name is None and prompt is None:
            prompt_name = next((name for name in names if name in self.prompts), None)
        return self.encode(sentences, prompt_name=prompt_name, prompt=prompt, **options)

    def _prompt(self, name: str | None, text: str | None) -> str:
        if text is not None:
            return text
        name = name or self.default_prompt_name
        return "" if name is None else self._prompt_named(name)

    def _prompt_named(self, name: str) -> str:
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise BadOption(f"the model has no prompt {name!r}; its prompts: {known}")
        return self.prompts[name]

    def _check_device(self, device: object) -> None:
        if device is None or (isinstance(device, str) and device_of(device) == self.device):
            return
        raise BadOption(
            f"device={shown(device)}: the model is on {self.device!r}; say the device when it is "
            "opened. One call uses all cores of this machine, or its GPUs"
        )

    # -- what is near ------------------------------------------------------------------------

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Of each row with each row, shape (n, m), by `similarity_fn_name`."""
        return util.SIMILARITIES[self.similarity_fn_name][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Of each row with the same row, shape (n,), by `similarity_fn_name`."""
        return util.SIMILARITIES[self.similarity_fn_name][1](embeddings1, embeddings2)

    # -- tokens --------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
        """What is computed of texts: input_ids and attention_mask, shape (n, longest)."""
        ids = [self._cut(self.embedder.tokenize(text)) for text in texts]
        shape = (len(ids), max(map(len, ids), default=0))
        tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, each in enumerate(ids):
            tokens[row, : len(each)] = each
            mask[row, : len(each)] = 1
        return {"input_ids": tokens, "attention_mask": mask}

    def _cut(self, ids: list[int]) -> list[int]:
        """To `max_seq_length`; the end token stays."""
        most = self.max_seq_length
        if len(ids) <= most:
            return ids
        tail = 1 if self.embedder.tokenize("")[-1:] == ids[-1:] else 0
        return ids[: most - tail] + ids[len(ids) - tail :]

    # -- several processes -----------------------------------------------------------------------

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> Any:
        """Nothing is started: `encode` uses all cores; give it what this returns, or do not."""
        _log.warning("start_multi_process_pool: is not needed; encode uses all cores by itself")
        return {"input": None, "output": None, "processes": []}

    @staticmethod
    def stop_multi_process_pool(pool: object) -> None:
        """Nothing was started."""

    def encode_multi_process(
        self, sentences: Sequence[str], pool: object = None, **options: Any
    ) -> Vectors:
        """`encode`."""
        return cast("Vectors", self.encode(sentences, **options))

    # -- what changes nothing, and what is not there -------------------------------------------

    def eval(self) -> SentenceTransformer:
        """It is never trained."""
        return self

    def to(self, device: str) -> SentenceTransformer:
        """Itself, where it is there already. Raises BadOption."""
        self._check_device(device)
        return self

    def __getattr__(self, name: str) -> Any:
        missing("SentenceTransformer", name)

    def __getitem__(self, index: int) -> Any:
        missing("SentenceTransformer", "modules")

    __iter__ = None  # else Python would count through them
