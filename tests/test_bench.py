"""Levels compared: what is found and made, what is measured, how it is judged and told."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS

from gguf_embed import cli
from gguf_embed.catalog import catalog
from gguf_embed.cli import bench as bench_command
from gguf_embed.errors import BadInput, BadOption, DoesNotFit, ModelNotFound, NativeFailed
from gguf_embed.gguf.header import read_header
from gguf_embed.lab import bench, estimate, levels, plots, report, task_files, worker
from gguf_embed.lab.bench import BenchOptions
from gguf_embed.lab.levels import Level, find_subject, make_levels
from gguf_embed.lab.metrics import CosineStats, loss_of
from gguf_embed.lab.quality import LevelVectors, Quality, QualityMeter, dims_of
from gguf_embed.lab.results import Costs, Report, Result
from gguf_embed.lab.task_files import read_task
from gguf_embed.lab.tasks import Task
from gguf_embed.machine import measured as kept
from gguf_embed.machine.load import Load
from gguf_embed.machine.measured import Loss
from gguf_embed.plan.settings import Settings
from gguf_embed.plan.variants import variant_of
from gguf_embed.system import files
from gguf_embed.vectors import Pooling

pytestmark = pytest.mark.native

TEXTS = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(4 + i % 9)) for i in range(64)]
TASK = Task(
    name="texts of the tests",
    passages=tuple(TEXTS[:34]),
    queries=tuple(TEXTS[34:]),
    qrels=tuple({i: 1.0} for i in range(30)),
)
QUICK = BenchOptions(rounds=2, matching=True, settings=Settings(tune=False, n_threads=1))


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "ROUND_S", 0.02)
    monkeypatch.setattr(bench, "N_LATENCIES", 3)


class NoMeter:
    """Knows nothing of the load: what is measured on a busy machine counts here all the same."""

    def __init__(self, n_cores: int) -> None:
        pass

    def end(self) -> None:
        return None


@pytest.fixture(scope="module")
def measured(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A whole run over three levels of a tiny BERT, whose rows fill no block of 256."""
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ROUND_S", 0.02)
        patch.setattr(bench, "N_LATENCIES", 3)
        patch.setattr(bench, "LoadMeter", NoMeter)
        subject = find_subject([str(tiny_model("bert"))])
        compared = make_levels(subject, ["q8_0", "Q4_K_M"], scratch, print)
        found = bench.run(subject, compared, TASK, QUICK, scratch=scratch, say=print)
    assert {path.suffix for path in scratch.iterdir()} == {".gguf"}, "vectors are removed"
    return found


# -- what is compared ------------------------------------------------------------------------


def test_a_file_a_folder_and_a_list(tiny_model: Callable[..., Path], tmp_path: Path):
    exact, quantized = tiny_model("bert", "F16"), tiny_model("bert", "Q8_0")
    subject = find_subject([str(exact)])
    assert (subject.name, subject.ready, subject.source) == ("Tiny bert", {"F16": exact}, exact)
    for path in (exact, quantized):
        (tmp_path / path.name).symlink_to(path)
    in_folder = find_subject([str(tmp_path)])
    assert in_folder.ready == {name: tmp_path / f"bert-{name}.gguf" for name in ("F16", "Q8_0")}
    listed = find_subject([str(exact), str(quantized), str(exact)])
    assert listed.ready == {"F16": exact, "Q8_0": quantized}
    compared = make_levels(listed, None, tmp_path, print)
    assert [(level.name, level.made) for level in compared] == [("F16", False), ("Q8_0", False)]


def test_two_files_of_one_level_go_by_their_names(tiny_model: Callable[..., Path], tmp_path: Path):
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).symlink_to(tiny_model("bert", "Q8_0"))
    subject = find_subject([str(tmp_path)])
    assert set(subject.ready) == {"one", "two"}
    compared = make_levels(subject, ["two", "ONE"], tmp_path, print)
    assert {level.name for level in compared} == {"one", "two"}


def test_a_name_stands_for_the_files_that_are_here():
    subject = find_subject(["MiniLM"])
    assert subject.name == catalog.BUILTIN
    assert subject.ready["Q8_0"] == catalog.builtin_path()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["bert", "qwen3"], BadOption, "is another model than"),
        (["bert", "minilm"], BadOption, "minilm is no .gguf file; name one model, or the files"),
        (["empty"], ModelNotFound, "no .gguf file in this directory"),
        (["absent.gguf"], ModelNotFound, "absent.gguf does not exist"),
        (["no-such-model"], ModelNotFound, "no model is called 'no-such-model'"),
    ],
)
def test_what_cannot_be_compared(
    names: list[str],
    error: type[Exception],
    message: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
):
    (tmp_path / "empty").mkdir()
    paths = {name: str(tiny_model(name)) for name in ("bert", "qwen3")}
    paths["empty"] = str(tmp_path / "empty")
    with pytest.raises(error, match=message):
        find_subject([paths.get(name, name) for name in names])


