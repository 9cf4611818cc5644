"""Which settings run a model fastest on this machine: the whole search, measured and kept.

Starting from settings that are right everywhere, one setting after the other is changed and kept
if real microbatches run faster. A setting whose vectors differ from those of llama.cpp's own
pooling is never kept. The speed of the winner is kept for `plan`, which compares levels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gguf_embed.engine.runner import Runner, tap_works
from gguf_embed.engine.schedule import Cost
from gguf_embed.engine.tune_record import Target, Trial, Tuned, keep_record, safe_run
from gguf_embed.gguf.header import Header
from gguf_embed.gguf.layout import shape_of
from gguf_embed.gguf.quants import tolerance
from gguf_embed.machine import measured
from gguf_embed.machine.load import LoadMeter
from gguf_embed.machine.measured import LevelFigures, MeasuredRun
from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings
from gguf_embed.vectors import Vectors, finish, least_cosine

_log = logging.getLogger(__name__)

SHORT_S = 15.0  # a search that leaves out what is not likely to win
MIN_TIMING_S = 0.25  # a shorter timing is repeated up to this: the clock and the scheduler blur it
GAIN = 1.03  # a change must be this much faster: less is noise
TEXT_TOKENS = 128  # a paragraph: about the length that most people embed
BATCH_TOKENS = (128, 256, 512)  # tried; then what their fitted cost says is best
BATCH_STEP = 32  # that is rounded to


def tune(
    target: Target, *, budget_s: float, on_trial: Callable[[Trial], None] | None = None
) -> Tuned:
    """Measure, keep and return the best settings; stops changing things when `budget_s` is over."""
    search = _Search(target, budget_s, on_trial)
    meter = LoadMeter(target.n_cores)
    best = search.run(safe_run(target.start, target.safe), _changes(target))
    load = meter.end()
    cost = fit_cost(search.timings(best.settings))
    tuned = Tuned(
        settings=best.settings,
        tokens_per_s=best.tokens_per_s,
        untuned_tokens_per_s=search.trials[0].tokens_per_s,
        seconds=time.perf_counter() - search.began,
        trials=tuple(search.trials),
        cost=cost,
        load=load,
    )
    if load is not None and not load.quiet:
        _log.info("%s: %s; it will be measured again when the machine is quiet", target.path, load)
    if not best.cosine >= search.min_cosine:  # NaN as well
        _log.warning(
            "%s: no settings give the vectors of llama.cpp's own pooling (cosine %.4f)",
            target.path,
            best.cosine,
        )
    else:
        measured.keep(measured_run(tuned, target.header, target.mode), target.n_cores)
    keep_record(tuned, target)
    return tuned


def measured_run(tuned: Tuned, header: Header, mode: EmbedMode) -> MeasuredRun:
    """The speed of this level, for comparison with others that were tuned."""
    figures = LevelFigures(
        tokens_per_s=tuned.tokens_per_s, n_gpu_layers=tuned.settings.n_gpu_layers
    )
    return MeasuredRun(
        model="",
        shape=measured.shape_key(shape_of(header), mode.pooling, causal=mode.causal),
        by="tune",
        texts_sha256="",
        day=measured.today(),
        levels={header.quant: figures},
        load=tuned.load,
    )


def _changes(target: Target) -> Iterable[tuple[str, Sequence[Any]]]:
    """Settings to try, in order of what they usually gain; contexts come as (contexts, threads)."""
    safe, n_cores = target.safe, target.n_cores
    # Repacking means loading the weights once more, so it comes first, with its own best batch.
    if target.tier != "gpu":
        yield "repack", [True, False] if safe.repack else [False]
    if target.tier == "cpu":
        yield "contexts", [(n, n_cores // n) for n in range(1, n_cores + 1) if n_cores % n == 0]
    else:  # contexts would only wait for each other on a GPU
        yield "max_batch_tokens", [512, 1024, 2048]
        # The tap stops the graph at a tensor, which costs a GPU some of its pipelining.
        yield "tap", [False]
    yield "flash_attn", [True, False] if safe.flash else [False]
    if target.tier == "cpu":
        yield "batch_tokens", BATCH_TOKENS
    if safe.accelerator:  # last, as it is not likely to win
        # Repacked weights, in a layout of ggml's own, are out of our kernels' sight.
        yield "accelerator, repack", [(False, target.start.repack and safe.repack)]


class _Search:
    """Coordinate descent over settings, with each candidate timed next to the best so far."""

    def __init__(
        self, target: Target, budget_s: float, on_trial: Callable[[Trial], None] | None
    ) -> None:
        self.target = target
        self.mode = target.mode
        self.min_cosine = tolerance(target.header.matrix_types)
        self.on_trial = on_trial
        self.began = time.perf_counter()
        self.deadline = self.began + budget_s
        self.trials: list[Trial] = []
        self._timings: list[tuple[RunSettings, float]] = []  # seconds of one microbatch
        self._model: Model | None = None
        self._reference: Vectors | None = None

    def run(self, start: RunSettings, changes: Iterable[tuple[str, Sequence[Any]]]) -> Trial:
        """The best trial."""
        try:
            best = self._first(start)
            tried = {best.settings}
            for name, values in changes:
                for value in values:
                    if time.perf_counter() > self.deadline:
                        return best
                    settings = _with(best.settings, name, value)
                    if settings not in tried and self.target.fits(settings):
                        tried.add(settings)
                        best = self._challenge(best, settings, f"{name} = {value}")
            return self._fitted(best, tried)
        finally:
            if self._model is not None:
                self._model.close()

    def timings(self, like: RunSettings) -> list[tuple[int, float]]:
        """Tokens and seconds of each microbatch timed with these settings, whatever its size."""
        return [
            (settings.batch_tokens, seconds)
            for settings, seconds in self._timings
            if replace(settings, batch_tokens=like.batch_tokens) == like
        ]

    def _fitted(self, best: Trial, tried: set[RunSettings]) -> Trial:
        """Try the size that the cost of those tried says is best: it may lie between them."""
        cost = fit_cost(self.timings(best.settings))
        if cost is None or time.perf_counter() > self.deadline:
            return best
        n_tokens = cost.best_tokens(best.settings.max_batch_tokens)
        n_tokens = max(BATCH_STEP, n_tokens - n_tokens % BATCH_STEP)
        settings = replace(best.settings, batch_tokens=n_tokens)
        if settings in tried:
            return best
        return self._challenge(best, settings, f"batch_tokens = {n_tokens}, fitted")

    def _first(self, settings: RunSettings) -> Trial:
        model = self._load(settings)
        if settings.tap and not tap_works(model, self.mode, settings):
            settings = replace(settings, tap=False)
        self._reference = _reference(model, self.mode, settings)
        with Runner(model, self.mode, settings) as runner:
            trial = self._trial(runner, "start", self._time(runner))
        return self._record(replace(trial, kept=True))

    def _challenge(self, best: Trial, settings: RunSettings, changed: str) -> Trial:
        """Time the candidate, and the best again beside it where both share loaded weights."""
        reload = settings.repack != best.settings.repack
        with Runner(self._load(settings), self.mode, settings) as runner:
            trial = self._trial(runner, changed, self._time(runner))
        if not reload and trial.tokens_per_s > best.tokens_per_s * GAIN:
            # The machine may have become quieter meanwhile: the old best gets the same chance.
            with Runner(self._load(best.settings), self.mode, best.settings) as runner:
                again = self._trial(runner, best.changed, self._time(runner))
            if again.tokens_per_s > best.tokens_per_s:
                best = replace(best, tokens_per_s=again.tokens_per_s)
        # A start with wrong vectors loses to whatever is right, at any speed.
        faster = trial.tokens_per_s > best.tokens_per_s * GAIN or not best.cosine >= self.min_cosine
        won = faster and trial.cosine >= self.min_cosine
        trial = self._record(replace(trial, kept=won))
        if not won and reload:
            self._load(best.settings)
        return trial if won else best

    def _record(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        if self.on_trial is not None:
            self.on_trial(trial)
        return trial

    def _load(self, settings: RunSettings) -> Model:
        """The model with the weights laid out as asked; one at a time is in memory."""
        if self._model is None or self._model.repack != settings.repack:
            if self._model is not None:
                self._model.close()
            self._model = Model(
                self.target.path, n_gpu_layers=settings.n_gpu_layers, repack=settings.repack
            )
        return self._model

    def _time(self, runner: Runner) -> float:
        """Seconds per token over full microbatches in every context, for a while if they are short.

        The best of two, after a first one that warms caches and buffers; fewer when time is up.
        """
        texts = _texts(runner.model.n_vocab, runner.settings)
        per_context = len(texts) // runner.settings.n_contexts
        batches = [texts[i : i + per_context] for i in range(0, len(texts), per_context)]
        n_tokens = sum(map(len, texts))
        rounds = 1
        times: list[float] = []
        while len(times) < 3 and not (times and time.perf_counter() > self.deadline):
            began = time.perf_counter()
            futures = [runner.submit(batch) for _ in range(rounds) for batch in batches]
            for future in futures:
                future.result()
            times.append((time.perf_counter() - began) / rounds)
            rounds = max(1, min(64, round(MIN_TIMING_S / times[0])))
        fastest = min(times[1:] or times)
        self._timings.append((runner.settings, fastest))
        return fastest / n_tokens

    def _trial(self, runner: Runner, changed: str, seconds_per_token: float) -> Trial:
        assert self._reference is not None
        vectors = runner.run(_canaries(runner.model.n_vocab)).vectors
        ours = finish(vectors, dimensions=None, normalize=True)
        return Trial(
            changed=changed,
            settings=runner.settings,
            tokens_per_s=1 / seconds_per_token,
            cosine=least_cosine(ours, self._reference),
            kept=False,
        )


def _with(settings: RunSettings, name: str, value: Any) -> RunSettings:
    if name == "contexts":
        n_contexts, n_threads = value
        return replace(settings, n_contexts=n_contexts, n_threads=n_threads)
    if name == "max_batch_tokens":
        return replace(settings, max_batch_tokens=value, batch_tokens=value)
    if name == "accelerator, repack":
        accelerator, repack = value
        return replace(settings, accelerator=accelerator, repack=repack)
    if settings.accelerator and name in ("repack", "flash_attn"):
        return settings  # it needs them as they are
    return replace(settings, **{name: value})


def _texts(n_vocab: int, settings: RunSettings) -> list[Tokens]:
    """Random paragraphs that fill one microbatch for each context."""
    rng = np.random.default_rng(1)
    per_batch = min(settings.max_batch_seqs, -(-settings.batch_tokens // TEXT_TOKENS))
    length = settings.batch_tokens // per_batch
    n_texts = per_batch * settings.n_contexts
    return [rng.integers(0, n_vocab, length).astype(np.int32) for _ in range(n_texts)]


def _canaries(n_vocab: int) -> list[Tokens]:
    """Three short random texts whose vectors must not depend on the settings."""
    rng = np.random.default_rng(2)
    return [rng.integers(0, n_vocab, n).astype(np.int32) for n in (7, 19, 41)]


def _reference(model: Model, mode: EmbedMode, settings: RunSettings) -> Vectors:
    """Unit vectors of the canaries from llama.cpp's own pooling without flash attention."""
    canaries = _canaries(model.n_vocab)
    n_tokens = sum(map(len, canaries))
    params = ContextParams(
        n_ctx=n_tokens,
        n_ubatch=n_tokens,
        n_seq_max=len(canaries),
        n_threads=settings.n_threads * settings.n_contexts,
        pooling=mode.pooling,
        causal=mode.causal,
        flash_attn=False,
    )
    with Context(model, params, mode.encoder) as context:
        return finish(context.run(canaries), dimensions=None, normalize=True)


def fit_cost(timings: Sequence[tuple[int, float]]) -> Cost | None:
    """Least squares of seconds on tokens, no term below 0; None from fewer than three sizes."""
    sizes = sorted({n_tokens for n_tokens, _ in timings})
    if len(sizes) < 3:
        return None
    # The fastest time of each size: noise only ever adds.
    seconds = [min(s for n, s in timings if n == size) for size in sizes]
    n = np.array(sizes, np.float64)
    columns = [np.ones_like(n), n, n * n]
    free = [0, 1, 2]
    while True:
        solved = np.linalg.lstsq(np.stack([columns[i] for i in free], 1), np.array(seconds))[0]
        if (solved >= 0).all() or len(free) == 1:
            break
        free.remove(free[int(np.argmin(solved))])
    terms = dict(zip(free, np.maximum(solved, 0.0), strict=True))
    fixed, token, pair = (float(terms.get(i, 0.0)) for i in range(3))
    return Cost(fixed_s=fixed, token_s=token, pair_s=pair)
