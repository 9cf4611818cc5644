"""The corridor from a name to a backend: what decides the vectors, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Write

from gguf_embed.catalog import catalog
from gguf_embed.engine import embedder as embedder_module
from gguf_embed.engine import loaded, opening, proof, proved, runner, tune
from gguf_embed.engine.ahead import Ahead
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import open_file, open_model
from gguf_embed.errors import BadModelFile, BadOption
from gguf_embed.gguf.header import read_header
from gguf_embed.gguf.quants import tolerance
from gguf_embed.machine import selftest
from gguf_embed.native.context import Context
from gguf_embed.native.model import Model
from gguf_embed.plan.mode import EmbedMode, SpecialTokens, embed_mode, special_tokens
from gguf_embed.plan.settings import Settings
from gguf_embed.store import download
from gguf_embed.vectors import Pooling, least_cosine

QUICK = Settings(tune=False, n_threads=1)
CAT = "the cat sat on the mat"


# -------------------------------------------------------------------- what decides the vectors


def without(path: Path, *keys: str) -> Path:
    """The file without some of its metadata: the keys get names that nobody reads."""
    raw = path.read_bytes()
    for key in keys:
        assert raw.count(key.encode()) == 1
        raw = raw.replace(key.encode(), key[:-5].encode() + b"_none")
    target = path.with_name(f"bare-{path.name}")
    target.write_bytes(raw)
    return target


@pytest.mark.branches
def test_what_the_catalog_says_of_special_tokens_holds_for_every_pooling(tiny_model: Write):
    """An XLM-R file without the flags, opened as bge-m3, which is pooled by its first token."""
    whole = tiny_model("xlmr")
    bare = without(whole, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    card = catalog.find("bge-m3")
    assert card is not None
    with Embedder(open_file(whole, card, QUICK)) as embedder:
        ids, vector = embedder.tokenize(CAT), embedder.encode(CAT)
    assert (ids[0], ids[-1]) == (0, 2)
    with Embedder(open_file(bare, card, QUICK)) as embedder:
        assert embedder.tokenize(CAT) == ids
        assert embedder.tokenize("") == [0, 2]
        np.testing.assert_array_equal(embedder.encode(CAT), vector)
        cut = embedder.encode(" ".join([CAT] * 99), truncate="end")
        assert np.isfinite(cut).all()


def test_special_tokens_as_values(tiny_model: Write):
    header = read_header(tiny_model("qwen3"))
    last = EmbedMode(pooling=Pooling.LAST, causal=True, encoder=False)
    card = catalog.find("bge-m3")
    assert card is not None
    assert special_tokens(header, None, last) == SpecialTokens(last=header.eos_id)
    assert special_tokens(header, None, replace(last, pooling=Pooling.MEAN)) == SpecialTokens()
    no_end = replace(header, metadata={**header.metadata, "tokenizer.ggml.add_eos_token": False})
    assert special_tokens(no_end, None, last) == SpecialTokens()
    assert special_tokens(no_end, card, last) == SpecialTokens(first=0, last=2)
    assert special_tokens(no_end, replace(card, add_eos=False), last) == SpecialTokens(first=0)
    assert special_tokens(header, replace(card, add_bos=None), last) == SpecialTokens(last=2)
    beyond = replace(card, bos_id=header.n_vocab, eos_id=header.n_vocab)
    assert special_tokens(header, beyond, last) == SpecialTokens()


@pytest.mark.branches
def test_the_user_says_how_attention_runs(tiny_model: Write):
    """A file that does not say that its model is bidirectional, and nobody knows it."""
    said = tiny_model("qwen2_bidirectional")
    silent = tiny_model("qwen2_bidirectional", causal_key=False)
    with Embedder.open(said, settings=QUICK) as embedder:
        expected = embedder.encode(CAT)
    with Embedder.open(silent, settings=QUICK) as embedder:
        assert least_cosine(expected[None], embedder.encode([CAT])) < 0.99
    with Embedder.open(silent, settings=replace(QUICK, causal=False)) as embedder:
        np.testing.assert_array_equal(embedder.encode(CAT), expected)
        assert not embedder.mode.causal
    with pytest.raises(BadOption, match=r"causal=True: .* never runs causally"):
        open_model(tiny_model("bert"), replace(QUICK, causal=True))
    header = read_header(tiny_model("qwen3"))
    known = replace(header, metadata={**header.metadata, "general.architecture": "llama-embed"})
    assert not known.causal
    assert header.causal


@pytest.mark.branches
@pytest.mark.parametrize("pooling", [None, *Pooling])
def test_a_reranker_is_no_embedder_however_it_is_pooled(pooling: Pooling | None, tiny_model: Write):
    path = tiny_model("qwen3_reranker")
    asked = replace(QUICK, pooling=pooling)
    with pytest.raises(BadModelFile, match="a reranker scores pairs"):
        open_model(path, asked)
    # By its head, where its metadata were lost.
    header = read_header(path)
    assert header.tensor("cls.output.weight")
    lost = {k: v for k, v in header.metadata.items() if not k.endswith("pooling_type")}
    with pytest.raises(BadModelFile, match=r"rerank|pooling"):
        embed_mode(replace(header, metadata=lost), None, asked)
    with pytest.raises(BadModelFile, match="a reranker scores pairs"):
        embed_mode(replace(header, metadata=lost), None, Settings(pooling=Pooling.LAST))


def test_nan_is_no_agreement():
    right = np.eye(3, 8, dtype=np.float32)
    assert least_cosine(right, right) == 1
    for spoilt in (np.nan, np.inf, 0.0):
        wrong = right.copy()
        wrong[1] = spoilt
        assert not least_cosine(right, wrong) >= tolerance(["Q4_K"])
    assert tolerance(["F32", "F16"]) > tolerance(["F32", "Q4_K"])
    assert tolerance((), same_kernels=True) > tolerance(["F32"])


# ---------------------------------------------------------------------------- nothing left behind


class Planted(Exception):
    """A fault of a test."""


def fail(*_: object, **__: object) -> Any:
    raise Planted


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Models and contexts that were made and not closed."""
    alive: list[object] = []

    def watch(kind: Any) -> None:
        make, close = kind.__init__, kind.close

        def made(self: Any, *args: Any, **choices: Any) -> None:
            make(self, *args, **choices)
            alive.append(self)

        def closed(self: Any) -> None:
            close(self)
            alive[:] = [each for each in alive if each is not self]

        monkeypatch.setattr(kind, "__init__", made)
        monkeypatch.setattr(kind, "close", closed)

    watch(Model)
    watch(Context)
    return alive