def test_missing_levels_are_made_and_the_source_is_the_reference(measured: Report):
    assert measured.reference == "F32"
    compared = [result.level for result in measured.results]
    assert [(level.name, level.made) for level in compared] == [
        ("F32", False),
        ("Q8_0", True),
        ("Q4_K_M", True),
    ]
    assert compared[0].n_bytes > compared[1].n_bytes > compared[2].n_bytes
    assert [sum(level.types.values()) for level in compared] == pytest.approx([1, 1, 1])
    assert not compared[1].fallbacks
    # 96 and 192 are no multiples of 256: no K-quant is left of this K-quant level.
    assert "Q5_0" in compared[2].types
    assert not any(name.endswith("_K") for name in compared[2].types)
    assert {one.row_length for one in compared[2].fallbacks} == {96, 192}


def test_a_level_that_does_not_exist(tiny_model: Callable[..., Path], tmp_path: Path):
    subject = find_subject([str(tiny_model("bert"))])
    with pytest.raises(BadOption, match="'Q4_K_X'; did you mean Q4_K_"):
        make_levels(subject, ["Q8_0", "Q4_K_X"], tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_source_is_refused_with_the_way_out(
    tiny_model: Callable[..., Path], tmp_path: Path
):
    subject = find_subject([str(tiny_model("bert", "Q8_0"))])
    for asked in (None, ["Q4_0"]):
        with pytest.raises(BadOption) as error:
            make_levels(subject, asked, tmp_path, print)
        assert "bert-Q8_0.gguf: quantized already" in str(error.value)
        assert "name its F32, BF16 or F16 file, or the files of all levels" in str(error.value)
    (level,) = make_levels(subject, ["Q8_0"], tmp_path, print)
    assert level.name == "Q8_0"


def test_no_disk_is_told_before_anything_is_written(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "free_bytes", lambda _: 100_000)
    subject = find_subject([str(tiny_model("bert"))])
    with pytest.raises(
        DoesNotFit, match=r"Q8_0, Q4_0 of bert-F32\.gguf takes .* --scratch"
    ) as error:
        make_levels(subject, ["Q8_0", "Q4_0"], tmp_path, print)
    assert error.value.needed_bytes > error.value.free_bytes == 100_000
    assert list(tmp_path.iterdir()) == []


# -- texts -----------------------------------------------------------------------------------


def test_texts_queries_and_qrels_of_the_caller(tmp_path: Path):
    (tmp_path / "t.txt").write_text("one\n\nthree\n")
    (tmp_path / "q.jsonl").write_text('{"_id": "q", "text": "which?"}\n')
    (tmp_path / "r.tsv").write_text("q\t3\t1\n")
    task = read_task(tmp_path / "t.txt", tmp_path / "q.jsonl", tmp_path / "r.tsv")
    assert task == Task(
        name=str(tmp_path / "t.txt"),
        passages=("one", "three"),
        queries=("which?",),
        qrels=({1: 1.0},),
        remarks=("blank passages, left out: 1",),
    )
    with pytest.raises(BadInput, match="qrels without queries"):
        read_task(tmp_path / "t.txt", None, tmp_path / "r.tsv")
    with pytest.raises(BadOption, match="without texts"):
        read_task(None, tmp_path / "q.jsonl", None)
    with pytest.raises(BadInput, match="no such file"):
        read_task(tmp_path / "absent.txt", None, None)


def test_a_folder_brings_its_own_queries(tmp_path: Path):
    for name in ("corpus", "queries"):
        (tmp_path / f"{name}.jsonl").write_text('{"_id": "a", "text": "b"}\n')
    (tmp_path / "qrels.tsv").write_text("a\ta\t1\n")
    assert read_task(tmp_path, None, None).qrels == ({0: 1.0},)
    with pytest.raises(BadOption, match="its own queries"):
        read_task(tmp_path, tmp_path / "queries.jsonl", None)


# -- measuring -------------------------------------------------------------------------------


def test_every_level_is_measured_alike(measured: Report):
    costs = [result.costs for result in measured.results]
    assert len({(one.n_texts, one.n_tokens) for one in costs}) == 1
    for one in costs:
        assert len(one.tokens_per_s_rounds) == 2
        assert min(one.tokens_per_s_rounds) <= one.tokens_per_s <= max(one.tokens_per_s_rounds)
        assert 0 < one.latency_s < 5
        assert 0 < one.load_s < 60
        assert 10e6 < one.python_bytes < one.peak_bytes < 4e9
        assert one.spread >= 0
        assert one.settings is None  # not tuned


def test_the_reference_agrees_with_itself(measured: Report):
    quality = measured.results[0].quality
    assert quality.cosine.min == pytest.approx(1, abs=1e-6)
    assert quality.overlap == quality.recall == quality.ndcg_of_reference == 1
    assert quality.loss == Loss(mean=0, low=0, high=0)
    assert list(quality.by_dim) == [96, 64, 32]
    assert quality.by_dim[96] == quality.ndcg


def test_fewer_bits_are_further_away(measured: Report):
    exact, eight, four = (result.quality for result in measured.results)
    assert exact.cosine.mean > eight.cosine.mean > 0.999 > four.cosine.mean > 0.9
    assert eight.cosine.min <= eight.cosine.p1 <= eight.cosine.mean
    assert eight.overlap > four.overlap > 0.5
    assert 0 <= four.matching <= 1
    assert measured.trained_dims is False


def test_vectors_are_the_engines(measured: Report, tiny_model: Callable[..., Path], tmp_path: Path):
    """The child embeds with the prompts and the settings that it was given."""
    from gguf_embed import Embedder

    job = {
        "do": "vectors",
        "path": str(tiny_model("bert", pooling=Pooling.CLS)),
        "card": "multilingual-e5-large",  # for its prompts
        "settings": {"pooling": 1, "tune": False},
        "passages": TEXTS[:3],
        "queries": TEXTS[3:5],
        "parallel": [],
        "target": str(tmp_path / "v.npz"),
    }
    worker.turn(job, print)
    settings = Settings(tune=False, pooling=Pooling.MEAN)
    with np.load(tmp_path / "v.npz") as arrays, Embedder.open(job["path"], settings=settings) as e:
        for name, prompt in (("passages", "passage: "), ("queries", "query: ")):
            expected = e.encode(job[name], prompt=prompt)
            np.testing.assert_allclose(arrays[name], expected, atol=1e-5)
        assert arrays["parallel"].shape == (0, e.dim)


def test_without_queries_texts_are_their_own(tiny_model: Callable[..., Path], tmp_path: Path):
    subject = find_subject([str(tiny_model("bert", "F16")), str(tiny_model("bert", "Q8_0"))])
    compared = make_levels(subject, None, tmp_path, print)
    task = Task(name="t", passages=tuple(TEXTS[:12]), queries=(), qrels=None)
    options = replace(QUICK, rounds=1, matching=False)
    found = bench.run(subject, compared, task, options, scratch=tmp_path, say=print)
    quality = found.results[1].quality
    assert (quality.recall, quality.ndcg, quality.loss, quality.matching) == (None,) * 4
    assert quality.by_dim[96] == quality.ndcg_of_reference > 0.9
    assert any("no queries" in remark for remark in found.remarks)
    assert "of the ten nearest are the same" in report.verdict(found, found.results[1])


def test_the_planner_finds_what_was_measured(measured: Report, tiny_model: Callable[..., Path]):
    variant = variant_of(read_header(tiny_model("bert")))
    shape = kept.shape_key(variant.shape, variant.mode.pooling, causal=variant.mode.causal)
    found = kept.figures(kept.load(1), shape, variant.model)
    assert list(found) == ["F32", "Q8_0", "Q4_K_M"]
    for result in measured.results:
        figures, quality = found[result.level.name], result.quality
        assert figures.tokens_per_s == result.costs.tokens_per_s
        assert (figures.quality.reference, figures.quality.loss) == ("F32", quality.loss)
        assert (figures.quality.cosine, figures.quality.ndcg) == (quality.cosine.mean, quality.ndcg)
        assert figures.quality.texts == "34 passages of texts of the tests"


# -- failures --------------------------------------------------------------------------------


@pytest.fixture
def damaged(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with a good F16 and a Q8_0 whose weights are all NaN."""
    folder = tmp_path / "levels"
    folder.mkdir()
    (folder / "F16.gguf").symlink_to(tiny_model("bert", "F16"))
    whole = tiny_model("bert", "Q8_0")
    start = read_header(whole).header_bytes
    data = whole.read_bytes()
    (folder / "Q8_0.gguf").write_bytes(data[:start] + b"\xff" * (len(data) - start))
    return folder


def test_a_level_that_fails_is_left_out_and_told(damaged: Path, tmp_path: Path):
    said: list[str] = []
    subject = find_subject([str(damaged)])
    compared = make_levels(subject, None, tmp_path, said.append)
    options = replace(QUICK, rounds=1, matching=False)
    found = bench.run(subject, compared, TASK, options, scratch=tmp_path, say=said.append)
    assert found.results[0].quality is not None
    broken = found.results[1]
    assert (broken.costs, broken.quality) == (None, None)
    assert "NaN" in broken.failure
    assert any(line.startswith("Q8_0 fails and is left out: ") for line in said)
    assert report.verdict(found, broken).startswith("fails on this machine: ")
    assert "| Q8_0 |" in report.markdown(found)
    json.dumps(report.to_json(found))


def test_a_reference_that_fails_ends_it(damaged: Path, tmp_path: Path):
    (damaged / "F16.gguf").unlink()
    subject = find_subject([str(damaged)])
    compared = make_levels(subject, ["Q8_0"], tmp_path, print)
    with pytest.raises(NativeFailed, match="Q8_0, the level to compare with, fails: "):
        bench.run(subject, compared, TASK, QUICK, scratch=tmp_path, say=print)


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """child(code) is the name of a module that runs it in place of the worker."""
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def write(code: str) -> str:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "stand_in.py").write_text(code)
        return "stand_in"

    return write


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "its process died of SIGABRT"),
        (
            "import os, sys; print('GGML_ASSERT(n > 0) failed', file=sys.stderr, flush=True);"
            "os.kill(os.getpid(), 11)",
            r"its process died of SIGSEGV \(GGML_ASSERT\(n > 0\) failed\)",
        ),
        ("raise ValueError('no way')", "ValueError: no way"),
        ("pass", "its process ended without an answer"),
    ],
)
def test_a_crash_is_a_reason(code: str, reason: str, child: Callable[[str], str]):
    # More than a pipe holds: the child is gone before all of it is written.
    with pytest.raises(worker.TurnFailed, match=reason):
        worker.turn({"passages": ["text"] * 100_000}, print, module=child(code))


def test_an_interrupt_ends_the_child(child: Callable[[str], str]):
    code = 'import os, time; print(\'{"status": "%d"}\' % os.getpid(), flush=True); time.sleep(99)'
    pids: list[int] = []

    def interrupt(status: str) -> None:
        pids.append(int(status))
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        worker.turn({}, interrupt, module=child(code))
    assert time.monotonic() - began < 30
    assert not psutil.pid_exists(pids[0])


def test_peak_memory_is_kept():
    held = np.ones(64 * 2**20 // 8)
    before = psutil.Process().memory_info().rss
    del held
    # The kernel counts in batches of pages per thread.
    assert worker.peak_bytes() > 0.95 * before > 64 * 2**20


def test_a_busy_machine_is_told():
    assert bench.busy_remarks(None) == []
    assert bench.busy_remarks(Load(before=0.2, during=0.2)) == []
    (remark,) = bench.busy_remarks(Load(before=0.2, during=0.5))
    assert "kept 20 % of the cores busy before and 50 % during it: speeds are too low" in remark


def test_unsteady_rounds_are_told():
    assert bench.unsteady_remarks({"F16": costs(100, 110, 90), "Q8_0": costs(200, 190)}) == []
    (remark,) = bench.unsteady_remarks({"F16": costs(100, 110, 90), "Q8_0": costs(100, 140, 100)})
    assert remark.startswith("rounds of Q8_0 are up to 20 % off their median")


# -- judging ---------------------------------------------------------------------------------


@pytest.mark.branches
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=30, max_size=60).filter(
        lambda pairs: sum(r for _, r in pairs) > 0.1
    )
)
def test_the_loss_is_a_share_with_its_interval(pairs: list[tuple[float, float]]):
    level, reference = np.array(pairs).T
    loss = loss_of(level, reference)
    assert loss.mean == pytest.approx(1 - level.mean() / reference.mean(), abs=1e-9)
    assert loss.low <= loss.mean <= loss.high
    assert loss.bound >= abs(loss.mean) - 1e-12


def test_the_interval_is_of_paired_differences():
    """What makes a query hard does not widen it; the formula is that of a mean's interval."""
    reference = np.array([0.1, 0.9, 0.5, 0.7] * 10)
    one = pytest.approx(0.01 / 0.55)
    assert loss_of(reference - 0.01, reference) == Loss(mean=one, low=one, high=one)
    lost = np.array([0.0, 0.0, 0.2, 0.2] * 10)
    half = 1.96 * np.std(lost, ddof=1) / np.sqrt(40) / 0.55
    assert loss_of(reference - lost, reference).low == pytest.approx(0.1 / 0.55 - half)


def test_a_loss_is_above_zero_where_the_level_finds_less():
    axes = np.eye(32, dtype=np.float32)
    none = np.empty((0, 32), np.float32)
    task = Task(
        name="t",
        passages=tuple(map(str, range(32))),
        queries=tuple(map(str, range(32))),
        qrels=tuple({i: 1.0} for i in range(32)),
    )
    meter = QualityMeter(task, LevelVectors(passages=axes, queries=axes, parallel=none), (32,))
    worse = LevelVectors(passages=np.roll(axes, 1, axis=1), queries=axes, parallel=none)
    assert meter.quality(worse, n_truncated=0).loss.mean > 0.5


def test_few_queries_can_agree_by_chance():
    same = np.full(29, 0.5)
    assert loss_of(same, same) is None
    assert loss_of(np.full(30, 0.5), np.full(30, 0.5)) is not None
    assert loss_of(np.full(30, 0.5), np.zeros(30)) is None


def test_lengths_of_vectors():
    card = catalog.find("nomic-embed-text-v1.5")
    assert dims_of(card, 768) == (768, 512, 256, 128, 64)
    qwen = catalog.find("qwen3-embedding-0.6b")
    assert dims_of(qwen, 1024) == (1024, 512, 256, 128, 64, 32)
    assert dims_of(None, 384) == (384, 256, 128, 64, 32)
    assert dims_of(None, 16) == (16,)


def test_quality_of_known_vectors():
    """Four passages on the axes; a level that swaps two of them."""
    axes = np.eye(4, dtype=np.float32)
    task = Task(
        name="t", passages=("a", "b", "c", "d"), queries=("q", "r"), qrels=({0: 1.0}, {2: 1.0})
    )
    none = np.empty((0, 4), np.float32)
    queries = np.array([[1, 0.1, 0.2, 0], [0, 0.1, 1, 0.2]], np.float32)
    reference = LevelVectors(passages=axes, queries=queries, parallel=none)
    meter = QualityMeter(task, reference, (4, 2))
    assert meter.quality(reference, n_truncated=0).ndcg == 1
    swapped = LevelVectors(passages=axes[[1, 0, 2, 3]], queries=queries, parallel=none)
    quality = meter.quality(swapped, n_truncated=3)
    assert quality.cosine == CosineStats(mean=0.5, p1=0, min=0)
    # The first query finds its passage third, the second still first.
    assert quality.ndcg == pytest.approx((1 / np.log2(4) + 1) / 2)
    assert quality.loss is None  # of two queries
    assert quality.recall == 1  # there are but four passages
    assert (quality.matching, quality.n_truncated) == (None, 3)
    # Of the first two values nothing tells the passages c and d apart.
    assert quality.by_dim[2] < quality.by_dim[4] == quality.ndcg


# -- in words --------------------------------------------------------------------------------


def costs(*rounds: float) -> Costs:
    return Costs(
        tokens_per_s=float(np.median(rounds)),
        tokens_per_s_rounds=rounds,
        latency_s=0.004,
        load_s=0.1,
        peak_bytes=200 << 20,
        python_bytes=40 << 20,
        gpu_bytes=None,
        n_texts=10,
        n_tokens=1000,
        n_gpu_layers=0,
        settings=None,
    )


def quality(loss: tuple[float, float, float] | None = None, overlap: float = 1.0) -> Quality:
    return Quality(
        n_passages=1000,
        cosine=CosineStats(mean=0.99, p1=0.98, min=0.97),
        overlap=overlap,
        recall=None if loss is None else overlap,
        ndcg_of_reference=0.98,
        ndcg=None if loss is None else 0.5 * (1 - loss[0]),
        loss=None if loss is None else Loss(mean=loss[0], low=loss[1], high=loss[2]),
        matching=None,
        by_dim={384: 0.5, 128: 0.4},
        n_truncated=0,
    )


def result(name: str, size: int, costs: Costs | None, quality: Quality | None) -> Result:
    level = Level(
        name=name, path=Path(name), n_bytes=size << 20, made=False, types={name: 1.0}, fallbacks=()
    )
    return Result(level=level, costs=costs, quality=quality)


def made(*others: Result, has_quality: bool = True) -> Report:
    first = result("F16", 100, costs(100, 100, 100), quality((0, 0, 0)) if has_quality else None)
    return Report(
        model="m",
        reference="F16",
        dim=384,
        trained_dims=True,
        task="t",
        task_sha256="0" * 64,
        n_passages=1000,
        n_queries=0,
        has_qrels=True,
        rounds=3,
        results=(first, *others),
        remarks=(),
        machine={"cpu_model": "CPU", "usable_cores": 2, "os": "linux"},
        versions={"python": "3.11"},
        seconds=60,
    )


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ((0.001, -0.001, 0.0015), "as good as F16 within 0.2 % on these texts"),
        ((0.0, 0.0, 0.0), "as good as F16 within 0.1 % on these texts"),
        ((-0.004, -0.01, 0.002), "as good as F16 within 1.0 % on these texts"),
        ((0.012, 0.002, 0.022), "loses 1.2 % of the quality of F16 (0.2 to 2.2 %)"),
        (
            (0.012, -0.002, 0.026),
            "loses 1.2 % of the quality of F16, or it is chance (-0.2 to 2.6 %)",
        ),
        ((-0.012, -0.022, -0.002), "gains 1.2 % on the quality of F16 (0.2 to 2.2 %)"),
        (
            (-0.012, -0.026, 0.002),
            "gains 1.2 % on the quality of F16, or it is chance (-0.2 to 2.6 %)",
        ),
    ],
)
def test_quality_in_words(loss: tuple[float, float, float], words: str):
    other = result("Q8_0", 37, costs(200, 201, 202), quality(loss))
    assert report.verdict(made(other), other) == f"{words}, 2.0x faster, 37 % of the size"


