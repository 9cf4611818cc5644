"""The files of a model, as far as memory depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from gguf_embed.catalog.card import ModelCard, ModelFile
from gguf_embed.errors import BadModelFile, BadOption
from gguf_embed.gguf import layout, quants
from gguf_embed.gguf.header import ENCODERS, Header
from gguf_embed.gguf.layout import Shape
from gguf_embed.gguf.tensors import TensorInfo
from gguf_embed.plan.mode import EmbedMode, layers_pooling
from gguf_embed.plan.settings import Settings
from gguf_embed.vectors import Pooling

# Looked up by token: llama.cpp keeps them in RAM (LLM_TENSOR_LAYER_INPUT in src/llama-arch.cpp).
_INPUTS: Final = ("token_embd", "position_embd", "token_types")
# Encoders that load the token table a second time as an output, like decoders.
_ENCODERS_WITH_OUTPUT: Final = frozenset({"dream", "gemma-embedding", "llada"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One GGUF of a model, on this machine or not: all that its memory depends on."""

    model: str
    quant: str
    file: ModelFile | None  # None: a local file, or one that would have to be made
    shape: Shape
    mode: EmbedMode
    input_bytes: int  # tables that stay in RAM whatever the device
    layer_bytes: tuple[int, ...]
    output_bytes: int  # on a GPU, with the copy of the token table where that is the output
    output_copy_bytes: int  # that copy: RAM has none
    largest_bytes: int  # of one tensor in the layers
    gated: bool  # the feed-forward part has a gate
    n_masks: int
    on_disk: bool = False  # its file is on this machine

    def as_asked(self, settings: Settings) -> Variant:
        """Pooled and run as the user wants it."""
        mode = self.mode
        pooling = mode.pooling if settings.pooling is None else settings.pooling
        causal = mode.causal if settings.causal is None else settings.causal
        causal = causal and not mode.encoder
        return replace(self, mode=replace(mode, pooling=pooling, causal=causal))


def variants_of(card: ModelCard, *, any_quant: bool = False) -> tuple[Variant, ...]:
    """One for each file of the card; with `any_quant` for each quantization that can be made.

    Raises BadOption where the architecture's tensor table is not known: use `variant_of` with the
    headers of its files.
    """
    if card.shape is None:
        raise BadOption(f"{card.id}: its shape is not known; read the header of one of its files")
    files = {file.quant: file for file in reversed(card.files)}
    names = layout.QUANTS if any_quant else sorted(files, key=quants.rank)
    return tuple(
        _variant_of_shape(card.id, quant, files.get(quant), card.shape, card.pooling, card.causal)
        for quant in names
    )


@lru_cache(maxsize=256)  # a plan asks again for each of its machines and settings
def _variant_of_shape(
    model: str, quant: str, file: ModelFile | None, shape: Shape, pooling: Pooling, causal: bool
) -> Variant:
    return _variant(
        model=model,
        quant=quant,
        file=file,
        shape=shape,
        pooling=pooling,
        causal=causal,
        tensors=layout.tensors(shape, quant),
        n_masks=1,
    )


def variant_of(
    header: Header, *, card: ModelCard | None = None, file: ModelFile | None = None
) -> Variant:
    """The variant that a GGUF's header describes. Raises BadModelFile."""
    n_window = header.metadata.get(f"{header.architecture}.attention.sliding_window")
    return _variant(
        model=card.id if card else header.name or header.source,
        quant=header.quant,
        file=file,
        shape=layout.shape_of(header),
        pooling=card.pooling if card else header.pooling or Pooling.MEAN,
        causal=card.causal if card else header.causal,
        tensors=header.tensors,
        n_masks=2 if n_window else 1,
    )


def _variant(
    *,
    model: str,
    quant: str,
    file: ModelFile | None,
    shape: Shape,
    pooling: Pooling,
    causal: bool,
    tensors: Sequence[TensorInfo],
    n_masks: int,
) -> Variant:
    input_bytes = output_bytes = token_embd_bytes = largest_bytes = 0
    layer_bytes = [0] * shape.n_layer
    names: set[str] = set()
    for tensor in tensors:
        part, _, rest = tensor.name.partition(".")
        names.add(rest.partition(".")[2] if part == "blk" else tensor.name)
        if part == "blk":
            number = rest.partition(".")[0]
            if not number.isdecimal() or int(number) >= shape.n_layer:
                raise BadModelFile(f"{model}: {tensor.name} is beyond its {shape.n_layer} layers")
            layer_bytes[int(number)] += tensor.n_bytes
            largest_bytes = max(largest_bytes, tensor.n_bytes)
        elif part.startswith(_INPUTS):
            input_bytes += tensor.n_bytes
            token_embd_bytes += tensor.n_bytes if tensor.name == "token_embd.weight" else 0
        else:
            output_bytes += tensor.n_bytes
    encoder = shape.architecture in ENCODERS
    has_output = not encoder or shape.architecture in _ENCODERS_WITH_OUTPUT
    copy_bytes = token_embd_bytes if has_output and "output.weight" not in names else 0
    return Variant(
        model=model,
        quant=quant,
        file=file,
        shape=shape,
        mode=EmbedMode(
            pooling=layers_pooling(pooling, encoder=encoder),
            causal=causal and not encoder,
            encoder=encoder,
        ),
        input_bytes=input_bytes,
        layer_bytes=tuple(layer_bytes),
        output_bytes=output_bytes + copy_bytes,
        output_copy_bytes=copy_bytes,
        largest_bytes=largest_bytes,
        # ModernBERT and others have gate and up in one tensor.
        gated="ffn_gate.weight" in names or shape.architecture in ("modern-bert", "neo-bert"),
        n_masks=n_masks,
    )
