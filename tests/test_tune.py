"""The tuner: faster settings are found, wrong ones never kept, and what was learnt is kept well.

Most tests run it on a made-up machine, whose clock moves only when it computes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest
from conftest import Write
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.engine import tune, tune_record
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.runner import Outcome
from gguf_embed.engine.schedule import Cost
from gguf_embed.engine.tune import fit_cost
from gguf_embed.engine.tune_record import (
    Target,
    Trial,
    Tuned,
    best_run,
    keep_record,
    read_record,
    to_json,
)
from gguf_embed.errors import BadOption
from gguf_embed.gguf.header import read_header
from gguf_embed.machine import measured, selftest, tested
from gguf_embed.machine.load import Load
from gguf_embed.machine.selftest import SafePaths
from gguf_embed.native import library
from gguf_embed.native.model import Tokens
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.plan.variants import variant_of
from gguf_embed.system import paths
from gguf_embed.vectors import Pooling, Vectors

pytestmark = pytest.mark.native

LAST = EmbedMode(pooling=Pooling.LAST, causal=True, encoder=False)
MEAN = EmbedMode(pooling=Pooling.MEAN, causal=False, encoder=True)
ALL_WORKS = SafePaths(flash=True, repack=True, remark=None)


@pytest.fixture(scope="module")
def working() -> SafePaths:
    """What this machine can do, found out once."""
    return selftest.check(["F32"])


@pytest.fixture(autouse=True)
def own_home(working: SafePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing measured yet, but the self-test's verdict."""
    shutil.copytree(paths.home() / "selftest", tmp_path / "selftest")
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path))


START = RunSettings(n_threads=4, repack=False)  # as the plan has it for a causal F32 model


def target_of(path: Path, start: RunSettings = START, **changes: Any) -> Target:
    """A model on a machine with four cores, all of it on the CPU, and memory for everything."""
    target = Target(
        path=path, header=read_header(path), mode=LAST, safe=ALL_WORKS, n_cores=4, start=start
    )
    return replace(target, **changes)


@pytest.fixture(scope="module")
def target(tiny_model: Write) -> Target:
    return target_of(tiny_model("qwen3"))


# ------------------------------------------------------------------------ a made-up machine

Speed = Callable[[RunSettings, float], float]  # settings and time of day -> tokens per second


@dataclass(eq=False, slots=True)
class Machine:
    """Computes as fast as `speed` says, and wrongly where `wrong` says."""

    speed: Speed
    wrong: Callable[[RunSettings], bool] = lambda _: False
    load_s: float = 0.0
    now: float = 0.0
    n_loaded: int = 0
    n_in_memory: int = 0
    begun: list[float] = field(default_factory=list)  # when contexts were made

    def perf_counter(self) -> float:
        return self.now

    def model(self, _path: Path, *, n_gpu_layers: int, repack: bool) -> FakeModel:
        assert self.n_in_memory == 0, "two copies of the weights at once"
        self.n_loaded += 1
        self.n_in_memory += 1
        self.now += self.load_s
        return FakeModel(self, repack)

    def runner(self, model: FakeModel, _meaning: EmbedMode, settings: RunSettings) -> FakeRunner:
        assert model.repack == settings.repack
        self.begun.append(self.now)
        return FakeRunner(self, model, settings)

    def reference(self, *_: object) -> Vectors:
        return RIGHT


RIGHT: Vectors = np.eye(3, 8, dtype=np.float32)
WRONG: Vectors = np.roll(RIGHT, 1, axis=1)


@dataclass(eq=False, slots=True)
class FakeModel:
    machine: Machine
    repack: bool
    n_vocab: int = 100

    def close(self) -> None:
        self.machine.n_in_memory -= 1


