"""A model file is tried in a child process before this process loads it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny

from gguf_embed import Embedder, Settings
from gguf_embed.engine import proof
from gguf_embed.engine.proof import ProofSettings, prove
from gguf_embed.engine.trial import FAULT_VARIABLE
from gguf_embed.errors import BadModelFile, NativeFailed
from gguf_embed.system import paths
from gguf_embed.system.child import Worker
from gguf_embed.vectors import Pooling

pytestmark = pytest.mark.native

CAUSAL = ProofSettings(
    pooling=Pooling.LAST, causal=True, encoder=False, n_ctx=256, n_threads=1, end_token=None
)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.write_qwen3(tmp_path / "qwen3.gguf").path


def overwrite(path: Path, tensor: str, value: float) -> None:
    """Make every number of one tensor the same."""
    reader = gguf.GGUFReader(path, "r+")
    (found,) = (each for each in reader.tensors if each.name == tensor)
    found.data[:] = value
    reader.data.flush()


def kept() -> list[Path]:
    return sorted((paths.home() / "proof").glob("*"))


def no_child(*_: object, **__: object) -> Worker:
    raise AssertionError("a child was started")


def test_a_file_is_proved_once(path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    prove(path, CAUSAL, on_status=said.append)
    assert len(said) == 1
    assert said[0].startswith("proved qwen3.gguf in a child process, once: ")
    monkeypatch.setattr(proof, "trier", no_child)
    prove(path, CAUSAL, on_status=said.append)
    prove(path, replace(CAUSAL, n_ctx=64, n_threads=2))  # sizes are not ways to run
    assert len(said) == 1


@pytest.mark.parametrize("change", ["touch", "copy", "way", "gpu"])
def test_another_file_or_way_to_run_is_proved_anew(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    monkeypatch.setattr(proof, "_SMALL_BYTES", 0)
    on_a_gpu = replace(CAUSAL, n_gpu_layers=1, gpus=("Fake GPU 3000",))
    for settings in (on_a_gpu, CAUSAL):  # without a GPU here, layers stay where they are
        prove(path, settings)
    if change == "touch":
        os.utime(path, ns=(1, 1))
    elif change == "copy":
        (tmp_path / "copy.gguf").write_bytes(path.read_bytes())
        path = tmp_path / "copy.gguf"
    elif change == "gpu":
        settings = replace(on_a_gpu, gpus=("Fake GPU 4000",))
    else:
        settings = replace(CAUSAL, flash_attn=False)
    monkeypatch.setattr(proof, "trier", no_child)
    with pytest.raises(AssertionError, match="a child was started"):
        prove(path, settings)


def test_a_small_file_is_its_bytes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prove(path, CAUSAL)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(proof, "trier", no_child)
        prove(copy, CAUSAL)
    overwrite(copy, "output_norm.weight", 0)
    with pytest.raises(BadModelFile, match="length 0"):
        prove(copy, CAUSAL)
    prove(path, CAUSAL)


@pytest.mark.parametrize("stage", ["load", "tokenize", "decode", "tap"])
def test_a_crash_is_the_file_s_and_kept(path: Path, monkeypatch: pytest.MonkeyPatch, stage: str):
    monkeypatch.setenv(FAULT_VARIABLE, f"{stage}:SIGSEGV")
    with pytest.raises(BadModelFile, match=r"qwen3.gguf: llama.cpp dies when it .* \(SIGSEGV\)"):
        prove(path, CAUSAL)
    monkeypatch.delenv(FAULT_VARIABLE)
    with pytest.raises(BadModelFile, match="SIGSEGV"):
        prove(path, CAUSAL)


def test_a_kill_is_not_the_file_s(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FAULT_VARIABLE, "decode:SIGKILL")
    with pytest.raises(NativeFailed, match=r"not proved safe to load: .* SIGKILL; see that memory"):
        prove(path, CAUSAL)
    assert kept() == []
    monkeypatch.delenv(FAULT_VARIABLE)
    prove(path, CAUSAL)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, '{"verdict": 1}', "\x00"])
def test_a_kept_proof_that_is_none_is_made_anew(path: Path, text: str):
    prove(path, CAUSAL)
    (file,) = kept()
    right = file.read_text()
    file.write_text(text)
    prove(path, CAUSAL)
    assert file.read_text() == right


def test_a_proof_of_another_file_under_that_name_does_not_count(path: Path):
    prove(path, CAUSAL)
    (file,) = kept()
    right = json.loads(file.read_text())
    wrong: dict[str, Any] = {**right, "verdict": "planted"}
    file.write_text(json.dumps({**wrong, "of": {**right["of"], "n_bytes": 1}}))
    prove(path, CAUSAL)
    assert json.loads(file.read_text()) == right


def test_vectors_of_length_0_are_refused(path: Path):
    overwrite(path, "output_norm.weight", 0)
    with pytest.raises(BadModelFile, match=f"vectors of length 0 for ordinary text{NEXT}"):
        prove(path, CAUSAL)


def test_nan_is_refused(path: Path):
    overwrite(path, "output_norm.weight", float("nan"))
    with pytest.raises(BadModelFile, match=f"it gives NaN, .* ordinary text{NEXT}"):
        prove(path, CAUSAL)


def test_one_vector_for_all_texts_is_refused(path: Path):
    overwrite(path, "token_embd.weight", 0.125)
    with pytest.raises(BadModelFile, match=f"different texts the same vector{NEXT}"):
        prove(path, CAUSAL)


ENCODER = replace(CAUSAL, causal=False, encoder=True, n_ctx=128, tap=False)


@pytest.mark.parametrize("pooling", [Pooling.CLS, Pooling.MEAN, Pooling.LAST])
def test_texts_that_only_their_positions_tell_apart_are_refused(tmp_path: Path, pooling: Pooling):
    """A BERT that knows no word gives texts of different lengths different vectors."""
    path = tiny.write_bert(tmp_path / "bert.gguf", pooling=pooling).path
    prove(path, replace(ENCODER, pooling=pooling))
    overwrite(path, "token_embd.weight", 0)
    with pytest.raises(BadModelFile, match="different texts the same vector; fetch the file again"):
        prove(path, replace(ENCODER, pooling=pooling))


def test_a_reranker_with_one_score_for_all_is_refused(tmp_path: Path):
    path = tiny.write_qwen3_reranker(tmp_path / "rank.gguf").path
    settings = replace(CAUSAL, pooling=Pooling.RANK)
    prove(path, settings)
    overwrite(path, "cls.output.weight", 0)
    with pytest.raises(BadModelFile, match="different texts the same score; fetch the file again"):
        prove(path, settings)


NEXT = "; fetch the file again or take another quantization .*, report it"


def test_a_vocabulary_that_knows_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    add = gguf.GGUFWriter.add_token_list

    def foreign(self: gguf.GGUFWriter, tokens: list[str]) -> None:
        add(self, [f"\u0f00{i}" for i in range(len(tokens))])

    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", foreign)
    path = tiny.write_qwen3(tmp_path / "m.gguf").path
    with pytest.raises(BadModelFile, match=f"the same token ids{NEXT}"):
        prove(path, CAUSAL)


def test_a_token_that_is_there_twice_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The check of the header does not read the vocabulary; the proof does, before it loads."""
    add = gguf.GGUFWriter.add_token_list

    def twice(self: gguf.GGUFWriter, tokens: list[str]) -> None:
        add(self, [*tokens[:-1], tokens[0]])

    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", twice)
    path = tiny.write_qwen3(tmp_path / "ü.gguf").path
    with pytest.raises(BadModelFile, match=r"tokens holds '.*' twice, as 0 and ") as e:
        prove(path, CAUSAL)
    assert str(e.value).count("gguf: ") == 1