def second_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two try the tap."""
    made: list[Context] = []

    def context(*args: Any, **how: Any) -> Context:
        if len(made) == 3:
            raise Planted
        made.append(Context(*args, **how))
        return made[-1]

    monkeypatch.setattr(runner, "Context", context)


STEPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "choose": lambda patch: patch.setattr(opening, "choose", fail),
    "check": lambda patch: patch.setattr(opening, "embed_mode", fail),
    "fetch": lambda patch: patch.setattr(download, "fetch", fail),
    "self-test": lambda patch: patch.setattr(selftest, "check", fail),
    "proof": lambda patch: patch.setattr(proof, "prove", fail),
    "the settings": lambda patch: patch.setattr(loaded, "best_run", fail),
    "the tap": lambda patch: patch.setattr(loaded, "tap_works", fail),
    "planning without the tap": lambda patch: (
        patch.setattr(loaded, "tap_works", lambda *_: False),
        patch.setattr(proved.Proved, "without_tap", fail),
    )[0],
    "a context": second_context,
    "the tokenizer": lambda patch: patch.setattr(loaded, "Tokenizer", fail),
    "the backend": lambda patch: patch.setattr(loaded, "limits_of", fail),
    "the remarks": lambda patch: patch.setattr(opening.Opened, "of", fail),
    "the embedder": lambda patch: patch.setattr(embedder_module, "Lifetime", fail),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_nothing_behind(
    step: str,
    tiny_model: Write,
    alive: list[object],
    monkeypatch: pytest.MonkeyPatch,
):
    STEPS[step](monkeypatch)
    with pytest.raises(Planted):
        Embedder.open(tiny_model("qwen3"), settings=replace(QUICK, n_contexts=2))
    assert alive == []


def test_a_measurement_that_fails_leaves_nothing_behind(
    tiny_model: Write, alive: list[object], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tune, "_texts", fail)
    target = opening.prove_model(tiny_model("qwen3"), Settings()).target
    with pytest.raises(Planted):
        tune.tune(target, budget_s=0.01)
    assert alive == []


def test_what_is_opened_is_closed_with_it(tiny_model: Write, alive: list[object]):
    with Embedder.open(tiny_model("qwen3"), settings=QUICK) as embedder:
        embedder.encode(CAT)
        assert alive
    assert alive == []
    opened = open_model(tiny_model("bert"), QUICK)
    assert alive
    opened.close()
    assert alive == []


def test_what_is_loaded_ahead_is_taken_or_freed(tiny_model: Write, alive: list[object]):
    path = tiny_model("qwen3")
    with Ahead() as ahead:
        assert ahead.take(n_gpu_layers=0, repack=False) is None  # not begun
        ahead.begin(path, read_header(path))
        assert ahead.words() is None  # llama.cpp's own tokenizer
        assert ahead.take(n_gpu_layers=0, repack=True) is None  # it lies otherwise
        assert ahead.take(n_gpu_layers=1, repack=False) is None
        model = ahead.take(n_gpu_layers=0, repack=False)
        assert model is not None
        assert ahead.take(n_gpu_layers=0, repack=False) is None  # it was given away
    assert alive == [model]
    model.close()
    with Ahead() as ahead:
        ahead.begin(path, read_header(path))
    assert alive == []
    with Ahead() as ahead:
        ahead.begin(path.with_name("none.gguf"), read_header(path))
        assert ahead.take(n_gpu_layers=0, repack=False) is None  # whoever loads it says why


def test_what_is_loaded_ahead_of_a_proof_that_fails_is_freed(
    tiny_model: Write, alive: list[object], monkeypatch: pytest.MonkeyPatch
):
    def prove(*_: object, on_safe: Callable[[], None], **__: object) -> None:
        on_safe()
        while not alive:  # the weights are loaded by another thread
            time.sleep(0.01)
        raise Planted

    monkeypatch.setattr(proof, "prove", prove)
    with pytest.raises(Planted):
        Embedder.open(tiny_model("qwen3"), settings=QUICK)
    assert alive == []


@pytest.mark.native
def test_the_child_that_proves_starts_before_the_engine_is_imported(tmp_path: Path):
    """On a machine that is new; of it depends how long the first vector takes."""
    code = """
