"""transformers' models with the weights of tiny models; one text at a time, no padding.

transformers has no class for nomic-bert-moe. Its network is made here of transformers' parts: the
encoder of Jina Embeddings v3, which has the same layers, with a mixture of its feed-forward layers
in every second one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny import Array, Pooling, TinyModel

_CLASSES = {
    "bert": "Bert",
    "eurobert": "EuroBert",
    "gemma3_text": "Gemma3Text",
    "llama": "Llama",
    "modernbert": "ModernBert",
    "nomic-bert-moe": "JinaEmbeddingsV3",
    "nomic_bert": "NomicBert",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "xlm-roberta": "XLMRoberta",
}
_WITH_POOLER = {"bert", "xlm-roberta", "nomic_bert", "nomic-bert-moe"}
# Some layers see a part of the text only: transformers makes these masks itself.
_WINDOWED = {"modernbert", "gemma3_text"}


class Network:
    """transformers' model with the weights of a tiny model."""

    def __init__(self, model: TinyModel) -> None:
        import torch
        import transformers

        settings = dict(model.config)
        self.kind = str(settings.pop("model_type"))
        name = _CLASSES[self.kind]
        config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
        extra = {"add_pooling_layer": False} if self.kind in _WITH_POOLER else {}
        self.network = getattr(transformers, f"{name}Model")(config, **extra)
        if self.kind == "nomic-bert-moe":
            for layer in self.network.layers[1::2]:
                layer.mlp = mixture(layer.mlp, settings)
        self.network.eval()
        state = {name: torch.from_numpy(weight) for name, weight in model.weights.items()}
        # strict: no weight is left at its random start, and none is unknown.
        self.network.load_state_dict(state, strict=True)
        self.causal = bool(settings.get("is_causal", False))
        self.first_position = 2 if self.kind == "xlm-roberta" else 0
        self.model = model

    def embed(
        self,
        ids: Sequence[int],
        *,
        positions: Sequence[int] | None = None,
        causal: bool | None = None,
    ) -> Array:
        """The pooled vector (dim,) of one text; `positions` count from 0."""
        return self._pool(self.hidden(ids, positions=positions, causal=causal))

    def hidden(
        self,
        ids: Sequence[int],
        *,
        positions: Sequence[int] | None = None,
        causal: bool | None = None,
    ) -> NDArray[np.float32]:
        """The vector of each token, shape (n, dim)."""
        import torch

        n = len(ids)
        if positions is None:
            positions = range(n)
        with torch.no_grad():
            hidden = self.network(
                input_ids=torch.tensor([list(ids)]),
                attention_mask=self._mask(n, causal),
                position_ids=torch.tensor([[self.first_position + p for p in positions]]),
            ).last_hidden_state[0]
        return hidden.numpy()

    def _mask(self, n: int, causal: bool | None) -> Any:
        """An explicit mask over (batch, head, query, key), so that nothing is left to a default,
        but where layers differ: None lets transformers make the two that the model has.
        """
        import torch

        if causal is None and self.kind in _WINDOWED:
            return None
        causal = self.causal if causal is None else causal
        blocked = torch.full((n, n), torch.finfo(torch.float32).min)
        mask = torch.triu(blocked, diagonal=1) if causal else torch.zeros((n, n))
        mask = mask[None, None]
        if self.kind in _WINDOWED:
            return {"full_attention": mask, "sliding_attention": mask}
        return mask

    def _pool(self, hidden: NDArray[np.float32]) -> Array:
        match self.model.pooling:
            case Pooling.MEAN:
                pooled = hidden.mean(axis=0)
            case Pooling.CLS:
                pooled = hidden[0]
            case Pooling.LAST:
                pooled = hidden[-1]
            case Pooling.RANK:
                return self._probabilities(hidden[-1])
            case other:
                raise ValueError(f"no reference for pooling {other}")
        for dense in self.model.dense:
            pooled = dense @ pooled
        return pooled / np.linalg.norm(pooled)

    def _probabilities(self, last: Array) -> Array:
        """Softmax over the logits of "yes" and "no" of the tied head: (2,)."""
        head = self.model.weights["embed_tokens.weight"]
        vocab = self.model.tokenizer["model"]["vocab"]
        logits = head[[vocab["yes"], vocab["no"]]] @ last
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()


def mixture(mlp: Any, settings: Mapping[str, Any]) -> Any:
    """Some layers like `mlp`, of which each token takes the best, weighted by their probability.

    Probabilities are over all of them and are not made to sum to 1 over those taken.
    """
    import torch
    from torch import nn

    n_experts, n_used = settings["num_experts"], settings["num_experts_per_tok"]

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(settings["hidden_size"], n_experts, bias=False)
            self.experts = nn.ModuleList(type(mlp)(mlp.config) for _ in range(n_experts))
            for expert in self.experts:
                expert.fc1.bias = expert.fc2.bias = None

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            shares = self.gate(hidden).softmax(dim=-1)
            best, which = shares.topk(n_used, dim=-1)
            if settings.get("norm_topk_prob"):
                best = best / best.sum(dim=-1, keepdim=True)
            used = torch.zeros_like(shares).scatter(-1, which, best)
            outputs = torch.stack([expert(hidden) for expert in self.experts], dim=-1)
            return (outputs * used[..., None, :]).sum(dim=-1)

    return Mixture()