@dataclass(eq=False, slots=True)
class FakeRunner:
    machine: Machine
    model: FakeModel
    settings: RunSettings

    def submit(self, sequences: Sequence[Tokens]) -> Future[Outcome]:
        n_tokens = sum(map(len, sequences))
        assert n_tokens <= self.settings.batch_tokens <= self.settings.max_batch_tokens
        self.machine.now += n_tokens / self.machine.speed(self.settings, self.machine.now)
        future: Future[Outcome] = Future()
        future.set_result(Outcome(vectors=RIGHT))
        return future

    def run(self, _sequences: Sequence[Tokens]) -> Outcome:
        return Outcome(vectors=WRONG if self.machine.wrong(self.settings) else RIGHT)

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: object) -> None: ...


class Measure(Protocol):
    """`tune.tune` on a made-up machine."""

    def __call__(self, machine: Machine, budget_s: float = 1e6, **changes: Any) -> Tuned: ...


@pytest.fixture(scope="module")
def measure(target: Target) -> Measure:
    def measure(machine: Machine, budget_s: float = 1e6, **changes: Any) -> Tuned:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "time", machine)
            patch.setattr(tune, "Model", machine.model)
            patch.setattr(tune, "Runner", machine.runner)
            patch.setattr(tune, "_reference", machine.reference)
            patch.setattr(tune, "tap_works", lambda *_: True)
            return tune.tune(replace(target, **changes), budget_s=budget_s)

    return measure


def product(factors: Mapping[str, Mapping[Any, float]]) -> Speed:
    """A speed that each setting changes by its own factor, whatever the others are."""

    def speed(settings: RunSettings, _now: float) -> float:
        tokens_per_s = 10_000.0
        for name, factor in factors.items():
            tokens_per_s *= factor.get(getattr(settings, name), 1.0)
        return tokens_per_s

    return speed


def test_what_is_faster_is_found(measure: Measure, target: Target):
    factors = {
        "repack": {True: 1.3},
        "n_contexts": {2: 1.2, 4: 1.1},
        "flash_attn": {False: 1.5},
        "batch_tokens": {256: 1.4},
    }
    machine = Machine(speed=product(factors), load_s=5.0)
    tuned = measure(machine)
    assert tuned.settings == RunSettings(
        batch_tokens=256, n_contexts=2, n_threads=2, repack=True, flash_attn=False
    )
    assert tuned.tokens_per_s == pytest.approx(10_000 * 1.3 * 1.2 * 1.5 * 1.4)
    assert tuned.untuned_tokens_per_s == pytest.approx(10_000)
    assert tuned.seconds == pytest.approx(machine.now)
    assert [trial.changed for trial in tuned.trials if trial.kept] == [
        "start",
        "repack = True",
        "contexts = (2, 2)",
        "flash_attn = False",
        "batch_tokens = 256",
    ]
    assert machine.n_loaded == 2  # repacking alone needs the weights anew
    assert machine.n_in_memory == 0
    assert read_record(target) == tuned


def test_a_size_between_those_tried_is_found_by_their_cost(measure: Measure):
    """Cheapest per token: sqrt(fixed_s / pair_s) = 400 tokens, rounded down to a step of 32."""
    cost = Cost(fixed_s=0.16, token_s=1e-3, pair_s=1e-6)

    def speed(settings: RunSettings, _now: float) -> float:
        return settings.batch_tokens / cost.seconds(settings.batch_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "GAIN", 1.0)
        tuned = measure(Machine(speed=speed))
    assert tuned.settings.batch_tokens == 384
    assert tuned.trials[-1].changed == "batch_tokens = 384, fitted"
    assert tuned.cost is not None
    assert tuned.cost.best_tokens(512) == 400


def test_a_gain_within_the_noise_changes_nothing(measure: Measure):
    factors = {name: {True: 1.02, False: 1.0} for name in ("repack", "flash_attn")}
    factors["batch_tokens"] = {128: 1.02}
    assert measure(Machine(speed=product(factors))).settings == START


def test_a_machine_that_becomes_quieter_changes_nothing(measure: Measure):
    """What is tried later would seem faster: the best so far is timed again beside it."""
    machine = Machine(speed=lambda _, now: 1000.0 * (1 + now))
    working = replace(ALL_WORKS, repack=False)
    assert measure(machine, safe=working).settings == START


