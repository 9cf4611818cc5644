"""`tune` and `pull`, run as a user runs them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiny
from commands import run_command
from fakehub import FakeHub
from test_choice import LAPTOP, MODEL, REPO, World, file_of, files, verdicts, world

from gguf_embed.catalog import catalog
from gguf_embed.catalog.catalog import BUILTIN, builtin_path
from gguf_embed.cli import console, main
from gguf_embed.engine import fetching
from gguf_embed.engine.embedder import Embedder
from gguf_embed.gguf.header import read_header
from gguf_embed.lab import making
from gguf_embed.machine.machine import System
from gguf_embed.plan.settings import Settings
from gguf_embed.store import local, names

pytestmark = pytest.mark.native

__all__ = ["files", "verdicts", "world"]  # fixtures of another file


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))


def test_tune_prints_what_it_keeps_and_the_next_open_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tiny.write_qwen3(tmp_path / "model.gguf").path
    assert main(["tune", str(path), "--budget", "1", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["trials"][0]["changed"] == "start"
    assert sum(trial["kept"] for trial in tuned["trials"]) >= 1
    with Embedder.open(path, settings=Settings(tune=False)) as embedder:
        used = embedder.run_settings
    assert used.max_batch_tokens == tuned["settings"]["max_batch_tokens"]
    assert used.n_contexts == tuned["settings"]["n_contexts"]


def test_tune_refuses_a_model_without_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tiny.write_qwen3(tmp_path / "chat.gguf", pooling=None).path
    assert main(["tune", str(path)]) == 3
    assert "LAST" in capsys.readouterr().err


def test_pull_of_what_is_here_says_where(capsys: pytest.CaptureFixture[str]):
    assert main(["pull", BUILTIN, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(builtin_path())
    assert told["n_bytes"] == builtin_path().stat().st_size
    assert told["licence"] == "Apache-2.0"


@pytest.mark.parametrize("size", ["small", "nano"])  # planned by its card, by its header
def test_pull_shows_a_licence_before_anything_moves(
    size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        assert main(["pull", f"jina-embeddings-v5-text-{size}"]) == 2
    told = capsys.readouterr().err
    assert "no commercial use" in told
    assert "--accept-licence" in told
    assert not (tmp_path / "cache").exists()


class Person(io.StringIO):
    """Somebody at a terminal, who answers once."""

    def isatty(self) -> bool:
        return True


CUT_AT = 50_000  # bytes: the connection breaks, so that there is a place to ask at


@pytest.fixture
def large_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the clock runs fast, files are large and come in two parts."""
    clock = count(0, 2)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("time.sleep", lambda _: None)  # before the connection is made again
    world.fake.faults.cut_after.append(CUT_AT)
    monkeypatch.setattr(console, "ASK_ABOVE_BYTES", 0)
    monkeypatch.setattr(fetching, "FIRST_S", 0)


QUESTION = "go on? [y/N]"