def test_a_vocabulary_that_aborts_is_refused(tmp_path: Path):
    """llama.cpp asserts that no word of this pre-tokenizer has a blank in it; texts have."""
    path = tiny.write_qwen3(tmp_path / "m.gguf", pre="whitespace").path
    with pytest.raises(BadModelFile, match=r"tokenizes with it \(SIGABRT \(.*GGML_ASSERT\(") as e:
        prove(path, CAUSAL)
    assert "fetch it again" in str(e.value)


class Scripted(Worker):
    """A child that says what it is told to, and has ended by itself."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        super().__init__("nothing")
        self.said = answers

    def answers(self, job: object, *, timeout_s: float) -> Iterator[dict[str, Any]]:
        yield from self.said


PROVED = ({"stage": "load"}, {"stage": "decode"}, {"verdict": ""}, {"stage": "accelerator"})


@pytest.mark.parametrize(
    ("answers", "n_calls"),
    [
        ((*PROVED, {"accelerator": ""}, {"verdict": ""}), 1),
        ((*PROVED, {"accelerator": "other bits"}, {"verdict": ""}), 1),
        ((*PROVED[:2], {"verdict": "no vectors"}), 0),
        ((*PROVED[:2], {"verdict": ""}), 0),  # nothing is tried besides: there is no time to use
        ((*PROVED[:2], PROVED[3]), 0),
    ],
)
def test_what_is_safe_to_load_is_told_after_the_verdict(
    path: Path, answers: tuple[dict[str, Any], ...], n_calls: int
):
    calls: list[str] = []
    with suppress(BadModelFile, NativeFailed):
        prove(path, CAUSAL, on_safe=lambda: calls.append("safe"), worker=Scripted(*answers))
    assert len(calls) == n_calls


@pytest.mark.parametrize("n_ctx", [1, 2, 3, 5])
def test_a_context_of_few_tokens_is_proved_too(path: Path, n_ctx: int):
    prove(path, replace(CAUSAL, n_ctx=n_ctx))


def test_opening_proves_first(path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    with Embedder.open(path, settings=Settings(tune=False), on_status=said.append):
        pass
    assert [line for line in said if line.startswith("proved qwen3.gguf")]
    monkeypatch.setenv(FAULT_VARIABLE, "decode:SIGABRT")
    path = tiny.write_qwen3(path, pooling=Pooling.MEAN).path
    with pytest.raises(BadModelFile, match="SIGABRT"):
        Embedder.open(path, settings=Settings(tune=False))


def test_the_built_in_model_is_proved_like_any_other():
    said: list[str] = []
    with Embedder.open(settings=Settings(tune=False), on_status=said.append):
        pass
    assert [line for line in said if line.startswith("proved all-minilm-l6-v2")]