CHOICES: dict[str, list[Any]] = {
    "repack": [True, False],
    "n_contexts": [1, 2, 4],
    "flash_attn": [True, False],
    "batch_tokens": [128, 256, 384, 512],
}
factors = st.fixed_dictionaries(
    {
        name: st.fixed_dictionaries({value: st.floats(0.25, 4) for value in values})
        for name, values in CHOICES.items()
    }
)
some_choices = st.sets(st.sampled_from([(name, v) for name, vs in CHOICES.items() for v in vs]))


@settings(deadline=None, max_examples=50)
@given(factors=factors, wrong=some_choices, budget_s=st.floats(0, 30))
def test_never_wrong_never_slower_never_late(
    measure: Measure,
    factors: Mapping[str, Mapping[Any, float]],
    wrong: set[tuple[str, Any]],
    budget_s: float,
):
    def is_wrong(settings: RunSettings) -> bool:
        return any((name, getattr(settings, name)) in wrong for name in CHOICES)

    machine = Machine(speed=product(factors), wrong=is_wrong, load_s=0.1)
    tuned = measure(machine, budget_s)
    if not all(is_wrong(trial.settings) for trial in tuned.trials):
        assert not is_wrong(tuned.settings)
    if not is_wrong(tuned.trials[0].settings):
        assert tuned.tokens_per_s >= tuned.untuned_tokens_per_s
    assert len({trial.settings for trial in tuned.trials}) == len(tuned.trials)
    # Once the time is up, at most the best so far is timed again beside the last candidate.
    assert sum(begun > budget_s for begun in machine.begun) <= 1
    assert machine.n_in_memory == 0


def test_a_start_with_wrong_vectors_loses_to_a_slower_right_one(measure: Measure):
    speed = product({"flash_attn": {False: 0.5}})
    tuned = measure(Machine(speed=speed, wrong=lambda settings: settings.flash_attn))
    assert not tuned.settings.flash_attn
    assert tuned.tokens_per_s == pytest.approx(5000)


def test_vectors_that_are_always_wrong_are_reported(
    measure: Measure, target: Target, caplog: pytest.LogCaptureFixture
):
    measure(Machine(speed=product({}), wrong=lambda _: True))
    assert f"{target.path}: no settings give the vectors of llama.cpp" in caplog.text


@pytest.mark.parametrize("tokens_per_s", [1.0, 30.0])
def test_a_slow_machine_does_not_wait_long(tokens_per_s: float, measure: Measure):
    """The first measurement cannot be left out, but it need not be repeated."""
    machine = Machine(speed=lambda *_: tokens_per_s)
    tuned = measure(machine, 10)
    assert machine.now <= 10 + 512 / tokens_per_s
    assert tuned.settings == START
    assert tuned.tokens_per_s == pytest.approx(tokens_per_s)


def test_no_trial_where_the_self_test_forbids(measure: Measure):
    working = SafePaths(flash=False, repack=False, remark=None)
    start = replace(START, repack=True)  # the user wanted it
    tuned = measure(Machine(speed=product({})), safe=working, start=start)
    assert not any(trial.settings.repack or trial.settings.flash_attn for trial in tuned.trials)


ON_GPU = replace(START, n_gpu_layers=3)
GPU: dict[str, Any] = {"tier": "gpu", "gpus": ("RTX",), "start": ON_GPU}


def test_on_a_gpu_microbatches_grow_and_the_tap_must_pay(measure: Measure, target: Target):
    factors = {"max_batch_tokens": {256: 9.0, 1024: 1.2, 2048: 1.5}, "tap": {False: 1.1}}
    tuned = measure(Machine(speed=product(factors)), **GPU)
    assert tuned.settings == RunSettings(
        max_batch_tokens=2048,
        batch_tokens=2048,
        n_threads=4,
        n_gpu_layers=3,
        repack=False,
        tap=False,
    )
    assert {t.settings.n_contexts for t in tuned.trials} == {1}
    assert {t.settings.max_batch_tokens for t in tuned.trials} == {512, 1024, 2048}
    # Kept for these GPUs, and not for the CPU alone or layers shared with it.
    on_gpu = replace(target, **GPU)
    assert read_record(on_gpu) == tuned
    for other in (target, replace(on_gpu, tier="split"), replace(on_gpu, gpus=("GTX",))):
        assert read_record(other) is None
    assert read_record(replace(on_gpu, start=replace(START, n_gpu_layers=9))) == tuned


