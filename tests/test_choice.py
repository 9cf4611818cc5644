"""From a name to the file for this machine: what is chosen, brought, and run, and where.

The Hub is a local one, the machines are descriptions: nothing here depends on how much memory the
machine has that runs the tests. The model is tiny, so machines are described with little of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Write
from fakehub import FakeHub
from test_cli import on_terminal

from gguf_embed.catalog import catalog
from gguf_embed.cli import main
from gguf_embed.engine import loaded as engine_loaded
from gguf_embed.engine import tune
from gguf_embed.engine.choice import Choice, choose
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.tune_record import Tuned, keep_record
from gguf_embed.errors import BadInput, BadModelFile, BadOption, DoesNotFit, ModelNotFound
from gguf_embed.gguf.header import read_header
from gguf_embed.machine import measured, selftest, selftest_child
from gguf_embed.machine import probe as hardware
from gguf_embed.machine.machine import Machine, machine_from_json
from gguf_embed.native import tap as native_tap
from gguf_embed.native.model import Model
from gguf_embed.plan.fitter import BATCH_TOKENS_TIGHT, MARGIN_SHARE
from gguf_embed.plan.memory import MIB, predict
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import BATCH_TOKENS, RunSettings, Settings
from gguf_embed.plan.variants import variants_of
from gguf_embed.store import download, hub, names
from gguf_embed.store import local as store
from gguf_embed.store.local import Places
from gguf_embed.system import paths
from gguf_embed.vectors import Pooling

pytestmark = pytest.mark.native

MACHINES = Path(__file__).parent / "machines"
LAPTOP = machine_from_json((MACHINES / "laptop-16gb-no-gpu.json").read_text())
ONE_GPU = machine_from_json((MACHINES / "rtx-4090-24gb.json").read_text())
LAST = EmbedMode(pooling=Pooling.LAST, causal=True, encoder=False)
MODEL = "tiny-embedder"
REPO = "someone/Tiny-Embedder-GGUF"
QUANTS = ("F16", "Q8_0", "Q4_K_M", "Q2_K")  # best first
QUICK = Settings(tune=False, n_threads=1)
TUNED = Tuned(
    settings=RunSettings(max_batch_tokens=1024, n_threads=1, repack=True),
    tokens_per_s=1.0,
    untuned_tokens_per_s=1.0,
    seconds=1.0,
    trials=(),
    cost=None,
)


# --------------------------------------------------------------- a catalog with one more model


def toml_of(hub_files: dict[str, Path], *, commercial: bool, family: str) -> str:
    """Its card, in the words of models/*.toml."""
    header = read_header(hub_files["F16"])
    listed = "\n".join(
        f'    {{ quant = "{quant}", name = "{file_of(quant)}", bytes = {path.stat().st_size}, '
        f'sha256 = "{store.file_sha256(path)}" }},'
        for quant, path in hub_files.items()
    )
    return f"""
title = "Tiny"
kind = "embedder"
family = "{family}"
aliases = ["tiny:latest-and-greatest"]
source_repo = "someone/Tiny-Embedder"
licence = "CC-BY-NC-4.0"
licence_url = "https://example.org/licence"
commercial = {str(commercial).lower()}
architecture = "qwen3"
parameters = 1_000_000
pooling = "LAST"
causal = true
add_eos = true
eos_token = "{header.metadata["tokenizer.ggml.tokens"][header.eos_id or 0]}"
eos_id = {header.eos_id}
dim = 256
max_seq_length = 2048
languages = "none"
notes = "random weights"

[prompts]
query = "query: "
document = ""

[shape]
n_layer = {header.n_layer}
n_embd = {header.n_embd}
n_head = {header.n_head}
n_head_kv = {header.n_head_kv}
head_dim = {header.key_length}
n_ff = {header.n_ff}
n_vocab = {header.n_vocab}
n_ctx_train = {header.n_ctx_train}

[[repos]]
repo = "{REPO}"
revision = "{"0" * 40}"
files = [
{listed}
]
"""


def file_of(quant: str) -> str:
    return f"tiny-embedder-{quant}.gguf"


@dataclass(eq=False, slots=True)
class World:
    """A Hub, a cache, a catalog and a machine, none of them this machine's own."""

    fake: FakeHub
    at: Places
    files: dict[str, Path]
    models: Path  # of the catalog
    machine: Machine = LAPTOP
    said: list[str] = field(default_factory=list)
    moved: list[tuple[int, int]] = field(default_factory=list)

    def open(self, model: str | Path = MODEL, settings: Settings = QUICK) -> Embedder:
        return Embedder.open(
            model,
            settings=settings,
            on_status=self.said.append,
            on_download=lambda done, total: self.moved.append((done, total)),
        )

    def pull(self, *quants: str) -> None:
        for quant in quants:
            download.fetch(names.resolve(MODEL, quant))

    def choose(self, name: str | Path = MODEL, **limits: Any) -> Choice:
        return choose(name, self.machine, Settings(**limits))

    def with_ram(self, n_bytes: int) -> None:
        self.machine = replace(LAPTOP, ram_available_bytes=n_bytes, ram_total_bytes=n_bytes)

    def go_offline(self) -> None:
        self.at = replace(self.at, offline=True)

    def served(self) -> list[str]:
        """The quantizations of the files that left the storage whole."""
        hashes = {store.file_sha256(path): quant for quant, path in self.files.items()}
        return [
            hashes[r.path.strip("/").partition("?")[0]]
            for r in self.fake.requests
            if r.storage and r.method == "GET" and r.byte_range is None
        ]


def write_catalog(folder: Path, card: str) -> None:
    """The real catalog and one more card."""
    folder.mkdir(exist_ok=True)
    for file in catalog.models_dir().iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    (folder / f"{MODEL}.toml").write_text(card)


def add_to_hub(fake: FakeHub, files: dict[str, Path]) -> None:
    """As the commit that the card pins."""
    fake.add(REPO, {file_of(quant): path.read_bytes() for quant, path in files.items()})
    repo = fake.repos[REPO]
    repo.commits["0" * 40] = next(iter(repo.commits.values()))


@pytest.fixture(scope="module")
def files(tiny_model: Write) -> dict[str, Path]:
    return {quant: tiny_model("qwen3", quant) for quant in QUANTS}


def forget_cards() -> None:
    catalog.cards.cache_clear()
    catalog.by_name.cache_clear()


@pytest.fixture(scope="module")
def verdicts() -> Path:
    """A home in which the self-test has run; files are proved in it as they come."""
    selftest.check(["F16", "F32", "Q8_0", "Q4_K", "Q6_K"])
    return paths.home()


@pytest.fixture
def world(
    files: dict[str, Path], verdicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    shutil.copytree(verdicts / "selftest", tmp_path / "home" / "selftest")
    (tmp_path / "home" / "proof").symlink_to(verdicts / "proof")
    for name in [*os.environ]:
        if name.upper().endswith("_PROXY") or name.startswith(("HF_", "OLLAMA_")):
            monkeypatch.delenv(name)
    models = tmp_path / "models"
    write_catalog(models, toml_of(files, commercial=True, family="tiny"))
    with FakeHub() as fake:
        add_to_hub(fake, files)
        at = Places(
            endpoint=fake.url,
            cache=tmp_path / "hub",
            store=tmp_path / "store",
            ollama=(),
            offline=False,
        )
        world = World(fake=fake, at=at, files=files, models=models)
        monkeypatch.setattr(catalog, "models_dir", lambda: models)
        monkeypatch.setattr(hub, "places", lambda: world.at)
        monkeypatch.setattr(hardware, "probe", lambda **_: world.machine)
        forget_cards()
        yield world
    forget_cards()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("the network was touched")

    def forbid() -> None:
        for name in ("connect", "connect_ex", "sendto"):
            monkeypatch.setattr(socket.socket, name, refuse)
        for name in ("create_connection", "getaddrinfo"):
            monkeypatch.setattr(socket, name, refuse)

    return forbid


def needed(quant: str, n_ctx: int = 2048, max_batch_tokens: int = BATCH_TOKENS) -> int:
    """Bytes that a run of the tiny model takes, by the plan's own count."""
    card = catalog.find(MODEL)
    assert card is not None
    (variant,) = (v for v in variants_of(card) if v.quant == quant)
    run = RunSettings(n_ctx=n_ctx, max_batch_tokens=max_batch_tokens)
    return predict(variant, LAPTOP, run)["CPU"].used_bytes


def enough_for(quant: str) -> int:
    """RAM in which that quantization fits with its margin, and the next better one does not."""
    share = MARGIN_SHARE
    n_bytes = needed(quant) * share // (share - 1) + 4 * share
    better = QUANTS.index(quant) - 1
    assert better < 0 or needed(QUANTS[better]) > n_bytes - n_bytes // share
    return n_bytes


# -------------------------------------------------------------------------------- which file


def forget_proofs() -> None:
    """As where no file was ever opened."""
    (paths.home() / "proof").unlink()


def test_a_name_becomes_vectors_and_says_why(world: World):
    forget_proofs()
    with world.open() as embedder:
        vectors = embedder.encode(["the cat sat", "a dog in the river"])
        assert vectors.shape == (2, 256)
        assert (embedder.model_id, embedder.quant) == (MODEL, "Q8_0")
        assert embedder.plan.quant == "Q8_0"
        assert [row.quant for row in embedder.plan.considered] == list(QUANTS)
    chosen, fetching, proved = world.said
    assert "in a child process, once: " in proved
    assert chosen.startswith(f"{MODEL} Q8_0 on CPU: as good as F16, and the smallest; no speeds ")
    assert chosen.endswith("texts of up to 2,048 tokens")
    assert fetching.startswith(f"fetching {MODEL} Q8_0 (1 MiB), once: ")
    assert re.search(r": [\d,]+ MiB of disk free; then .*[\d,]+ MiB of RAM$", fetching)
    n_bytes = world.files["Q8_0"].stat().st_size
    assert world.moved[0] == (0, n_bytes)
    assert world.moved[-1] == (n_bytes, n_bytes)
    assert world.served() == ["Q8_0"]


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
def test_less_memory_takes_a_smaller_file(quant: str, world: World):
    world.with_ram(enough_for(quant))
    with world.open() as embedder:
        assert (embedder.quant, embedder.plan.fit) == (quant, "fits")
    assert world.served() == [quant]


def test_a_file_that_is_here_is_used_and_another_only_when_asked_for(world: World):
    world.pull("Q4_K_M")
    with world.open() as embedder:
        assert embedder.quant == "Q4_K_M"
        assert embedder.plan.reason.startswith("it is here; --quant fetches another")
        assert embedder.plan.reason.endswith("F16 Q8_0")
    assert world.served() == ["Q4_K_M"]
    with world.open(settings=replace(QUICK, quant="fp16")) as embedder:
        assert (embedder.quant, embedder.plan.reason) == ("F16", "asked for")
    assert world.choose().plan.quant == "F16"  # of two that are here the better one
    assert world.choose(prefer="memory").plan.quant == "Q4_K_M"


def test_a_file_that_is_here_counts_whatever_its_quality(world: World):
    """It was asked for once; but nothing below Q4_K_M is ever fetched unasked."""
    world.pull("Q2_K")
    found = world.choose().plan
    assert found.quant == "Q2_K"
    assert not any("only if asked for" in row.reason for row in found.considered)


def test_a_file_that_is_here_and_has_no_room_is_not_used(world: World):
    world.pull("F16")
    world.with_ram(enough_for("Q8_0"))
    with world.open() as embedder:
        assert embedder.quant == "Q8_0"
    world.go_offline()  # where it is tight, or nothing
    world.pull("Q8_0")
    assert world.choose(quant="F16").plan.fit == "tight"


def test_speed_that_was_measured_here_decides_where_speed_is_preferred(world: World):
    world.pull("F16", "Q8_0", "Q4_K_M")
    assert world.choose(prefer="speed").plan.quant == "Q4_K_M"  # K-quants: a guess
    for quant, tokens_per_s in (("F16", 10.0), ("Q8_0", 90.0), ("Q4_K_M", 50.0)):
        tuned = replace(TUNED, tokens_per_s=tokens_per_s)
        run = tune.measured_run(tuned, read_header(world.files[quant]), LAST)
        measured.keep(run, LAPTOP.usable_cores)
    found = world.choose(prefer="speed").plan
    assert found.quant == "Q8_0"
    assert "90 tokens/s, the fastest of 2 measured here" in found.reason
    assert choose(MODEL, LAPTOP, Settings(prefer="speed"), mine=False).plan.quant == "Q4_K_M"
    assert world.choose(prefer="speed", n_threads=1).plan.quant == "Q4_K_M"  # not measured so


def test_for_another_machine_it_does_not_count_what_is_here(world: World):
    world.pull("Q4_K_M")
    assert choose(MODEL, LAPTOP, Settings(), mine=False).plan.quant == "Q8_0"


def test_a_damaged_file_that_is_here_is_passed_over(world: World, caplog: pytest.LogCaptureFixture):
    world.pull("Q4_K_M")
    (path,) = world.at.cache.rglob("*Q4_K_M.gguf")
    path.resolve().write_bytes(b"GG" * (world.files["Q4_K_M"].stat().st_size // 2))
    assert world.choose().plan.quant == "Q8_0"
    assert "Q4_K_M" in caplog.text
    with pytest.raises(BadModelFile):
        world.choose(quant="Q4_K_M")


@pytest.mark.parametrize(
    ("name", "limits", "error", "message"),
    [
        (MODEL, {"quant": "Q7"}, ModelNotFound, "tiny-embedder has no Q7; it has: F16 "),
        (f"{MODEL}:Q8_0", {"quant": "F16"}, BadOption, "says Q8_0, but F16 was asked for"),
        (MODEL, {"n_ctx": 4096}, BadOption, "n_ctx=4096: tiny-embedder was trained on 2048"),
        (MODEL, {"n_gpu_layers": 3}, BadOption, "llama.cpp has no GPU here"),
        ("tiny-embeder", {}, ModelNotFound, "Did you mean tiny-embedder"),
    ],
)
def test_what_cannot_be_had(
    name: str, limits: dict[str, Any], error: type[Exception], message: str, world: World
):
    with pytest.raises(error, match=message):
        world.choose(name, **limits)


def test_a_quantization_in_the_name(world: World):
    found = world.choose(f"{MODEL}:Q4_K_M").plan
    assert (found.quant, found.reason) == ("Q4_K_M", "asked for")


def test_a_repository_that_nobody_knows_is_planned_by_its_headers(world: World):
    """And not asked again, once a file of it is here."""
    repo = "else/Some-Model-GGUF"
    world.fake.add(repo, {file_of(q): p.read_bytes() for q, p in world.files.items()})
    world.with_ram(enough_for("Q8_0"))
    with world.open(repo, QUICK) as embedder:
        assert (embedder.quant, embedder.card) == ("Q8_0", None)
        ranges = {r.path for r in world.fake.requests if r.byte_range}
        assert len(ranges) == 1  # the header of one file tells of the others
        assert len(embedder.plan.considered) == len(QUANTS)
    assert world.served() == ["Q8_0"]
    asked = len(world.fake.requests)
    world.with_ram(LAPTOP.ram_available_bytes)
    with world.open(repo, QUICK) as embedder:
        assert embedder.quant == "Q8_0"
    assert len(world.fake.requests) == asked
    assert choose(repo, LAPTOP, Settings(), mine=False).plan.quant == "Q8_0"


def test_a_smaller_model_where_that_is_allowed(world: World):
    world.with_ram(enough_for("F16"))
    card = world.models / f"{MODEL}.toml"
    card.write_text(card.read_text().replace('family = "tiny"', 'family = "qwen3-embedding"'))
    forget_cards()
    with pytest.raises(DoesNotFit, match=r"try tiny-embedder \(Q8_0 on CPU"):
        world.choose("qwen3-embedding-0.6b")
    with world.open("qwen3-embedding-0.6b", replace(QUICK, allow_smaller=True)) as embedder:
        assert embedder.model_id == MODEL
        assert embedder.plan.why[0].startswith("tiny-embedder: qwen3-embedding-0.6b Q4_K_M on CPU")
        assert [why.split()[0] for why in embedder.plan.why[1:3]] == ["quant", "n_gpu_layers"]


def test_what_is_no_embedder_is_told_before_it_is_fetched(world: World, tiny_model: Write):
    with pytest.raises(BadModelFile, match="a reranker scores pairs"):
        world.open("qwen3-reranker-0.6b")
    chats = {q: tiny_model("qwen3", q, pooling=None).read_bytes() for q in ("F16", "Q8_0")}
    world.fake.add("else/chat-GGUF", {f"chat-{q}.gguf": data for q, data in chats.items()})
    world.with_ram(enough_for("Q8_0"))
    with pytest.raises(BadModelFile, match="pooling"):
        world.open("else/chat-GGUF")
    assert world.served() == []
    with world.open("else/chat-GGUF", replace(QUICK, pooling=Pooling.MEAN)) as embedder:
        assert embedder.pooling is Pooling.MEAN


# -------------------------------------------------------------------------------------- auto


def test_auto_is_the_best_of_its_family_that_runs_well(world: World):
    card = world.models / f"{MODEL}.toml"
    card.write_text(card.read_text().replace('family = "tiny"', 'family = "qwen3-embedding"'))
    forget_cards()
    assert world.choose("auto").plan.model == "qwen3-embedding-0.6b"
    world.machine = ONE_GPU
    assert world.choose("auto").source.file == "Qwen3-Embedding-8B-f16.gguf"
    world.with_ram(enough_for("Q8_0"))
    with world.open("auto") as embedder:
        assert (embedder.model_id, embedder.quant) == (MODEL, "Q8_0")
        assert embedder.plan.why[0] == "tiny-embedder: the best of its family that runs well here"
    assert world.choose("auto", quant="Q4_K_M").plan.quant == "Q4_K_M"


def test_auto_takes_no_quantization_that_nobody_has(world: World):
    with pytest.raises(BadOption, match="no qwen3-embedding is offered as Q7"):
        world.choose("auto", quant="q7")
    assert world.choose("auto", quant="fp16").plan.quant == "F16"


def test_auto_offline_is_what_is_here(world: World, no_network: Callable[[], None]):
    card = world.models / f"{MODEL}.toml"
    card.write_text(card.read_text().replace('family = "tiny"', 'family = "qwen3-embedding"'))
    forget_cards()
    world.pull("Q4_K_M")
    no_network()
    world.go_offline()
    with world.open("auto") as embedder:
        assert (embedder.model_id, embedder.quant) == (MODEL, "Q4_K_M")
    (path,) = world.at.cache.rglob("*Q4_K_M.gguf")
    path.unlink()
    with pytest.raises(ModelNotFound, match=r"qwen3-embedding-0.6b Q8_0 .* is not on this machine"):
        world.open("auto")


# ----------------------------------------------------------------------------------- offline


def test_offline_it_runs_from_what_is_here(world: World, no_network: Callable[[], None]):
    world.pull("Q4_K_M")
    no_network()
    world.go_offline()
    with world.open() as embedder:
        assert embedder.quant == "Q4_K_M"
        assert len(embedder.plan.considered) == 1
        assert embedder.encode("the cat").shape == (256,)
    assert "fetching" not in " ".join(world.said)


def test_offline_what_is_absent_is_told_with_what_is_here(
    world: World, no_network: Callable[[], None]
):
    no_network()
    world.go_offline()
    world.with_ram(enough_for("Q8_0"))
    with pytest.raises(ModelNotFound) as caught:
        world.open()
    said = str(caught.value)
    assert f"{MODEL} Q8_0 (1 MiB) is not on this machine" in said  # the one that would run here
    assert "Here are: all-minilm-l6-v2 Q8_0." in said
    assert f"gguf-embed bundle {MODEL} --quant Q8_0 -o DIR" in said
    assert "fetching" not in " ".join(world.said)


# ------------------------------------------------------------------------------ memory first


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The choices with which each model was loaded."""
    loaded: list[dict[str, Any]] = []

    class Watched(Model):
        def __init__(self, path: Path, **choices: Any) -> None:
            loaded.append(choices)
            super().__init__(path, **choices)

    for module in (engine_loaded, tune):
        monkeypatch.setattr(module, "Model", Watched)
    return loaded


def test_what_does_not_fit_is_told_before_it_is_loaded(world: World, loaded: list[dict[str, Any]]):
    world.with_ram(2 * MIB)
    for model in (MODEL, world.files["Q8_0"], catalog.BUILTIN):
        with pytest.raises(DoesNotFit, match=r"does not fit on .* 2 MiB are free"):
            world.open(model)
    with pytest.raises(DoesNotFit, match="a larger --memory"):
        world.open(settings=replace(QUICK, memory_bytes=1 * MIB))
    assert (loaded, world.served()) == ([], [])


def test_the_longest_text_is_what_there_is_memory_for(world: World):
    world.with_ram(needed("Q2_K", 512, BATCH_TOKENS_TIGHT) * 15 // 14)
    path = world.files["Q2_K"]
    with world.open(path) as embedder:
        assert embedder.plan.fit == "tight"
        assert 512 <= embedder.n_ctx < 2048
        assert embedder.n_ctx == embedder.plan.run.n_ctx
    with pytest.raises(DoesNotFit, match="a smaller --n-ctx"):
        world.open(path, replace(QUICK, n_ctx=2048))
    with world.open(path, replace(QUICK, n_ctx=700)) as embedder:
        assert embedder.n_ctx == 700


def used(embedder: Embedder) -> RunSettings:
    return embedder.run_settings


def test_a_tight_plan_is_not_exceeded_by_what_was_measured(world: World):
    """When it was measured, there was more memory."""
    path = world.files["Q4_K_M"]
    with world.open(path) as embedder:
        keep_record(TUNED, embedder.target)
    with world.open(path) as embedder:
        assert used(embedder).max_batch_tokens == 1024
    world.with_ram(needed("Q4_K_M") * 15 // 14)
    with world.open(path) as embedder:
        assert embedder.plan.fit == "tight"
        assert used(embedder).max_batch_tokens == BATCH_TOKENS_TIGHT
        # What costs no memory stays.
        assert (used(embedder).repack, used(embedder).accelerator) == (True, False)
    # As measured anew: nothing is tried that there is no memory for.
    tuned = tune.tune(embedder.target, budget_s=20)
    assert {t.settings.max_batch_tokens for t in tuned.trials} == {BATCH_TOKENS_TIGHT}


def test_contexts_are_counted(world: World):
    """Each has buffers of its own: as many as the caller wants, or as there is memory for."""
    machine = replace(LAPTOP, usable_cores=16, ram_available_bytes=200 * MIB)
    world.machine = machine
    with pytest.raises(DoesNotFit):
        world.choose(catalog.BUILTIN, n_contexts=16)
    assert world.choose(catalog.BUILTIN).plan.run.n_contexts < 16
    assert world.choose(catalog.BUILTIN, n_threads=1).plan.run.n_contexts == 1


def test_the_pooled_path_needs_memory_for_the_head(world: World):
    tapped, pooled = world.choose().plan, world.choose(tap=False).plan
    assert pooled.memory["CPU"].used_bytes > tapped.memory["CPU"].used_bytes
    found = world.choose()
    assert found.fits(found.plan.run)
    world.with_ram(enough_for("F16"))
    little = world.choose(quant="F16")
    assert not little.fits(replace(little.plan.run, tap=False, max_batch_tokens=1024))


def test_without_a_tap_it_is_planned_anew(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native_tap, "TAPPED_TENSOR", b"of another architecture")
    path = world.files["F16"]
    world.with_ram(enough_for("F16"))
    tapped, pooled = world.choose(path).plan, world.choose(path, tap=False).plan
    assert pooled.run.n_ctx < tapped.run.n_ctx
    with world.open(path) as embedder:
        assert (embedder.n_ctx, used(embedder).tap) == (pooled.run.n_ctx, False)
        assert used(embedder).max_batch_tokens == pooled.run.max_batch_tokens == 128
        assert embedder.encode("the cat").shape == (256,)


def test_the_built_in_model_says_nothing(world: World):
    forget_proofs()
    with world.open(catalog.BUILTIN) as embedder:
        assert embedder.plan.quant == "Q8_0"
        assert embedder.n_ctx == 512
    (proved,) = world.said  # nothing of how it was chosen
    assert proved.startswith("proved all-minilm-l6-v2")


# --------------------------------------------------------------------------------------- GPUs
# This build has none and ignores n_gpu_layers; what is tested is that they are asked for.


def test_a_gpu_gets_the_layers(world: World, loaded: list[dict[str, Any]]):
    world.machine = ONE_GPU
    with world.open() as embedder:
        assert embedder.encode("the cat").shape == (256,)
        assert (embedder.plan.run.n_gpu_layers, embedder.plan.devices) == (3, ("CUDA0",))
        assert used(embedder).n_gpu_layers == 3
        assert used(embedder).n_contexts == 1
    with world.open(settings=replace(QUICK, n_gpu_layers=0)) as embedder:
        assert used(embedder).n_gpu_layers == 0
    with world.open(settings=replace(QUICK, n_gpu_layers=2)) as embedder:
        assert (used(embedder).n_gpu_layers, embedder.plan.tier) == (2, "split")
    assert [choices["n_gpu_layers"] for choices in loaded] == [3, 0, 2]
    assert "F16 on CUDA0: " in world.said[0]


def test_layers_that_were_asked_for_are_as_llama_cpp_counts_them(world: World):
    world.machine = ONE_GPU
    with world.open(world.files["F16"], Settings(n_gpu_layers=-1)) as embedder:
        assert used(embedder).n_gpu_layers == 3  # llama.cpp's count, as planned


def test_an_encoder_too(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    world.machine = ONE_GPU
    with world.open(catalog.BUILTIN, Settings(tune=False, n_threads=4)) as embedder:
        assert used(embedder).n_gpu_layers == 7
        assert (used(embedder).n_contexts, used(embedder).n_threads) == (1, 4)
        assert used(embedder).max_batch_tokens == BATCH_TOKENS


def test_a_gpu_that_fails_its_test_is_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setenv(selftest_child.FAULT_VARIABLE, "gpu:SIGABRT")
    world.machine = ONE_GPU
    with world.open() as embedder:
        assert (embedder.plan.devices, used(embedder).n_gpu_layers) == (("CPU",), 0)
        (remark,) = embedder.remarks
    assert "gpu (F16: SIGABRT)" in remark
    # The verdict is kept for this card; another one is tested anew.
    monkeypatch.delenv(selftest_child.FAULT_VARIABLE)
    with world.open() as embedder:
        assert used(embedder).n_gpu_layers == 0
    other = tuple(replace(d, description=f"another {d.description}") for d in ONE_GPU.devices)
    world.machine = replace(ONE_GPU, devices=other)
    with world.open() as embedder:
        assert used(embedder).n_gpu_layers == 3


def test_without_flash_attention_it_is_planned_anew(world: World, monkeypatch: pytest.MonkeyPatch):
    """Its scores take more memory than the plan had counted."""
    world.pull("F16")
    world.with_ram(enough_for("F16"))
    broken = selftest.SafePaths(flash=False, repack=True, remark="no flash")
    monkeypatch.setattr(selftest, "check", lambda *_, **__: broken)
    with world.open(settings=replace(QUICK, n_ctx=2048)) as embedder:
        assert embedder.plan.fit == "tight"
        assert not used(embedder).flash_attn
        assert used(embedder).max_batch_tokens == BATCH_TOKENS_TIGHT


# ------------------------------------------------------------------------------------ licences


def test_what_may_not_be_sold_is_fetched_only_by_who_agrees(
    world: World, capsys: pytest.CaptureFixture[str]
):
    card = world.models / f"{MODEL}.toml"
    card.write_text(card.read_text().replace("commercial = true", "commercial = false"))
    forget_cards()
    with pytest.raises(BadInput) as caught:
        world.open()
    said = str(caught.value)
    assert "licence CC-BY-NC-4.0, no commercial use (https://example.org/licence)" in said
    assert f"gguf-embed pull {MODEL} --quant Q8_0 --accept-licence" in said
    assert world.fake.requests == []
    assert main(["pull", MODEL, "--quant", "F16"]) == 2
    assert world.fake.requests == []
    assert main(["pull", MODEL, "--quant", "F16", "--accept-licence", "--quiet"]) == 0
    assert "no commercial use" in capsys.readouterr().err
    with world.open() as embedder:  # here it may be used
        assert embedder.quant == "F16"


# ------------------------------------------------------------------------------- command line


def test_pull_fetches_what_embed_would_run(world: World, capsys: pytest.CaptureFixture[str]):
    world.with_ram(enough_for("Q8_0"))
    assert main(["pull", MODEL, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["quant"] == "Q8_0"
    assert f"{MODEL} Q8_0 on CPU: " in err
    world.with_ram(2 * MIB)
    assert main(["pull", f"{MODEL}"]) == 5
    assert "name its quantization with --quant" in capsys.readouterr().err
    assert main(["pull", f"{MODEL}", "--quant", "F16"]) == 0


def test_the_options_decide(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    texts = tmp_path / "a.txt"
    texts.write_text("the cat\n")

    def embed(*options: object) -> dict[str, Any]:
        arguments = ["embed", texts, "-o", tmp_path / "v.npy", "--json", "--no-tune", "--model"]
        assert main([str(a) for a in (*arguments, MODEL, *options)]) == 0
        return json.loads(capsys.readouterr().out)["made_with"]

    assert embed("--quant", "q4_k_m")["quant"] == "Q4_K_M"
    assert embed("--quant", "F16", "--n-ctx", "64")["n_ctx"] == 64
    made_with = embed("--prefer", "memory")
    assert made_with["quant"] == "Q4_K_M"
    assert made_with["plan"] == {
        "reason": "it is here; --quant fetches another that would run too: Q8_0",
        "where": "CPU",
        "n_gpu_layers": 0,
        "fit": "fits",
    }
    assert json.loads((tmp_path / "v.npy.meta.json").read_text())["plan"] == made_with["plan"]
    memory = f"{needed('Q4_K_M') // MIB + 1}MiB"
    assert embed("--memory", memory)["quant"] == "Q4_K_M"
    world.machine = ONE_GPU
    assert embed("--n-gpu-layers", "2")["plan"]["where"] == "CUDA0 2/3 + CPU"
    assert main(["plan", MODEL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quant"] == "F16"


SOCKETS = """
import socket, sys
def refuse(*_, **__):
    raise SystemExit("the network was touched")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = refuse
"""
RUN = "import sys; from gguf_embed.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def installed(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """A package whose catalog has one more model, on a machine where nothing else is.

    Called with what to run first, it gives the command that runs the command line.
    """
    package = Path(catalog.__file__).parents[1]
    (tmp_path / "gguf_embed").symlink_to(package)
    write_catalog(tmp_path / "models", toml_of(files, commercial=True, family="tiny"))
    for name in [*os.environ]:
        if name.upper().endswith("_PROXY") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)  # python -c looks here first
    return lambda before="": [
        sys.executable,
        "-c",
        f"{before}\nimport sys; from gguf_embed.cli import main; sys.exit(main(sys.argv[1:]))",
    ]


FORBID_SOCKETS = """
import socket
def refuse(*_, **__):
    raise SystemExit("the network was touched")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = refuse
"""


def test_a_name_to_vectors_in_one_command_and_again_without_a_network(
    files: dict[str, Path],
    tmp_path: Path,
    installed: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
):
    """As a user runs it, in processes of its own."""
    texts = tmp_path / "docs.txt"
    texts.write_text("the cat sat on the mat\na dog in the river\n")

    def embed(command: list[str], out: str) -> tuple[dict[str, Any], str]:
        arguments = ["embed", texts, "--model", MODEL, "-o", out, "--no-tune", "--json"]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["made_with"], done.stderr

    with FakeHub() as fake:
        add_to_hub(fake, files)
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        online, said = embed(installed(), "online.npy")
        assert fake.requests
    assert online["quant"] == "Q8_0"
    assert f"{MODEL} Q8_0 on CPU: as good as F16, and the smallest; no speeds" in said
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline, said = embed(installed(FORBID_SOCKETS), "offline.npy")
    assert offline["model_file"] == online["model_file"]
    assert f"{MODEL} Q8_0 on CPU: the only one that fits" in said
    a, b = np.load("online.npy"), np.load("offline.npy")
    assert a.shape == (2, 256)
    np.testing.assert_array_equal(a, b)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another"))
    absent = [*installed(FORBID_SOCKETS), "embed", "--text", "x", "--model", MODEL]
    done = subprocess.run(absent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == ModelNotFound.exit_code
    assert f"{MODEL} Q8_0 (1 MiB) is not on this machine. Here are: all-minilm" in done.stderr


def test_a_download_shows_its_progress_on_a_terminal(
    files: dict[str, Path],
    installed: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
):
    command = [*installed(), "embed", "-", "--model", MODEL, "--no-tune", "-o", "v.npy"]
    with FakeHub() as fake:
        add_to_hub(fake, files)
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        seen = on_terminal(command, b"the cat\n")
    assert re.search(rb"fetch .*/1\.\d MB", seen)
    assert b"fetch \x1b" not in on_terminal(command, b"the cat\n")
