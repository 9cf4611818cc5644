"""What Prometheus sees. The names that text-embeddings-inference has begin with te_ as there.

Every request is counted, so counting is cheap here: numbers are added up, and brought into
Prometheus's shapes when they are asked for.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gguf_embed.engine.scheduler import Computed
from gguf_embed.server.asked import Result

_SECONDS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
)
_SIZES: Final = tuple(float(2**n) for n in range(14))
_MODEL: Final = ("model", "dialect")
_BATCH: Final = ("model",)


class Meters(Collector):
    """Of one server; may be used from any thread."""

    def __init__(self) -> None:
        self.in_flight = 0  # requests
        self._lock = threading.Lock()  # around all below
        self._requests = _Counts("te_request_count", "Requests", ("dialect", "method", "path"))
        self._failures = _Counts(
            "te_request_failure", "Requests refused or failed", ("dialect", "err")
        )
        self._statuses = _Counts("gguf_embed_responses", "Answers", ("dialect", "status"))
        self._texts = _Counts("gguf_embed_texts", "Texts embedded or scored", _MODEL)
        self._tokens = _Counts("gguf_embed_tokens", "Tokens embedded or scored", _MODEL)
        self._truncated = _Counts("gguf_embed_truncated_texts", "Texts that were cut", _MODEL)
        self._duration = _Spreads(
            "te_request_duration", "Seconds of a request that a model computes", _MODEL, _SECONDS
        )
        self._tokenization = _Spreads(
            "te_request_tokenization_duration",
            "Seconds in which it was tokenized",
            _MODEL,
            _SECONDS,
        )
        self._queue = _Spreads(
            "te_request_queue_duration", "Seconds for which it waited", _MODEL, _SECONDS
        )
        self._inference = _Spreads(
            "te_request_inference_duration", "Seconds in which it was computed", _MODEL, _SECONDS
        )
        self._batch_size = _Spreads("te_batch_next_size", "Texts of a batch", _BATCH, _SIZES)
        self._batch_tokens = _Spreads("te_batch_next_tokens", "Tokens of a batch", _BATCH, _SIZES)
        self._batch_seconds = _Spreads(
            "te_batch_inference_duration", "Seconds of a batch", _BATCH, _SECONDS
        )
        self._waiting: dict[str, int] = {}  # tokens, of each model in memory
        self._deaths: dict[str, int] = {}  # also of those that have left
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def request(self, dialect: str, method: str, path: str, status: int, err: str | None) -> None:
        """One request that was answered."""
        with self._lock:
            self._requests.add((dialect, method, path))
            self._statuses.add((dialect, str(status)))
            if err is not None:
                self._failures.add((dialect, err))

    def result(self, model: str, dialect: str, done: Result) -> None:
        """One that a model computed."""
        labels, times, n_tokens = (model, dialect), done.times, done.n_tokens
        with self._lock:
            self._duration.add(labels, times.total_s)
            self._tokenization.add(labels, times.tokenize_s)
            self._queue.add(labels, times.queue_s)
            self._inference.add(labels, times.compute_s)
            self._texts.add(labels, len(done.token_counts))
            self._tokens.add(labels, n_tokens)
            if done.n_truncated:
                self._truncated.add(labels, done.n_truncated)

    def microbatch(self, model: str, batch: Computed) -> None:
        """One that was computed, maybe for several requests."""
        labels = (model,)
        with self._lock:
            self._batch_size.add(labels, batch.n_texts)
            self._batch_tokens.add(labels, batch.n_tokens)
            self._batch_seconds.add(labels, batch.seconds)

    def models(self, now: dict[str, tuple[int, int]]) -> None:
        """Those in memory: tokens that wait, and deaths of the child."""
        self._waiting = {model: n_waiting for model, (n_waiting, _) in now.items()}
        self._deaths = self._deaths | {model: n_deaths for model, (_, n_deaths) in now.items()}

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All, for the registry."""
        with self._lock:
            yield self._requests.gauge()
            yield self._failures.gauge()
            for counts in (self._statuses, self._texts, self._tokens, self._truncated):
                yield counts.counter()
            for spreads in (
                *(self._duration, self._tokenization, self._queue, self._inference),
                *(self._batch_size, self._batch_tokens, self._batch_seconds),
            ):
                yield spreads.histogram()
        waiting = GaugeMetricFamily("gguf_embed_queue_tokens", "Tokens that wait", labels=_BATCH)
        deaths = GaugeMetricFamily(
            "gguf_embed_engine_deaths", "Deaths of the process that computes", labels=_BATCH
        )
        for model, n_waiting in self._waiting.items():
            waiting.add_metric((model,), n_waiting)
        for model, n_deaths in self._deaths.items():
            deaths.add_metric((model,), n_deaths)
        yield waiting
        yield deaths
        yield GaugeMetricFamily(
            "gguf_embed_models_loaded", "Models in memory", value=len(self._waiting)
        )
        yield GaugeMetricFamily("te_queue_size", "Requests in flight", value=self.in_flight)


class _Counts:
    """A number for each combination of labels, which grows."""

    def __init__(self, name: str, what: str, labels: Sequence[str]) -> None:
        self._said = (name, what)
        self._labels = labels
        self._values = Counter[tuple[str, ...]]()

    def add(self, labels: tuple[str, ...], n: int = 1) -> None:
        """So many more."""
        self._values[labels] += n

    def counter(self) -> Metric:
        """As Prometheus has it."""
        return self._filled(CounterMetricFamily(*self._said, labels=self._labels))

    def gauge(self) -> Metric:
        """The same under the name that text-embeddings-inference has, which is no counter's."""
        return self._filled(GaugeMetricFamily(*self._said, labels=self._labels))

    def _filled(self, family: CounterMetricFamily | GaugeMetricFamily) -> Metric:
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class _Spreads:
    """How values are spread, for each combination of labels."""

    def __init__(
        self, name: str, what: str, labels: Sequence[str], bounds: tuple[float, ...]
    ) -> None:
        self._said = (name, what)
        self._labels = labels
        self._bounds = bounds
        # Of each: how many values are up to each bound and above the one before; the last: beyond.
        self._counts = defaultdict[tuple[str, ...], list[int]](lambda: [0] * (len(bounds) + 1))
        self._sums = defaultdict[tuple[str, ...], float](float)

    def add(self, labels: tuple[str, ...], value: float) -> None:
        """One more."""
        self._counts[labels][bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def histogram(self) -> Metric:
        """As Prometheus has it."""
        family = HistogramMetricFamily(*self._said, labels=self._labels)
        names = [*map(str, self._bounds), "+Inf"]
        for labels, counts in self._counts.items():
            buckets = list(zip(names, accumulate(counts), strict=True))
            family.add_metric(labels, buckets, self._sums[labels])
        return family
