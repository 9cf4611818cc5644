"""What was measured here: kept, found again, and never mixed up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import QWEN3_06B

from gguf_embed.catalog import catalog
from gguf_embed.gguf import layout
from gguf_embed.lab.metrics import as_good
from gguf_embed.machine import measured
from gguf_embed.machine.load import Load
from gguf_embed.machine.measured import (
    LevelFigures,
    LevelQuality,
    Loss,
    MeasuredRun,
    figures,
    keep,
    load,
)
from gguf_embed.native import library
from gguf_embed.system import paths
from gguf_embed.vectors import Pooling

KEY = measured.shape_key(QWEN3_06B, Pooling.LAST, causal=True)
QUALITY = LevelQuality(
    reference="F16",
    texts="my texts",
    cosine=0.99,
    overlap=0.93,
    ndcg=0.5,
    loss=Loss(mean=0.003, low=-0.001, high=0.007),
    as_good=True,
)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))


def measured_run(
    *quants: str,
    quality: LevelQuality | None = None,
    model: str = "m",
    texts: str = "t",
    by: measured.By = "bench",
    speed: float | None = 100.0,
) -> MeasuredRun:
    return MeasuredRun(
        model=model,
        shape=KEY,
        by=by,
        texts_sha256=texts,
        day="2026-09-30",
        levels={quant: LevelFigures(tokens_per_s=speed, quality=quality) for quant in quants},
    )


# -- what identifies a model ---------------------------------------------------------------------


def test_speed_belongs_to_a_shape():
    assert KEY == "qwen3 28x1024 heads 16/8x128 ff 3072 last"
    padded = replace(QWEN3_06B, n_vocab=151_936, n_ctx_train=40_960)
    assert measured.shape_key(padded, Pooling.LAST, causal=True) == KEY
    others = [
        measured.shape_key(QWEN3_06B, Pooling.MEAN, causal=True),
        measured.shape_key(QWEN3_06B, Pooling.LAST, causal=False),
        measured.shape_key(QWEN3_06B, Pooling.RANK, causal=True),
        measured.shape_key(replace(QWEN3_06B, n_layer=36), Pooling.LAST, causal=True),
        measured.shape_key(replace(QWEN3_06B, n_ff=1024), Pooling.LAST, causal=True),
        measured.shape_key(replace(QWEN3_06B, n_head_kv=16), Pooling.LAST, causal=True),
    ]
    assert len({KEY, *others}) == 7


def test_no_two_known_embedders_share_a_shape_and_a_name():
    """Models of one shape are told apart by their names, where quality is looked up."""
    cards = [c for c in catalog.cards() if c.shape and c.architecture in layout.ARCHITECTURES]
    keys = [(measured.shape_key(c.shape, c.pooling, causal=c.causal), c.id) for c in cards]
    assert len(set(keys)) == len(keys) > 5


# -- what counts ---------------------------------------------------------------------------------


def test_the_fullest_run_counts_and_of_equals_the_newest():
    few, many = measured_run("F16", "Q8_0", speed=1), measured_run("F16", "Q8_0", "Q4_0", speed=2)
    newer = measured_run("F16", "Q8_0", "Q6_K", speed=3)
    found = figures([many, few, newer], KEY, "m")
    assert {q: one.tokens_per_s for q, one in found.items()} == {"F16": 3, "Q8_0": 3, "Q6_K": 3}
    assert figures([many, newer, few], KEY, "m") == found
    assert figures([newer, many], KEY, "m")["Q4_0"].tokens_per_s == 2
    assert figures([many], "another shape", "m") == {}
    assert figures([], KEY, "m") == {}


def test_speed_and_quality_may_come_from_different_runs():
    fast = measured_run("F16", "Q8_0", "Q4_0", model="random weights", speed=7)
    good = measured_run("Q8_0", "Q6_K", quality=QUALITY, speed=1)
    found = figures([fast, good], KEY, "m")
    assert found == {
        "F16": LevelFigures(tokens_per_s=7),
        "Q8_0": LevelFigures(tokens_per_s=7, quality=QUALITY),
        "Q4_0": LevelFigures(tokens_per_s=7),
        "Q6_K": LevelFigures(quality=QUALITY),  # its speed was not measured beside the others'
    }
    assert figures([fast, good], KEY, "another")["Q8_0"].quality is None


@pytest.mark.parametrize(
    ("loss", "overlap", "known"),
    [
        (Loss(mean=0.001, low=-0.002, high=0.004), 0.5, True),
        (Loss(mean=-0.004, low=-0.01, high=0.002), 0.5, True),
        (Loss(mean=0.02, low=0.001, high=0.039), 1.0, False),
        (Loss(mean=0.02, low=-0.001, high=0.041), 1.0, None),  # or it is chance
        (Loss(mean=0.008, low=0.004, high=0.012), 1.0, None),  # lost, but how much?
        (Loss(mean=-0.02, low=-0.03, high=-0.01), 1.0, None),
        (None, 0.95, True),
        (None, 0.94, None),
        (None, 0.85, None),
        (None, 0.84, False),
    ],
)
def test_as_good_or_not_or_not_known(loss: Loss | None, overlap: float, known: bool | None):
    assert as_good(loss, overlap, 100) is known
    assert as_good(loss, overlap, 99) is (None if loss is None else known)


def test_quality_in_words():
    assert str(QUALITY) == "99.7 % of F16's nDCG@10"
    assert str(replace(QUALITY, loss=None)) == "93 % of F16's ten nearest texts"


BUSY = Load(before=0.1, during=0.6)
QUIET = Load(before=0.25, during=0.05)


def test_speeds_measured_beside_other_work_do_not_count():
    slow = replace(measured_run("F16", "Q8_0", "Q4_0", speed=1, quality=QUALITY), load=BUSY)
    fast = replace(measured_run("F16", "Q8_0", speed=9), load=QUIET)
    found = figures([fast, slow], KEY, "m")
    assert {q: one.tokens_per_s for q, one in found.items()} == {"F16": 9, "Q8_0": 9, "Q4_0": None}
    assert found["Q4_0"].quality == QUALITY  # which does not depend on it
    assert figures([replace(slow, levels=fast.levels)], KEY, "m") == {}


@pytest.mark.parametrize("by", ["bench", "tune"])
def test_a_busy_run_does_not_replace_a_quiet_one(by: measured.By):
    quiet = replace(measured_run("F16", by=by, speed=9), load=QUIET)
    busy = replace(measured_run("F16", by=by, speed=1), load=BUSY)
    keep(busy, 2)
    keep(quiet, 2)
    assert load(2) == (quiet,)
    keep(busy, 2)
    assert load(2) == (quiet, busy)
    assert figures(load(2), KEY, "m")["F16"].tokens_per_s == 9


def test_runs_of_the_tuner_together_have_the_worse_load():
    for quant, steal in (("F16", 0.1), ("Q8_0", 0.0)):
        run = measured_run(quant, by="tune", model="", texts="")
        keep(replace(run, load=replace(QUIET, steal=steal)), 2)
    (run,) = load(2)
    assert (set(run.levels), run.load) == ({"F16", "Q8_0"}, replace(QUIET, steal=0.1))


# -- kept ----------------------------------------------------------------------------------------


def test_what_is_kept_is_found_again_on_the_same_machine():
    one = measured_run("F16", "Q8_0", quality=QUALITY)
    bare = measured_run(
        "F16", quality=replace(QUALITY, loss=None, ndcg=None), model="n", speed=None
    )
    assert load(2) == ()
    keep(one, 2)
    keep(bare, 2)
    assert load(2) == (one, bare)
    assert load(4) == ()


def test_another_build_cpu_or_gpu_is_another_machine(monkeypatch: pytest.MonkeyPatch):
    keep(measured_run("F16"), 2)
    gpu = replace(library.devices()[0], kind="gpu", description="a card")
    for module, name, value in (
        (library, "build_id", lambda: "another"),
        (measured.tested, "cpu_id", lambda: "another"),
        (library, "devices", lambda: (gpu,)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert load(2) == ()
    assert len(load(2)) == 1


def test_a_run_replaces_what_it_covers():
    keep(measured_run("F16", "Q8_0", speed=1), 2)
    keep(measured_run("F16", "Q8_0", "Q4_0", speed=2), 2)
    assert load(2) == (measured_run("F16", "Q8_0", "Q4_0", speed=2),)
    keep(measured_run("F16", "Q8_0", speed=3), 2)  # one level less: the older one still knows more
    assert [len(one.levels) for one in load(2)] == [3, 2]
    for other in (measured_run("F16", model="n"), measured_run("F16", texts="u")):
        keep(other, 2)
        assert load(2)[-1] == other
    assert len(load(2)) == 4


def test_a_run_without_quality_does_not_replace_one_with_it():
    keep(measured_run("F16", "Q8_0", quality=QUALITY, speed=1), 2)
    keep(measured_run("F16", "Q8_0", speed=2), 2)
    found = figures(load(2), KEY, "m")
    assert (found["Q8_0"].tokens_per_s, found["Q8_0"].quality) == (2, QUALITY)


def test_levels_that_are_tuned_one_by_one_add_up():
    for quant, speed in (("F16", 1.0), ("Q8_0", 2.0), ("F16", 3.0)):
        keep(measured_run(quant, by="tune", model="", texts="", speed=speed), 2)
    keep(measured_run("F16", speed=9), 2)
    found = figures(load(2), KEY, "m")  # more levels than the bench has
    assert {quant: one.tokens_per_s for quant, one in found.items()} == {"F16": 3, "Q8_0": 2}


levels = st.dictionaries(
    st.sampled_from(["F16", "Q8_0", "Q4_0"]),
    st.builds(
        LevelFigures, tokens_per_s=st.none() | st.floats(1, 9), quality=st.sampled_from([QUALITY])
    ),
    min_size=1,
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)  # each writes files to disk
@given(st.lists(levels, max_size=6))
def test_no_measured_level_is_forgotten(each: list[dict[str, LevelFigures]]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_file", lambda _: paths.home() / "one.json")
        (paths.home() / "one.json").unlink(missing_ok=True)
        for one in each:
            keep(replace(measured_run(), levels=one), 2)
        quants = {quant for one in load(2) for quant in one.levels}
    assert quants == {quant for one in each for quant in one}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "null",
        "[" * 100_000,
        '[{"levels": {"F16": null}}]',
        "[{}]",
        '[{"levels": {"F16": 1}}]',
        '[{"levels": {}, "more": 1}]',
    ],
)
def test_a_file_that_is_not_understood_is_no_measurement(text: str):
    keep(measured_run("F16"), 2)
    (path,) = (paths.home() / "measured").iterdir()
    path.write_text(text)
    assert load(2) == ()
    keep(measured_run("Q8_0"), 2)
    assert load(2) == (measured_run("Q8_0"),)
    assert len(json.loads(path.read_text())) == 1


def test_a_home_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "file"))
    keep(measured_run("F16"), 2)
    assert "is not kept for `plan`" in caplog.text
