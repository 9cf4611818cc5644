"""What of sentence-transformers' options has a meaning here, and the way out of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, NoReturn

from gguf_embed.errors import BadOption, shown
from gguf_embed.plan.settings import Settings

_KWARGS: Final = "say what is meant with settings=Settings(quant=..., n_ctx=..., flash_attn=...)"
_TRAIN: Final = "train the original weights with sentence-transformers, and convert them"
_TORCH: Final = "llama.cpp holds the weights; install sentence-transformers for PyTorch's modules"
_QUANT: Final = "choose the numbers of the weights by settings=Settings(quant='F16')"

# Options that there is another way for. What is None, False or empty asks for nothing.
_OPTIONS: Final[Mapping[str, str]] = {
    "modules": "a GGUF is all modules in one; sentence_transformers_module.py has one for the real "
    "package",
    "cache_folder": "models are kept where the Hub's own tools keep them; set HF_HOME",
    "local_files_only": "a file that is here is used anyway; set HF_HUB_OFFLINE=1 to fetch none",
    "token": "set HF_TOKEN",
    "use_auth_token": "set HF_TOKEN",
    "revision": "name the file with it: hf:owner/repo/file.gguf@revision",
    "backend": "llama.cpp is the backend; leave it out",
    "model_kwargs": _KWARGS,
    "config_kwargs": _KWARGS,
    "tokenizer_kwargs": _KWARGS,
    "processor_kwargs": _KWARGS,
    "automodel_args": _KWARGS,
    "model_card_data": "models/ holds the cards; leave it out",
    "num_labels": "a reranker gives one score for a pair; leave it out",
    "apply_softmax": "a reranker gives one score for a pair; leave it out",
    "num_workers": "one call uses all cores; leave it out",
}
_HARMLESS: Final = {"trust_remote_code": True, "backend": "torch", "num_labels": 1}

# Attributes and methods that there is another way for.
_ATTRIBUTES: Final[Mapping[str, str]] = {
    "tokenizer": "tokenize(texts) gives ids; embedder.count_tokens(texts) counts",
    "fit": _TRAIN,
    "old_fit": _TRAIN,
    "train": _TRAIN,
    "parameters": _TORCH,
    "named_parameters": _TORCH,
    "state_dict": _TORCH,
    "modules": _TORCH,
    "forward": _TORCH,
    "auto_model": _TORCH,
    "model": _TORCH,
    "config": _TORCH,
    "transformers_model": _TORCH,
    "half": _QUANT,
    "bfloat16": _QUANT,
    "float": _QUANT,
    "compile": "llama.cpp is compiled already; `gguf-embed tune` measures its fastest settings",
    "save": "the model is one file: embedder.path",
    "save_pretrained": "the model is one file: embedder.path",
    "save_to_hub": "the model is one file: embedder.path",
    "push_to_hub": "the model is one file: embedder.path",
    "evaluate": "`gguf-embed bench` measures quality; sentence_transformers_module.py runs a GGUF "
    "under the evaluators of the real package",
    "add_adapter": "merge the adapter into the weights, and convert them",
    "load_adapter": "merge the adapter into the weights, and convert them",
    "smart_batching_collate": "the engine packs texts by their tokens",
}


class NotHere(BadOption, AttributeError):
    """What the real package has: an AttributeError too, so that hasattr() says no."""


def refuse(what: str, given: Mapping[str, object]) -> None:
    """Refuse options that would have no effect. Raises BadOption."""
    for name, value in given.items():
        if name not in _OPTIONS and name not in _HARMLESS:
            raise BadOption(f"{what} has no {name!r} here; leave it out")
        if value and _HARMLESS.get(name) != value:
            raise BadOption(f"{name}={shown(value)}: {_OPTIONS[name]}")


def missing(what: str, name: str) -> NoReturn:
    """Say the way out for an attribute. Raises NotHere."""
    if name in _ATTRIBUTES:
        raise NotHere(f"{what} has no {name} here: {_ATTRIBUTES[name]}")
    raise AttributeError(f"{what!r} object has no attribute {name!r}")


def device_of(device: object) -> str:
    """ "cpu", or "cuda" for any GPU. Raises BadOption."""
    kind, _, number = str(device).lower().partition(":")
    if kind == "cpu":
        return "cpu"
    if kind in ("cuda", "mps", "xpu", "hip", "vulkan"):
        if number not in ("", "0"):
            raise BadOption(
                f"device={shown(device)}: the plan spreads a model over the GPUs that it sees; "
                "show it that one, such as by CUDA_VISIBLE_DEVICES"
            )
        return "cuda"
    raise BadOption(f"device={shown(device)}: choose 'cpu', 'cuda' or 'mps', or leave it out")


def settings_for(device: object, settings: Settings | None) -> Settings:
    """Settings with the layers on the device; without one the plan decides. Raises BadOption."""
    settings = settings or Settings()
    if device is None:
        return settings
    if settings.n_gpu_layers is not None:
        raise BadOption("device and Settings(n_gpu_layers=...) say the same; pass one of them")
    return replace(settings, n_gpu_layers=0 if device_of(device) == "cpu" else -1)
