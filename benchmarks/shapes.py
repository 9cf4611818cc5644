"""Random-weight GGUF files of real model shapes, for speed and memory where no weights are at hand.

    python benchmarks/shapes.py qwen3-embedding-0.6b DIR --vocab FILE.gguf --quant Q8_0 Q4_K_M

writes DIR/qwen3-embedding-0.6b-F16.gguf (kept: the other levels are quantized from it, by
llama.cpp) and one file per level. Any catalog model whose tensor layout is known will do. Speed
and memory depend on shapes and types, not on the values, as long as the values are ordinary:
weights are normal(0, 1/sqrt(fan_in)), so activations keep their size through the layers, and no
row repeats, so quantization has real work. Vectors mean nothing; two engines must still agree
on them.

`--vocab` copies the tokenizer of any GGUF, cut or padded with unused tokens to the model's own
vocabulary size. Without it a byte-level vocabulary is made: one token per byte, so texts are
about four times as many tokens as in reality.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from gguf_embed.catalog import catalog
from gguf_embed.gguf import layout
from gguf_embed.gguf.quants import FILE_TYPES
from gguf_embed.gguf.tensors import TensorInfo
from gguf_embed.native import quantizer
from gguf_embed.native.quantizer import QuantizeParams

CHUNK_ELEMENTS = 1 << 24  # random numbers made at a time: 64 MiB of float32
DTYPES = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def known() -> Mapping[str, catalog.ModelCard]:
    """The catalog's models whose tensors can be laid out, by id."""
    return {
        card.id: card
        for card in catalog.cards()
        if card.shape is not None and card.shape.architecture in layout.ARCHITECTURES
    }


def values(tensor: TensorInfo, rng: np.random.Generator) -> npt.NDArray[np.floating[Any]]:
    """The tensor's numbers, flat; made in chunks, so memory holds little more than the result."""
    mean, std = distribution(tensor)
    flat = np.empty(math.prod(tensor.shape), dtype=DTYPES[tensor.type])
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        part = flat[start : start + CHUNK_ELEMENTS]
        part[:] = rng.standard_normal(part.size, dtype=np.float32) * std + mean
    return flat


def distribution(tensor: TensorInfo) -> tuple[float, float]:
    """Mean and standard deviation that keep activations natural."""
    part = tensor.name.rpartition("blk.")[2].partition(".")[2].removesuffix(".weight")
    if part in ("attn_q_norm", "attn_k_norm"):
        return 1.4, 0.05  # attention peaked (logits of std 2) as in trained models, not a mean
    if tensor.name.endswith(".bias"):
        return 0.0, 0.02
    if len(tensor.shape) == 1:
        return 1.0, 0.05  # the scale of a norm
    match tensor.name:
        case "token_embd.weight":
            # Small against what the layers add: with last-token pooling every text ends in the
            # same token, whose own embedding must not drown what attention brings to it.
            return 0.0, 0.04
        case "position_embd.weight" | "token_types.weight":
            return 0.0, 0.02
        case _:
            return 0.0, 1 / math.sqrt(tensor.shape[0])


def copy_vocabulary(writer: gguf.GGUFWriter, source: Path, n_vocab: int) -> None:
    """Copy every `tokenizer.*` entry of `source`; token lists become exactly `n_vocab` long."""
    fields = gguf.GGUFReader(source).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    lost = sum(kind == gguf.TokenType.NORMAL for kind in types[n_vocab:])
    if lost:
        raise SystemExit(
            f"{source}: {len(types)} tokens, {lost} ordinary ones beyond the model's {n_vocab}; "
            "give the tokenizer of the same model family"
        )
    missing = range(len(types), n_vocab)
    padding: dict[str, Sequence[Any]] = {
        "tokenizer.ggml.tokens": [f"[UNUSED{i}]" for i in missing],
        "tokenizer.ggml.token_type": [int(gguf.TokenType.UNUSED) for _ in missing],
        "tokenizer.ggml.scores": [-1000.0 for _ in missing],
    }
    for key, field in fields.items():
        if not key.startswith("tokenizer."):
            continue
        value = field.contents()
        if key in padding:
            value = [*value, *padding[key]][:n_vocab]
        kind = field.types[0]
        writer.add_key_value(key, value, kind, field.types[1] if len(field.types) > 1 else None)