def test_weights_that_stay_on_the_cpu_may_still_be_repacked(measure: Measure):
    machine = Machine(speed=product({"repack": {True: 1.5}}))
    assert not measure(machine, **GPU).settings.repack
    assert measure(machine, **GPU | {"tier": "split"}).settings.repack


def test_what_there_is_no_memory_for_is_not_tried(measure: Measure):
    def fits(settings: RunSettings) -> bool:
        return settings.max_batch_tokens <= 1024 and settings.tap

    factors = {"max_batch_tokens": {2048: 9.0, 1024: 1.2}, "tap": {False: 9.0}}
    tuned = measure(Machine(speed=product(factors)), **GPU, fits=fits)
    assert all(fits(trial.settings) for trial in tuned.trials)
    assert tuned.settings.max_batch_tokens == 1024


def test_each_trial_is_told_as_it_ends(
    target: Target, working: SafePaths, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tune, "MIN_TIMING_S", 0.001)
    told: list[Trial] = []
    single = replace(target, safe=working, n_cores=1, start=replace(START, n_threads=1))
    tuned = tune.tune(single, budget_s=0, on_trial=told.append)
    assert tuple(told) == tuned.trials
    assert [trial.changed for trial in told] == ["start"]


# ------------------------------------------------------------------------------ for real


@pytest.mark.parametrize("architecture", ["qwen3", "bert", "qwen2_bidirectional"])
def test_a_tuned_model_works(
    architecture: str, working: SafePaths, tiny_model: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tune, "MIN_TIMING_S", 0.002)
    path = tiny_model(architecture)
    texts = ["the cat sat on the mat", "a dog in the river", "bread"]
    with Embedder.open(path, settings=Settings(tune=False, n_threads=2)) as embedder:
        expected, target = embedder.encode(texts), embedder.target
    tuned = tune.tune(target, budget_s=60)
    assert min(trial.cosine for trial in tuned.trials) > 0.9999
    assert {trial.settings.n_contexts * trial.settings.n_threads for trial in tuned.trials} == {2}
    assert {trial.settings.batch_tokens for trial in tuned.trials} >= set(tune.BATCH_TOKENS)
    assert tuned.cost is not None
    # `plan` finds it by what it knows of a file before there is a model.
    found = variant_of(target.header)
    key = measured.shape_key(found.shape, found.mode.pooling, causal=found.mode.causal)
    (series,) = measured.load(2)
    assert (series.by, series.shape) == ("tune", key)
    assert series.levels == {"F32": measured.LevelFigures(tokens_per_s=tuned.tokens_per_s)}
    with Embedder.open(path, settings=Settings(n_threads=2)) as embedder:
        run = embedder.run_settings
        assert run == tuned.settings
        cosines = np.einsum("nd,nd->n", embedder.encode(texts), expected)
        assert cosines.min() > 0.99999


def test_wrong_kernels_are_seen_by_their_vectors(
    target: Target, working: SafePaths, monkeypatch: pytest.MonkeyPatch
):
    """The real search with real contexts; two contexts read each text backwards."""
    monkeypatch.setattr(tune, "MIN_TIMING_S", 0.002)

    class Broken(tune.Runner):
        n_wrong: ClassVar[int] = 0

        def run(self, sequences: Sequence[Tokens], **how: Any) -> Outcome:
            if self.settings.n_contexts == 2:
                Broken.n_wrong += 1
                sequences = [sequence[::-1] for sequence in sequences]
            return super().run(sequences, **how)

    monkeypatch.setattr(tune, "Runner", Broken)
    monkeypatch.setattr(tune, "GAIN", 0.0)  # anything counts as faster
    both = replace(target, safe=working, n_cores=2, start=replace(START, n_threads=2))
    tuned = tune.tune(both, budget_s=60)
    assert Broken.n_wrong
    assert tuned.settings.n_contexts == 1
    assert [t.cosine < 0.99 for t in tuned.trials] == [
        t.settings.n_contexts == 2 for t in tuned.trials
    ]