@pytest.mark.usefixtures("large_files")
@pytest.mark.parametrize("answer", ["y", "Yes", "n", ""])
def test_pull_asks_a_person_before_a_large_file(
    world: World, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """When size, time and free disk were told; what had come by then is kept."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", Person(f"{answer}\n"))
    code, out, err = run_command(capsys, "pull", MODEL, "--quant", "F16")
    told = re.search(rf"fetching {MODEL} F16 \(.* MiB\), once: .* MiB of disk free", err)
    assert told is not None
    assert told.end() < err.index(QUESTION)
    assert err.count(QUESTION) == 1
    (blob,) = (world.at.cache / f"models--{REPO.replace('/', '--')}" / "blobs").iterdir()
    if answer in ("y", "Yes"):
        assert (code, out.strip()) == (0, str(names.resolve(MODEL, "F16").path))
        return
    assert code == 2
    assert "stopped: the answer was no" in err
    assert blob.name.endswith("incomplete")
    n_kept = blob.stat().st_size
    assert 0 < n_kept <= CUT_AT  # as much as had come in one piece
    world.fake.requests.clear()
    code, _, err = run_command(capsys, "pull", MODEL, "--quant", "F16", "--yes")
    assert (code, QUESTION in err) == (0, False)
    assert f"bytes={n_kept}-" in [request.byte_range for request in world.fake.requests]


@pytest.mark.usefixtures("large_files")
def test_pull_in_a_script_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, _, err = run_command(capsys, "pull", MODEL, "--quant", "F16")
    assert (code, QUESTION in err) == (0, False)


def test_the_line_before_a_fetch_tells_time_speed_and_memory(world: World):
    chosen = world.choose(quant="F16")
    total = 100 << 20
    said: list[str] = []
    clock = iter((0.0, 0.0, 1.0, 2.0, 3.0, 4.0))
    moved = fetching.announced(
        chosen.source, chosen.plan, world.at, on_status=said.append, clock=lambda: next(clock)
    )
    moved(0, total)
    moved(1 << 20, total)
    assert said == []
    moved(2 << 20, total)
    moved(3 << 20, total)
    (line,) = said
    assert "; about" not in line.partition(": ")[0]
    assert "once: about 98 s at 1.0 MiB/s; " in line.replace("2 min", "98 s")
    assert re.search(r"MiB of disk free; then (about .* texts/s, in )?[\d,]+ MiB of RAM$", line)


# ---------------------------------------------------------------------- what is on the disk


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_path_names_the_best_file_that_is_here(world: World, capsys: pytest.CaptureFixture[str]):
    world.pull("Q8_0", "Q4_K_M")
    code, out, _ = run_command(capsys, "models", "path", MODEL)
    assert (code, out.strip()) == (0, str(names.resolve(MODEL, "Q8_0").path))
    _, out, _ = run_command(capsys, "models", "path", MODEL, "--quant", "q4_k_m")
    assert out.strip().endswith(file_of("Q4_K_M"))
    _, out, _ = run_command(capsys, "models", "path", f"hf:{REPO}/{file_of('Q4_K_M')}", "--json")
    said = json.loads(out)
    assert said["format"] == "gguf-embed-models-path/1"
    assert (said["quant"], said["where"]) == ("Q4_K_M", "cache")
    code, _, err = run_command(capsys, "models", "path", f"{MODEL}:Q2_K")
    assert code == 4
    assert "not on this machine as Q2_K, only as Q8_0, Q4_K_M" in err
    assert run_command(capsys, "models", "path", "nobody/nothing")[0] == 4


def test_du_counts_what_is_here_and_what_was_stopped(
    world: World, capsys: pytest.CaptureFixture[str]
):
    world.pull("Q8_0")
    (blob,) = (world.at.cache / f"models--{REPO.replace('/', '--')}" / "blobs").iterdir()
    blob.with_name(f"{'0' * 64}.gguf_embed.incomplete").write_bytes(b"12345")
    code, out, _ = run_command(capsys, "models", "du", "--json")
    said = json.loads(out)
    assert code == 0
    sizes = {(each["name"], each["where"]): each["n_bytes"] for each in said["files"]}
    assert sizes == {
        (BUILTIN, "package"): builtin_path().stat().st_size,
        (MODEL, "cache"): blob.stat().st_size,
        (REPO, "unfinished"): 5,
    }
    assert said["n_bytes"] == sum(sizes.values())
    _, out, _ = run_command(capsys, "models", "du")
    assert "MiB in all" in out


def test_rm_takes_a_file_out_of_the_cache(world: World, capsys: pytest.CaptureFixture[str]):
    """Its blob, its link in every snapshot; then the folder, with the last one."""
    world.pull("Q8_0", "Q4_K_M")
    folder = world.at.cache / f"models--{REPO.replace('/', '--')}"
    other = folder / "snapshots" / ("1" * 40) / file_of("Q8_0")
    other.parent.mkdir()
    other.symlink_to(next(folder.glob("snapshots/0*/*Q8_0.gguf")).readlink())
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "old").write_text("1" * 40)
    code, out, err = run_command(capsys, "models", "rm", f"{MODEL}:Q8_0", "--yes", "--json")
    assert code == 0, err
    assert [each["quant"] for each in json.loads(out)["removed"]] == ["Q8_0"]
    assert not [path for path in everything(folder) if "Q8_0" in path or "1" * 40 in path]
    assert len(list((folder / "blobs").iterdir())) == 1
    assert not (folder / "refs" / "old").exists()
    assert names.resolve(MODEL, "Q4_K_M").path
    code, _, err = run_command(capsys, "models", "rm", MODEL, "--yes")
    assert (code, folder.exists()) == (0, False)
    assert "removed 1 file, 1 MiB" in err
    assert run_command(capsys, "models", "rm", MODEL, "--yes")[0] == 4


def test_rm_asks_before_and_takes_no_for_an_answer(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    world.pull("Q8_0")
    code, _, err = run_command(capsys, "models", "rm", MODEL)
    assert code == 2
    assert "remove 1 file, 1 MiB? Nobody is there to answer; say --yes" in err
    for answer, left in (("", True), ("no", True), ("y", False)):
        stdin = io.StringIO(f"{answer}\n")
        monkeypatch.setattr(stdin, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", stdin)
        assert run_command(capsys, "models", "rm", MODEL)[0] == (2 if left else 0)
        assert (names.resolve(MODEL, "Q8_0").path is not None) == left


def test_rm_leaves_what_is_not_ours(world: World, capsys: pytest.CaptureFixture[str]):
    code, _, err = run_command(capsys, "models", "rm", BUILTIN, "--yes")
    assert code == 2
    assert "is part of gguf-embed" in err
    assert builtin_path().exists()
    world.pull("Q8_0")
    folder = world.at.cache / f"models--{REPO.replace('/', '--')}"
    outside = world.at.cache.parent / "outside"
    (folder / "blobs").rename(outside)
    (folder / "blobs").symlink_to(outside)
    code, _, err = run_command(capsys, "models", "rm", MODEL, "--yes")
    assert code == 7
    assert "leads out of" in err
    assert len(list(outside.iterdir())) == 1


def test_the_default_model_is_kept_and_is_what_commands_take(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    world.pull("Q8_0")
    settings = tmp_path / "home" / "config.toml"
    settings.write_text("# mine\nother = 1\n")
    assert run_command(capsys, "models", "default")[1].strip() == BUILTIN
    code, _, err = run_command(capsys, "models", "default", MODEL)
    assert (code, str(settings) in err) == (0, True)
    assert settings.read_text() == f'model = "{MODEL}"\n# mine\nother = 1\n'
    words = ("embed", "--text", "a", "-o", tmp_path / "v.npy", "--no-tune")
    code, _, _ = run_command(capsys, *words)
    assert (code, np.load(tmp_path / "v.npy").shape) == (0, (1, 256))
    _, out, _ = run_command(capsys, "models", "default", BUILTIN, "--json")
    assert json.loads(out)["chosen"] is False
    assert settings.read_text() == "# mine\nother = 1\n"
    settings.write_text("model = 7")
    code, _, err = run_command(capsys, "embed", "--text", "a", "-o", tmp_path / "v.npy")
    assert code == 2
    assert "mend or remove it" in err


@pytest.mark.parametrize("words", [["rm"], ["path"], ["list", "x"], ["du", "x"]])
def test_actions_and_their_names(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_command(capsys, "models", *words)[0] == 2


# ------------------------------------------------------------------------- a level made here


def test_a_level_that_is_not_offered_is_made(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of the F16, fetched once, with the importance matrix beside it; the F16 goes afterwards."""
    matrix = write_imatrix(tmp_path / "m.gguf", world.files["F16"])
    repo = world.fake.repos[REPO]
    commit = {"tiny-embedder.imatrix.gguf": matrix.read_bytes(), **repo.commits["0" * 40]}
    repo.commits["0" * 40] = commit
    words = ["pull", MODEL, "--make", "--quant", "Q6_K", "--drop-source", "--json"]
    code, out, err = run_command(capsys, *words)
    assert code == 0, err
    said = json.loads(out)
    assert (said["model"], said["quant"]) == (MODEL, "Q6_K")
    assert Path(said["file"]).is_relative_to(world.at.store)
    assert f"fetching {MODEL} F16 (" in err
    assert "verified by the vectors of its source: cosine 0.99" in err
    assert "made with the importance matrix beside it" in err
    assert f"{MODEL} F16 was removed" in err
    assert [p.name for p in world.at.store.iterdir()] == [Path(said["file"]).parent.name]
    here = local.local_models(world.at)
    assert {source.quant for source in here if source.where != "package"} == {"Q6_K"}
    assert read_header(Path(said["file"])).quant == "Q6_K"
    assert world.choose().plan.quant == "Q6_K"
    code, _, err = run_command(capsys, "pull", MODEL, "--make", "--quant", "Q8_0")
    assert code == 0
    assert "nothing is made: Q8_0 is offered" in err


def write_imatrix(path: Path, model: Path) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["texts"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in read_header(model).tensors:
        if len(tensor.shape) == 2 and tensor.name.startswith("blk."):
            sums = np.linspace(1, 2, tensor.shape[0], dtype=np.float32)[None]
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("system", "features", "level", "why"),
    [
        ("macos", ("avx2", "fma", "avx512_vnni"), "Q5_K_M", "with Q8_0, the fastest that is"),
        ("linux", ("avx2", "fma", "avx512_vnni"), None, "Q8_0 is offered, and no other is"),
        ("linux", ("avx2", "fma"), None, "Q8_0 is offered, and no other is known to be faster"),
        ("linux", (), None, "is offered, and no other is known to be faster here"),
    ],
)
def test_what_is_worth_making(
    system: System, features: tuple[str, ...], level: str | None, why: str
):
    """Of Qwen3-Embedding-0.6B, officially F16 and Q8_0: where K-quants are twice as fast.

    They are with llama.cpp's kernels for VNNI; ours run Q8_0 as fast.
    """
    card = catalog.find("qwen3-embedding-0.6b")
    assert card is not None
    official = tuple(file for file in card.files if file.repo.startswith("Qwen/"))
    card = replace(card, files=official)
    machine = replace(LAPTOP, os=system, cpu_features=features)
    made, reason = making.level_to_make(card, machine, Settings())
    assert made == level
    assert why in reason