def make_vocabulary(writer: gguf.GGUFWriter, n_vocab: int, bos_id: int, eos_id: int) -> None:
    """A byte-level vocabulary: the 256 bytes, the begin and end tokens at their usual ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # GPT-2's byte alphabet: bytes that do not print are moved up to 0x100 and on.
    moved = range(0x100, 0x100 + 256 - len(printable))
    ordinary = [*map(chr, printable), *map(chr, moved), "th"]  # llama.cpp wants one merge
    names = [f"[UNUSED{i}]" for i in range(n_vocab)]
    types = [gguf.TokenType.UNUSED] * n_vocab
    names[bos_id], names[eos_id] = "[BEGIN]", "[END]"
    types[bos_id] = types[eos_id] = gguf.TokenType.CONTROL
    free = (i for i in range(n_vocab) if i not in (bos_id, eos_id))
    for i, name in zip(free, ordinary, strict=False):
        names[i], types[i] = name, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(eos_id)
    writer.add_pad_token_id(eos_id)


def described(
    card: catalog.ModelCard, file_type: gguf.LlamaFileType, *, vocab: Path | None, seed: int
) -> gguf.GGUFWriter:
    """A writer of the model's file that has all but the tensors."""
    shape = card.shape
    assert shape is not None, "known() offers no other"
    writer = gguf.GGUFWriter(None, shape.architecture)
    # Not the model's own name: no engine may take this file for the real one.
    writer.add_name(f"random-{card.id}")
    writer.add_description(f"random weights, seed {seed}, in the shape of {card.source_repo}")
    writer.add_file_type(file_type)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_pooling_type(gguf.PoolingType(card.pooling))
    writer.add_causal_attention(card.causal)
    if shape.architecture == "bert":
        writer.add_layer_norm_eps(1e-12)
    else:
        writer.add_head_count_kv(shape.n_head_kv)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_freq_base(1_000_000.0)
        writer.add_layer_norm_rms_eps(1e-6)
    if vocab is not None:
        copy_vocabulary(writer, vocab, shape.n_vocab)
    else:
        eos_id = shape.n_vocab - 1 if card.eos_id is None else card.eos_id
        bos_id = eos_id if card.bos_id is None else card.bos_id
        make_vocabulary(writer, shape.n_vocab, bos_id, eos_id)
    _set_ends(writer, card)
    if card.rerank_template is not None:
        writer.add_classifier_output_labels(["yes", "no"])
        text = card.rerank_template.replace("{task}", card.default_task or "")
        writer.add_chat_template([{"name": "rerank", "template": text}])
    return writer


def write_f16(card: catalog.ModelCard, out: Path, *, vocab: Path | None, seed: int) -> None:
    """Write the model's F16 file, one tensor in memory at a time; complete or not at all."""
    writer = described(card, gguf.LlamaFileType.MOSTLY_F16, vocab=vocab, seed=seed)
    assert card.shape is not None, "known() offers no other"
    wanted = layout.tensors(card.shape, "F16")
    for tensor in wanted:
        # gguf-py takes numpy's order of dimensions, ggml's reversed.
        dims, dtype = tensor.shape[::-1], DTYPES[tensor.type]
        writer.add_tensor_info(tensor.name, dims, dtype, tensor.n_bytes)
    partial = out.with_suffix(".part")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(seed))
    for tensor in wanted:
        writer.write_tensor_data(values(tensor, rng))
    writer.close()
    partial.replace(out)


def _set_ends(writer: gguf.GGUFWriter, card: catalog.ModelCard) -> None:
    """What the model puts around a text, in place of what the tokenizer's file says."""
    assert card.shape is not None
    entries = writer.kv_data[0]
    for key, wanted in (("add_bos_token", card.add_bos), ("add_eos_token", card.add_eos)):
        if wanted is not None:
            entries[f"tokenizer.ggml.{key}"] = gguf.GGUFValue(wanted, gguf.GGUFValueType.BOOL)
    if card.shape.architecture == "bert":
        entries["tokenizer.ggml.token_type_count"] = gguf.GGUFValue(
            card.shape.n_token_types, gguf.GGUFValueType.UINT32
        )


def quantize(source: Path, out: Path, quant: str, *, n_threads: int) -> None:
    """Quantize an F16 GGUF to `quant` with the installed llama.cpp; complete or not at all."""
    levels = FILE_TYPES.values()
    if quant not in levels:
        raise SystemExit(f"no quantization level {quant!r}; llama.cpp has {', '.join(levels)}")
    params = QuantizeParams(
        level=quant,
        token_embedding_type=None,
        output_type=None,
        pure=False,
        allow_requantize=False,
        dry_run=False,
        n_threads=n_threads,
        imatrix={},
        metadata={},
    )
    partial = out.with_suffix(".part")
    quantizer.quantize(source, partial, params, _show_warning)
    partial.replace(out)


def _show_warning(line: str) -> None:
    if "warning" in line.lower():  # the rest is a line per tensor
        print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    cards = known()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=sorted(cards), metavar="MODEL", help=", ".join(cards))
    parser.add_argument("directory", type=Path, help="where MODEL-LEVEL.gguf files are written")
    parser.add_argument("--vocab", type=Path, help="GGUF whose tokenizer is copied")
    parser.add_argument("--quant", nargs="*", default=[], metavar="LEVEL", help="e.g. Q8_0 Q4_K_M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for quantizing")
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    source = args.directory / f"{args.model}-F16.gguf"
    if source.exists():
        print(f"{source}: kept as it is")
    else:
        start = time.perf_counter()
        write_f16(cards[args.model], source, vocab=args.vocab, seed=args.seed)
        _report(source, start)
    for quant in args.quant:
        if quant != "F16":
            out = args.directory / f"{args.model}-{quant}.gguf"
            start = time.perf_counter()
            quantize(source, out, quant, n_threads=args.threads)
            _report(out, start)


def _report(path: Path, start: float) -> None:
    seconds = time.perf_counter() - start
    print(f"{path}: {path.stat().st_size:,} bytes in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