# ------------------------------------------------------------------------------ best_run


def record(settings: RunSettings, cost: Cost | None = None) -> Tuned:
    start = RunSettings(n_threads=3, repack=False)
    trials = (
        Trial(changed="start", settings=start, tokens_per_s=1.5, cosine=1.0, kept=True),
        Trial(changed="x = (1, 2)", settings=settings, tokens_per_s=2.5, cosine=0.5, kept=False),
    )
    return Tuned(
        settings=settings,
        tokens_per_s=2.5,
        untuned_tokens_per_s=1.5,
        seconds=0.1,
        trials=trials,
        cost=cost,
    )


def chosen(target: Target, settings: Settings = Settings()) -> RunSettings:  # noqa: B008 (frozen)
    return best_run(target, settings)


def test_without_a_measurement_it_runs_as_planned(target: Target, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "tune", lambda *_, **__: pytest.fail("an opening measures nothing"))
    assert chosen(target) == START


def test_what_the_user_says_is_as_planned(target: Target):
    planned = replace(START, max_batch_tokens=99, batch_tokens=99)
    assert chosen(replace(target, start=planned), Settings(max_batch_tokens=99)) == planned


def test_what_was_measured_is_used_again(target: Target):
    kept = RunSettings(max_batch_tokens=55, batch_tokens=50, n_contexts=2, n_threads=2)
    keep_record(record(kept), target)
    assert chosen(target) == kept
    # And the user still has the last word.
    wanted = Settings(max_batch_tokens=44, n_contexts=3, n_threads=4, tap=False)
    planned = RunSettings(
        max_batch_tokens=44, batch_tokens=44, n_contexts=3, n_threads=4, tap=False, repack=False
    )
    found = chosen(replace(target, start=planned), wanted)
    assert found == replace(planned, repack=True)


def test_a_run_is_repeated_as_far_as_it_can_be(target: Target):
    keep_record(record(RunSettings(max_batch_tokens=55, batch_tokens=50)), target)
    before = RunSettings(
        max_batch_tokens=66, batch_tokens=33, n_contexts=3, n_threads=2, n_gpu_layers=2, tap=True
    )
    again = Settings(run=before)
    assert chosen(target, again) == replace(before, n_gpu_layers=0)
    assert chosen(replace(target, **GPU), again) == before
    assert chosen(target, replace(again, tap=False)) == replace(before, n_gpu_layers=0, tap=False)
    little = replace(target, fits=lambda run: run.max_batch_tokens < 66)
    assert chosen(little, again).max_batch_tokens == 55
    with pytest.raises(BadOption, match="run="):
        Settings(run="fast")  # type: ignore[arg-type]


def test_a_measurement_is_used_as_far_as_there_is_memory(target: Target):
    kept = RunSettings(max_batch_tokens=1024, repack=True, flash_attn=True, n_gpu_layers=2)
    on_gpu = replace(target, **GPU)
    keep_record(record(kept), on_gpu)
    assert chosen(on_gpu) == replace(kept, n_gpu_layers=3)  # the plan's count, not an earlier one
    small = replace(ON_GPU, max_batch_tokens=128, batch_tokens=128)
    little = replace(on_gpu, start=small, fits=lambda run: run.max_batch_tokens <= 128)
    assert chosen(little) == replace(small, repack=True)  # what costs no memory stays