@pytest.mark.parametrize(
    ("overlap", "words"),
    [
        (0.97, "finds nearly the same texts as F16 (97 % of the ten nearest are the same)"),
        (0.9, "finds mostly the same texts as F16 (90 % of the ten nearest are the same)"),
        (0.7, "finds other texts than F16 (only 70 % of the ten nearest are the same)"),
    ],
)
def test_agreement_in_words(overlap: float, words: str):
    other = result("Q8_0", 50, costs(200, 201, 202), quality(None, overlap))
    assert report.verdict(made(other), other).startswith(words)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ((200, 210, 205), "2.0x faster than F16"),
        ((50, 51, 52), "2.0x slower than F16"),
        ((106, 104, 95), "as fast as F16"),
        ((130, 108, 90), "not surely faster or slower than F16"),
        ((120, 120, 101), "1.2x faster than F16"),
    ],
)
def test_speed_in_words(rounds: tuple[float, ...], words: str):
    other = result("Q8_0", 50, costs(*rounds), None)
    assert report.verdict(made(other, has_quality=False), other) == f"{words}, 50 % of the size"


def test_one_bad_round_of_five_says_nothing():
    first = result("F16", 100, costs(100, 100, 100, 100, 100), None)
    other = result("Q8_0", 50, costs(200, 200, 60, 200, 200), None)
    found = replace(made(), results=(first, other))
    assert report.verdict(found, other) == "2.0x faster than F16, 50 % of the size"