import subprocess, sys
from gguf_embed import Embedder

class Started(Exception):
    pass

def refuse(*_, **__):
    print("gguf_embed.engine.opening" in sys.modules)
    raise Started

subprocess.Popen.__init__ = refuse
try:
    Embedder.open()
except Started:
    pass
"""
    home = {**os.environ, "GGUF_EMBED_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=home
    )
    assert done.stdout == "False\n"


# ------------------------------------------------------------------------------- the short way


@pytest.mark.native
def test_the_built_in_model_opens_without_a_network_client_or_a_process():
    """Once the build and the file are proved."""
    code = """
import subprocess, sys
from gguf_embed import Embedder, Settings

Embedder.open(settings=Settings(tune=False)).close()  # proves what is not yet proved

def refuse(*_, **__):
    raise SystemExit("a process was started")

subprocess.Popen.__init__ = refuse
with Embedder.open(settings=Settings(tune=False)) as embedder:
    assert embedder.encode("a text").shape == (384,)
print(sorted({"huggingface_hub", "requests", "httpx", "psutil"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout in ("[]\n", "['psutil']\n")


@pytest.mark.branches
def test_a_file_or_a_user_that_says_no_pooling_is_refused(tiny_model: Write):
    """NONE is no way to pool: it gave the vector of one token."""
    for kind, pooling in (("qwen3", "LAST"), ("bert", "MEAN or CLS")):
        path = tiny_model(kind, pooling=Pooling.NONE)
        with pytest.raises(BadModelFile, match=f"pass pooling {pooling}"):
            open_model(path, QUICK)
        open_model(path, replace(QUICK, pooling=Pooling.MEAN)).close()
        with pytest.raises(BadOption, match="pooling=NONE gives a text no vector"):
            open_model(path, replace(QUICK, pooling=Pooling.NONE))
