"""What Prometheus sees. The names that text-embeddings-inference has begin with te_ as there."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gguf_embed.engine.scheduler import Computed
from gguf_embed.server.asked import Result

_SECONDS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
)
_SIZES: Final = tuple(float(2**n) for n in range(14))
_MODEL: Final = ("model", "dialect")


class Meters:
    """Of one server; may be used from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.in_flight = 0  # requests
        self._count = Gauge(
            "te_request_count", "Requests", ("dialect", "method", "path"), registry=registry
        )
        self._failures = Gauge(
            "te_request_failure",
            "Requests refused or failed",
            ("dialect", "err"),
            registry=registry,
        )
        self._statuses = Counter(
            "gguf_embed_responses", "Answers", ("dialect", "status"), registry=registry
        )
        self._duration = Histogram(
            "te_request_duration",
            "Seconds of a request that a model computes",
            _MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokenization = Histogram(
            "te_request_tokenization_duration",
            "Seconds in which it was tokenized",
            _MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue = Histogram(
            "te_request_queue_duration",
            "Seconds for which it waited",
            _MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self._inference = Histogram(
            "te_request_inference_duration",
            "Seconds in which it was computed",
            _MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self._texts = Counter(
            "gguf_embed_texts", "Texts embedded or scored", _MODEL, registry=registry
        )
        self._tokens = Counter(
            "gguf_embed_tokens", "Tokens embedded or scored", _MODEL, registry=registry
        )
        self._truncated = Counter(
            "gguf_embed_truncated_texts", "Texts that were cut", _MODEL, registry=registry
        )
        self._batch_size = Histogram(
            "te_batch_next_size", "Texts of a batch", ("model",), buckets=_SIZES, registry=registry
        )
        self._batch_tokens = Histogram(
            "te_batch_next_tokens",
            "Tokens of a batch",
            ("model",),
            buckets=_SIZES,
            registry=registry,
        )
        self._batch_seconds = Histogram(
            "te_batch_inference_duration",
            "Seconds of a batch",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue_tokens = Gauge(
            "gguf_embed_queue_tokens", "Tokens that wait", ("model",), registry=registry
        )
        self._loaded = Gauge("gguf_embed_models_loaded", "Models in memory", registry=registry)
        self._deaths = Gauge(
            "gguf_embed_engine_deaths",
            "Deaths of the process that computes",
            ("model",),
            registry=registry,
        )
        Gauge("te_queue_size", "Requests in flight", registry=registry).set_function(
            lambda: self.in_flight
        )
        # Children of labels are looked up under a lock and with a check each time: kept here.
        self._embeds = lru_cache(256)(self._embeds_of)
        self._batches = lru_cache(256)(self._batches_of)

    def request(self, dialect: str, method: str, path: str, status: int, err: str | None) -> None:
        """One request that was answered."""
        self._count.labels(dialect, method, path).inc()
        self._statuses.labels(dialect, str(status)).inc()
        if err is not None:
            self._failures.labels(dialect, err).inc()

    def result(self, model: str, dialect: str, done: Result) -> None:
        """One that a model computed."""
        duration, tokenization, queue, inference, texts, tokens = self._embeds(model, dialect)
        times = done.times
        duration.observe(times.total_s)
        tokenization.observe(times.tokenize_s)
        queue.observe(times.queue_s)
        inference.observe(times.compute_s)
        texts.inc(len(done.token_counts))
        tokens.inc(done.n_tokens)
        if done.n_truncated:
            self._truncated.labels(model, dialect).inc(done.n_truncated)

    def microbatch(self, model: str, batch: Computed) -> None:
        """One that was computed, maybe for several requests."""
        size, tokens, seconds = self._batches(model)
        size.observe(batch.n_texts)
        tokens.observe(batch.n_tokens)
        seconds.observe(batch.seconds)

    def models(self, now: dict[str, tuple[int, int]]) -> None:
        """Those in memory: tokens that wait, and deaths of the child."""
        self._loaded.set(len(now))
        self._queue_tokens.clear()
        for model, (waiting, deaths) in now.items():
            self._queue_tokens.labels(model).set(waiting)
            self._deaths.labels(model).set(deaths)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def _embeds_of(
        self, model: str, dialect: str
    ) -> tuple[Histogram, Histogram, Histogram, Histogram, Counter, Counter]:
        labels = (model, dialect)
        return (
            self._duration.labels(*labels),
            self._tokenization.labels(*labels),
            self._queue.labels(*labels),
            self._inference.labels(*labels),
            self._texts.labels(*labels),
            self._tokens.labels(*labels),
        )

    def _batches_of(self, model: str) -> tuple[Histogram, Histogram, Histogram]:
        return (
            self._batch_size.labels(model),
            self._batch_tokens.labels(model),
            self._batch_seconds.labels(model),
        )