def test_advice_takes_what_is_as_good_and_then_fast_or_small():
    good, bad = quality((0.001, 0, 0.002)), quality((0.05, 0.04, 0.06))
    fast = result("Q8_0", 50, costs(300, 300, 300), good)
    small = result("Q5_K_M", 35, costs(150, 150, 150), good)
    worse = result("Q2_K", 20, costs(900, 900, 900), bad)
    assert report.advice(made(fast, small, worse)) == (
        "take Q8_0 for speed or Q5_K_M for size: of the levels as good as F16 these are the "
        "fastest and the smallest"
    )
    assert report.advice(made(fast, worse)) == (
        "take Q8_0: of the levels as good as F16 it is the fastest and the smallest"
    )
    assert report.advice(made(worse)).startswith("take F16: ")
    # As fast as the fastest within the rounds, and smaller: a second run would say the same.
    level = result("Q6_K", 40, costs(290, 310, 300), good)
    assert report.advice(made(fast, level)).startswith("take Q6_K: ")
    unsure = result("Q6_K", 40, costs(250, 340, 299), good)
    assert report.advice(made(fast, unsure)).startswith("take Q6_K: ")
    unjudged = [replace(one, quality=None) for one in (fast, worse)]
    assert report.advice(made(*unjudged, has_quality=False)) == (
        "take Q2_K: of these levels it is the fastest and the smallest; not compared for quality"
    )
    few = [replace(one, quality=replace(quality(), n_passages=99)) for one in made(fast).results]
    assert report.advice(replace(made(), results=tuple(few))) == (
        "take Q8_0: of these levels it is the fastest and the smallest; too few texts to compare "
        "quality"
    )
    assert report.verdict(made(), few[1]).startswith("too few texts to tell it from F16 (100 % of")


