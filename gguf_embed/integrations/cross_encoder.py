"""The shape of sentence-transformers' CrossEncoder, over `Reranker`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from gguf_embed.engine import bar
from gguf_embed.engine.reranker import Reranker
from gguf_embed.errors import BadInput, BadOption, ModelNotFound, kind_of, shown
from gguf_embed.integrations import sentence_util as util
from gguf_embed.integrations.sentence_options import missing, refuse, settings_for
from gguf_embed.plan.settings import Settings
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Vectors


class CrossEncoder(Closes):
    """A reranker with the calls of sentence-transformers; scores are from 0 to 1."""

    def __init__(
        self,
        model_name_or_path: str | Path | Reranker,
        *,
        max_length: int | None = None,
        activation_fn: object = None,
        device: str | None = None,
        settings: Settings | None = None,
        **others: object,
    ) -> None:
        """A name, a path or an open Reranker; `settings` are those of gguf_embed."""
        refuse("CrossEncoder", others)
        self._raw = _is_raw(activation_fn)
        if isinstance(model_name_or_path, Reranker):
            if any(each is not None for each in (max_length, device, settings)):
                raise BadOption("the model is open already; leave max_length, device, settings out")
            self.reranker = model_name_or_path
        else:
            settings = settings_for(device, settings)
            if max_length is not None:
                settings = replace(settings, n_ctx=max_length)
            self.reranker = _open(model_name_or_path, settings)
        self._mine = self.reranker is not model_name_or_path

    def __repr__(self) -> str:
        return f"CrossEncoder({self.reranker!r})"

    def __getattr__(self, name: str) -> Any:
        missing("CrossEncoder", name)

    def close(self) -> None:
        """Free the model, if it was opened here."""
        if self._mine:
            self.reranker.close()

    @property
    def max_length(self) -> int:
        """Tokens of a pair; what is longer loses the end of its document, and the log tells it."""
        return self.reranker.n_ctx

    def predict(
        self,
        sentences: Sequence[Any],
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: object = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **others: object,
    ) -> Any:
        """The scores of (query, document) pairs, shape (n,); of one pair its score."""
        refuse("predict", others)
        one = len(sentences) == 2 and all(isinstance(each, str) for each in sentences)
        pairs = [_pair(each) for each in ([sentences] if one else sentences)]
        raw = self._raw if activation_fn is None else _is_raw(activation_fn)
        scores = self._scores(pairs, raw=raw, progress=show_progress_bar)
        made = util.as_tensor(scores) if convert_to_tensor else scores
        if one:
            return made[0]
        return made if convert_to_tensor or convert_to_numpy else [*made]

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: object = None,
        **others: object,
    ) -> list[dict[str, Any]]:
        """The `top_k` documents, the best first: corpus_id, score, and text where asked for."""
        refuse("rank", others)
        scores = self.predict(
            [(query, each) for each in documents],
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
        )
        return [
            {"corpus_id": int(row), "score": scores[row]}
            | ({"text": documents[int(row)]} if return_documents else {})
            for row in np.argsort(-scores, kind="stable")[:top_k]
        ]

    def _scores(
        self, pairs: Sequence[tuple[str, str]], *, raw: bool, progress: bool | None
    ) -> Vectors:
        """Each query reads its documents together."""
        rows: dict[str, list[int]] = {}
        for row, (query, _) in enumerate(pairs):
            rows.setdefault(query, []).append(row)
        scores = np.empty(len(pairs), np.float32)
        with bar.watched(pairs, progress, None) as watch:
            for query, places in rows.items():
                documents = [pairs[row][1] for row in places]
                scores[places] = self.reranker.score(query, documents, raw=raw, on_progress=watch)
        return scores


def _open(name: str | Path, settings: Settings) -> Reranker:
    try:
        return Reranker.open(name, settings=settings)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"{error}. A cross encoder must be a reranker in GGUF, such as bge-reranker-v2-m3 or "
            "qwen3-reranker:0.6b"
        ) from error


def _is_raw(activation: object) -> bool:
    """Whether scores stay as the model gives them: an activation of PyTorch's, by its name."""
    name = "Sigmoid" if activation is None else type(activation).__name__
    if name not in ("Sigmoid", "Identity"):
        raise BadOption(
            f"activation_fn={shown(activation)}: pass torch.nn.Sigmoid() or torch.nn.Identity(), "
            "or leave it out"
        )
    return name == "Identity"


def _pair(pair: object) -> tuple[str, str]:
    if not isinstance(pair, (list, tuple)):
        raise BadInput(f"a pair is {kind_of(pair)}; pass (query, document)")
    both = [*cast("Iterable[object]", pair)]
    if len(both) != 2 or not all(isinstance(each, str) for each in both):
        raise BadInput(f"a pair is {shown(cast('object', pair))}; pass two str")
    return cast("tuple[str, str]", (both[0], both[1]))
