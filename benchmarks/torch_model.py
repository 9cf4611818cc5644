"""The same Qwen3 weights for sentence-transformers: a GGUF in F16 or F32 -> a model directory.

    python benchmarks/torch_model.py qwen3-embedding-0.6b-F16.gguf DIR
    python benchmarks/peers.py qwen3-embedding-0.6b-Q8_0.gguf --st-model DIR ...

Weights, tokenizer, last-token pooling and normalization are those of the GGUF, so the vectors of
both can be compared. Only for Qwen3: for MiniLM and the like use the original model directory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch  # pyright: ignore[reportMissingImports]
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # pyright: ignore[reportMissingImports]
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model  # pyright: ignore[reportMissingImports]

# llama.cpp's name of a tensor in a layer -> transformers'
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What sentence-transformers runs, one after the other.
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(
        [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    )
]
# How Qwen2 and Qwen3 tokenizers split text before BPE (tokenizer.json of the original models).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_model(reader: gguf.GGUFReader) -> Qwen3Model:
    """The model with the file's weights, in float16."""

    def value(key: str) -> Any:
        return reader.fields[f"qwen3.{key}"].contents()

    weights = {_name(t.name): torch.from_numpy(t.data.copy()) for t in reader.tensors}
    config = Qwen3Config.from_dict(
        {
            "vocab_size": len(weights["embed_tokens.weight"]),
            "hidden_size": value("embedding_length"),
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": value("attention.head_count"),
            "num_key_value_heads": value("attention.head_count_kv"),
            "head_dim": value("attention.key_length"),
            "max_position_embeddings": value("context_length"),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
            "rope_theta": value("rope.freq_base"),
            "tie_word_embeddings": True,
        }
    )
    with torch.device("meta"):
        model = Qwen3Model(config)
    model.load_state_dict({k: w.to(torch.float16) for k, w in weights.items()}, assign=True)
    return model


def _name(name: str) -> str:
    whole = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{IN_LAYER[part]}.{kind}"


def read_tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """The file's byte-level BPE, with its end token appended to every text."""

    def value(key: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    tokens: list[str] = value("tokens")
    merges = [tuple(merge.split(" ")) for merge in value("merges")]
    end_id: int = value("eos_token_id")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    end = tokens[end_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, end_id)]
    )
    # Padding on the left: the last column is then every text's last token.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=end, eos_token=end, padding_side="left"
    )


def convert(source: Path, directory: Path) -> None:
    """Write a sentence-transformers directory with the weights and tokenizer of `source`."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    types = {t.tensor_type.name for t in reader.tensors}
    if architecture != "qwen3" or not types <= {"F16", "F32"}:
        raise SystemExit(
            f"{source}: architecture {architecture}, types {', '.join(sorted(types))}; "
            "needed: qwen3 in F16 or F32"
        )
    model = read_model(reader)
    model.save_pretrained(directory)
    read_tokenizer(reader).save_pretrained(directory)
    pooling = {"word_embedding_dimension": model.config.hidden_size, "pooling_mode": "lasttoken"}
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "modules.json").write_text(json.dumps(MODULES, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="GGUF in F16 or F32")
    parser.add_argument("directory", type=Path, help="where the model directory is written")
    args = parser.parse_args(argv)
    convert(args.source, args.directory)
    print(args.directory)


if __name__ == "__main__":
    main()