def test_how_long_it_will_take():
    """Two levels, 10 and 20 texts/s: 3 rounds of 40 texts and vectors of 1,000, by hand."""
    seconds = estimate.forecast_s([10, 20], n_in_round=40, n_rounds=3, n_vectors=1000)
    assert seconds == pytest.approx(1120 / 10 + 1120 / 20 + 2 * 4 * estimate.TURN_S)
    assert estimate.forecast_s([10], n_in_round=40, n_rounds=1, n_vectors=0) == 4 + estimate.TURN_S


# -- the command -----------------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main(["bench", *map(str, arguments)])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def replay(measured: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without the work."""
    monkeypatch.setattr(levels, "make_levels", lambda *_: ())
    monkeypatch.setattr(bench, "run", lambda *_, **__: measured)


@pytest.mark.usefixtures("replay")
def test_tables_in_the_terminal(run: Run, tiny_model: Callable[..., Path], tmp_path: Path):
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    code, out, err = run(tiny_model("bert"), "--texts", tmp_path / "t.txt")
    assert (code, err) == (0, "")
    assert re.search(r"^level +size +tokens/s +spread +one text +load +RAM +types", out, re.M)
    assert re.search(r"^Q4_K_M\* +\d\.\d MiB +[\d,]+ +±\d+ % +\d+\.\d ms .*Q5_0 \d+ %", out, re.M)
    assert (
        "* Q4_K_M: matrices with rows of 96, which do not fill its blocks: Q5_0 for Q4_K (" in out
    )
    assert re.search(r"^Q8_0 +0\.99\d\d +0\.99\d\d +0\.99\d\d +\d+\.\d % +\d+\.\d %", out, re.M)
    assert re.search(r"^level +96 +64 +32$", out, re.M)
    assert re.search(r"^F32 +the reference$", out, re.M)
    assert re.search(r"^take \w+", out, re.M)