def test_what_the_user_wants_counts_towards_memory(target: Target):
    keep_record(record(RunSettings(n_contexts=4, max_batch_tokens=256)), target)
    bounded = replace(target, fits=lambda run: run.n_contexts * run.max_batch_tokens <= 1024)
    for n_tokens, n_contexts in ((256, 4), (1024, 1)):
        wanted = Settings(n_threads=4, max_batch_tokens=n_tokens)
        planned = replace(START, max_batch_tokens=n_tokens, batch_tokens=n_tokens)
        run = chosen(replace(bounded, start=planned), wanted)
        assert (run.max_batch_tokens, run.n_contexts) == (n_tokens, n_contexts)


def test_threads_without_contexts_are_cores_to_share_out(target: Target):
    keep_record(record(RunSettings(n_contexts=3, n_threads=2)), replace(target, n_cores=6))
    six = chosen(replace(target, n_cores=6), Settings(n_threads=6))
    assert (six.n_contexts, six.n_threads) == (3, 2)
    five = replace(target, n_cores=5, start=replace(START, n_threads=5))
    assert chosen(five, Settings(n_threads=5)) == five.start  # not measured with so many


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("repack", [True, False])
def test_what_crashed_in_the_self_test_is_never_chosen(flash: bool, repack: bool, target: Target):
    """Not by a measurement made before a rebuild, and not by the user."""
    safe = SafePaths(flash=flash, repack=repack, remark=None)
    wish = replace(START, flash_attn=True, repack=True)
    keep_record(record(RunSettings(flash_attn=True, repack=True)), target)
    for said in (Settings(), Settings(flash_attn=True, repack=True)):
        run = chosen(replace(target, safe=safe, start=wish), said)
        assert (run.flash_attn, run.repack) == (flash, repack)


# ---------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("cost", [None, Cost(fixed_s=0.1, token_s=1e-5, pair_s=0.0)])
def test_a_record_is_read_as_it_was_written(cost: Cost | None, target: Target):
    tuned = record(RunSettings(n_contexts=2, flash_attn=False), cost)
    assert read_record(target) is None
    keep_record(tuned, target)
    assert read_record(target) == tuned
    assert json.loads(to_json(tuned)) == json.loads(json.dumps(asdict(tuned)))


def test_what_was_measured_beside_other_work_serves_until_the_machine_is_quiet(
    target: Target, monkeypatch: pytest.MonkeyPatch
):
    busy = replace(record(RunSettings(max_batch_tokens=55)), load=Load(before=0.5, during=0.0))
    keep_record(busy, target)
    assert read_record(target) is None  # quiet, as far as the tests can tell

    class Busy:
        quiet = False

        def __init__(self, n_cores: int) -> None:
            pass

    monkeypatch.setattr(tune_record, "LoadMeter", Busy)
    assert read_record(target) == busy
    quiet = replace(busy, load=Load(before=0.2, during=0.2))
    keep_record(quiet, target)
    assert read_record(target) == quiet


def test_what_a_run_learned_beside_other_work_does_not_serve(
    target: Target, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tune_record, "LoadMeter", lambda _: pytest.fail("it takes a fifth of 1 s"))
    learned = replace(record(RunSettings(max_batch_tokens=55)), by="run")
    keep_record(replace(learned, load=Load(before=0.5, during=0.5)), target)
    assert read_record(target) is None
    quiet = replace(learned, load=Load(before=0.1, during=0.1))
    keep_record(quiet, target)
    assert read_record(target) == quiet


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown setting": lambda kept: kept["settings"].update(colour="red"),
    "an unknown key": lambda kept: kept.update(colour="red"),
    "no trials": lambda kept: kept.pop("trials"),
    "no speed": lambda kept: kept.pop("tokens_per_s"),
    "trials that are no list": lambda kept: kept.update(trials=5),
    "a trial that is none": lambda kept: kept.update(trials=[5]),
    "settings that are none": lambda kept: kept.update(settings=5),
    "a cost that is none": lambda kept: kept.update(cost=[1, 2]),
    "a speed that is no number": lambda kept: kept.update(tokens_per_s=float("nan")),
    "threads that are no number": lambda kept: kept["settings"].update(n_threads="2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_of_another_form_is_ignored(damage: str, target: Target):
    keep_record(record(RunSettings()), target)
    (path,) = tune_record.record_path(target).parent.iterdir()
    kept = json.loads(path.read_text())
    DAMAGE[damage](kept)
    path.write_text(json.dumps(kept))
    assert read_record(target) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"5", b"null", b"[" * 100_000, b'"text"', b"\xff\xfe{}"]
)
def test_a_damaged_record_is_ignored_and_replaced(content: bytes, target: Target):
    path = tune_record.record_path(target)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert read_record(target) is None
    keep_record(record(RunSettings()), target)
    assert read_record(target) == record(RunSettings())