@pytest.mark.usefixtures("replay")
def test_json_report_and_plots(
    run: Run, tiny_model: Callable[..., Path], tmp_path: Path, measured: Report
):
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    paths = ("--report", tmp_path / "out.md", "--plots", tmp_path / "pictures")
    code, out, err = run(tiny_model("bert"), "--texts", tmp_path / "t.txt", "--json", *paths)
    assert code == 0, err
    assert err.count("wrote ") == 3
    found = json.loads(out)
    assert found["format"] == "gguf-embed-bench/1"
    assert [one["level"]["name"] for one in found["results"]] == ["F32", "Q8_0", "Q4_K_M"]
    assert found["results"][1]["costs"]["tokens_per_s"] > 0
    assert found["results"][2]["quality"]["by_dim"].keys() == {"96", "64", "32"}
    assert found["results"][0]["verdict"] == "the reference"
    text = (tmp_path / "out.md").read_text()
    assert "![levels](pictures/levels.png)" in text
    assert r"| Q4\_K\_M\* |" in text or r"| Q4_K_M\* |" in text
    for name in ("levels", "dims"):
        data = (tmp_path / "pictures" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_without_quality_the_report_says_so(measured: Report, tmp_path: Path):
    results = tuple(replace(one, quality=None) for one in measured.results)
    found = replace(measured, results=results)
    assert [table.title for table in report.tables(found)] == ["Size and speed"]
    assert [path.name for path in plots.draw(found, tmp_path)] == ["levels.png"]


def test_differences_within_the_noise_are_no_trend():
    """Points without a line, beside a band as wide as the widest interval."""
    from matplotlib import figure

    sheet = figure.Figure()
    level = result("Q4_0", 20, costs(300, 310, 290), quality((0.01, -0.02, 0.04)))
    found = made(level)
    plots.draw_dims(found, found.results, sheet)
    whole, share = sheet.axes
    assert [line.get_linestyle() for line in whole.lines] == ["-", "-"]
    assert [line.get_linestyle() for line in share.lines] == ["None", "None"]
    first, second = (line.get_xdata() for line in share.lines)
    assert not {*first} & {*second}  # they do not hide each other
    (band,) = share.patches
    assert band.get_extents().height > 0
    assert "noise" in share.get_ylabel()


@pytest.mark.parametrize("has_quality", [True, False])
def test_no_disc_is_cut_off(has_quality: bool):
    from matplotlib import figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sheet = figure.Figure(figsize=plots.SIZE, dpi=plots.DPI, layout="constrained")
    FigureCanvasAgg(sheet)
    level = result("Q4_0", 20, costs(300, 310, 290), quality((0, 0, 0)) if has_quality else None)
    found = made(level, has_quality=has_quality)
    plots.draw_levels(found, found.results, sheet)
    (axes,) = sheet.axes
    frame = axes.get_window_extent()
    for disc in axes.collections:
        ((x, y),) = axes.transData.transform(disc.get_offsets())
        radius = np.sqrt(disc.get_sizes()[0] / np.pi) * plots.DPI / 72
        assert frame.x0 < x - radius < x + radius < frame.x1
        assert frame.y0 < y - radius < y + radius < frame.y1


def test_one_round_has_no_spread():
    level = result("Q8_0", 50, costs(200, 200, 200), None)
    found = replace(made(level), rounds=1)
    (table, _, _) = report.tables(found)
    assert [row[3] for row in table.rows] == ["-", "-"]
    assert table.notes[0].startswith("tokens/s: median of one round of 10 texts")
    assert "- one round, 1 minutes in all" in report.markdown(found)


def test_single_texts_of_a_slow_model_take_no_longer_than_a_round(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """In this process, whose clock can be changed: a query takes a second."""
    job = {"path": str(tiny_model("bert")), "card": None, "settings": {"tune": False}}
    job |= {"do": "speed", "passages": TEXTS[:8], "queries": TEXTS[:24]}
    for seconds, n_latencies in ((0.1, 24), (1.0, 8)):
        monkeypatch.setattr(worker, "time", Clock(seconds))
        answer = worker.work(job, print)
        assert len(answer["latencies"]) == n_latencies - 1  # the first one warms up


class Clock:
    """Each look at it finds it later."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now


def test_the_first_example_needs_no_network(run: Run, monkeypatch: pytest.MonkeyPatch):
    """As in --help, on fewer texts; what it will take is told before the rounds begin."""
    monkeypatch.setattr(task_files, "docstring_task", lambda: TASK)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    example = next(line for line in bench_command.EPILOG.splitlines() if "bench" in line)
    words = example.split("   ")[0].split()[2:]
    code, out, err = run(*words, "--no-tune", "--rounds", 2)
    assert (code, "offline" in example) == (0, True)
    assert re.search(r"^Q8_0 +the reference$", out, re.M)
    said = [line.removeprefix("gguf-embed: ") for line in err.splitlines()]
    said = [line for line in said if not line.startswith("proved ")]  # where no test was before
    assert said[0].startswith("opening Q8_0, ")
    assert re.match(r"this will take about \d+ (s|min); shorter: ", said[1])
    assert re.match(r"speed: round 1 of 2, \d+ texts per level, about \d+ (s|min) left", said[2])


def test_no_quality_measures_none(tiny_model: Callable[..., Path], run: Run, tmp_path: Path):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    code, out, _ = run(
        *(tiny_model("bert"), "--quants", "f32", "--texts", tmp_path / "t.txt", "--rounds", 1),
        *("--no-quality", "--no-tune", "--json", "--quiet", "--limit", 9, "--scratch", tmp_path),
    )
    assert code == 0
    found = json.loads(out)
    assert found["results"][0]["quality"] is None
    assert "a sample: 9 of 64 passages" in found["remarks"]
    assert "no quality figures: they were not asked for (--no-quality)" in found["remarks"]
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--quants", ","], 2, "name levels, with commas between them"),
        (["--limit", "0"], 2, "not a whole number from 1"),
        (["--report", "absent/out.md"], 7, "absent/out.md: there is no directory"),
        (["--scratch", "absent"], 7, "absent: there is no directory absent; make it: mkdir"),
        (["--qrels", "absent.tsv"], 2, "queries or qrels without texts"),
        (["--quants", "Q9"], 2, "no level is called 'Q9'"),
    ],
)
def test_misuse(
    arguments: list[str],
    code: int,
    message: str,
    tiny_model: Callable[..., Path],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task_files, "docstring_task", lambda: TASK)
    found, out, err = run(tiny_model("bert"), *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_plots_without_matplotlib(
    tiny_model: Callable[..., Path], run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(tiny_model("bert"), "--plots", "x")
    assert (code, "gguf-embed[plots]" in err) == (2, True)


def test_ctrl_c_leaves_nothing_behind(tiny_model: Callable[..., Path], tmp_path: Path):
    texts, scratch = tmp_path / "t.txt", tmp_path / "scratch"
    texts.write_text("\n".join(TEXTS))
    scratch.mkdir()
    command = [sys.executable, "-m", "gguf_embed", "bench", str(tiny_model("bert"))]
    options = ["--quants", "Q8_0", "--texts", str(texts), "--rounds", "1000", "--no-tune"]
    with subprocess.Popen(
        [*command, *options, "--scratch", str(scratch)], stderr=subprocess.PIPE, text=True
    ) as process:
        seen: list[str] = []
        for line in process.stderr:
            seen.append(line)
            if "speed: round 2" in line:
                assert any(scratch.rglob("*.gguf")), "the level that was made"
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(20) == 130, seen
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(scratch.iterdir()) == []
    # One that was being started ends by itself, when its standard input does.
    assert psutil.wait_procs(children, timeout=20)[1] == []


# -- labels of plots -------------------------------------------------------------------------


def box(x: float, y: float, width: float, height: float) -> plots.Box:
    return plots.Box(x=x, y=y, width=width, height=height)


@given(*[st.tuples(*[st.integers(-20, 20)] * 2, *[st.integers(1, 20)] * 2)] * 2)
def test_shared_area(a: tuple[int, ...], b: tuple[int, ...]):
    """Against counting unit squares (doubled, so that middles are whole)."""

    def squares(x: int, y: int, width: int, height: int) -> set[tuple[int, int]]:
        return {
            (2 * x - width + 2 * i, 2 * y - height + 2 * j)
            for i in range(width)
            for j in range(height)
        }

    one, other = box(*a), box(*b)
    assert one.shared(other) == other.shared(one)
    if (a[2] - b[2]) % 2 == 0 and (a[3] - b[3]) % 2 == 0:
        assert one.shared(other) == len(squares(*a) & squares(*b))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(100, 900), st.integers(100, 500)), min_size=1, max_size=10))
def test_labels_do_not_cover_each_other(spots: list[tuple[int, int]]):
    discs = [box(x, y, 40, 40) for x, y in spots]
    labels = [box(0, 0, 60, 24)] * len(spots)
    frame = box(500, 300, 1000, 600)
    placed = plots.places(discs, labels, [], frame)
    for i, one in enumerate(placed):
        assert one.shared(frame) == pytest.approx(60 * 24)
        assert all(one.shared(other) == 0 for other in placed[:i])
        assert sum(one.shared(disc) for disc in discs) == 0