def test_a_measurement_holds_for_its_machine_build_and_model(
    target: Target, tiny_model: Write, monkeypatch: pytest.MonkeyPatch
):
    keep_record(record(RunSettings()), target)
    assert read_record(target)
    assert read_record(replace(target, n_cores=1)) is None
    assert read_record(target_of(tiny_model("qwen3", "Q8_0"))) is None
    # IQ4_NL and Q4_0, for one, are of the same size.
    retyped = tuple(replace(tensor, type="IQ4_NL") for tensor in target.header.tensors)
    assert read_record(replace(target, header=replace(target.header, tensors=retyped))) is None
    for module, name in ((library, "build_id"), (tested, "cpu_id")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: "another")
            assert read_record(target) is None
    assert read_record(target)


def test_the_files_name_and_place_do_not_matter(target: Target, tiny_model: Write, tmp_path: Path):
    keep_record(record(RunSettings()), target)
    moved = tmp_path / "moved.gguf"
    moved.hardlink_to(tiny_model("qwen3"))
    assert read_record(target_of(moved))


def test_a_home_that_cannot_be_written_costs_the_record_only(
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "file"))
    keep_record(record(RunSettings()), target)
    assert "not kept" in caplog.text
    assert read_record(target) is None


# ---------------------------------------------------------------------- cost of a microbatch

costs = st.builds(
    Cost,
    fixed_s=st.one_of(st.just(0.0), st.floats(1e-4, 1)),
    token_s=st.one_of(st.just(0.0), st.floats(1e-6, 1e-2)),
    pair_s=st.one_of(st.just(0.0), st.floats(1e-8, 1e-5)),
)
sizes = st.sets(st.integers(8, 4096), min_size=3, max_size=8)


@given(costs, sizes, st.lists(st.floats(1, 3), min_size=8, max_size=8))
def test_the_cost_of_a_microbatch_is_recovered(cost: Cost, sizes: set[int], noise: list[float]):
    """Each size once as it is and once more with noise, which only ever adds."""
    timings = [(n, cost.seconds(n)) for n in sizes]
    noisy = [(n, s * factor) for (n, s), factor in zip(timings, noise, strict=False)]
    fitted = fit_cost([*noisy, *timings])
    assert fitted is not None
    for n in sizes:
        assert fitted.seconds(n) == pytest.approx(cost.seconds(n), rel=1e-6, abs=1e-9)


timings = st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-6, 100)), max_size=12)


@given(timings)
def test_no_term_is_negative_whatever_was_measured(timings: list[tuple[int, float]]):
    fitted = fit_cost(timings)
    assert (fitted is None) == (len({n for n, _ in timings}) < 3)
    if fitted is not None:
        assert min(fitted.fixed_s, fitted.token_s, fitted.pair_s) >= 0
        assert fitted.best_tokens(512) in range(1, 513)


def test_a_term_left_out_is_made_up_for_by_the_others():
    """Concave timings ask for a negative square; setting it to 0 afterwards would be far off."""
    timings = [(128, 0.2), (256, 0.4), (512, 0.8), (1024, 1.4)]
    fitted = fit_cost(timings)
    assert fitted is not None
    assert fitted.pair_s == 0
    for n_tokens, seconds in timings:
        assert fitted.seconds(n_tokens) == pytest.approx(seconds, rel=0.15)
