"""OpenTelemetry: a span for each request and each of its parts, where the SDK is installed.

    pip install "gguf-embed[server,traces]"
    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 gguf-embed serve

Spans are made when a request is done, from the times that were taken anyway. They hold no text.
Another program's setting up (opentelemetry-instrument) is left as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from gguf_embed import __version__
from gguf_embed.server.asked import Reranked, Result

_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_OURS: Final = "gguf-embed"


class Traces:
    """Of one server. Without a tracer nothing is done."""

    def __init__(self, tracer: Any = None) -> None:
        """`tracer` is one of opentelemetry's."""
        self._tracer = tracer

    def __bool__(self) -> bool:
        return self._tracer is not None

    def request(
        self,
        headers: Mapping[str, str],
        *,
        method: str,
        route: str,
        dialect: str,
        status: int,
        seconds: float,
        results: Sequence[Result],
        err: str | None,
    ) -> None:
        """One that is done now, after so many seconds; `headers` may name the caller's span."""
        if self._tracer is None:
            return
        trace, propagate = _api("trace"), _api("propagate")
        end = time.time_ns()
        begin = end - _ns(seconds)
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "gguf_embed.dialect": dialect,
        }
        if err is not None:
            attributes["error.type"] = err
        for result in results:
            attributes |= {
                "gen_ai.operation.name": "rerank" if isinstance(result, Reranked) else "embeddings",
                "gen_ai.request.model": result.model,
                "gen_ai.response.model": result.served,
                "gen_ai.usage.input_tokens": result.n_tokens,
                "gguf_embed.texts": len(result.token_counts),
                "gguf_embed.truncated_texts": result.n_truncated,
            }
        span = self._tracer.start_span(
            f"{method} {route}",
            context=propagate.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=begin,
        )
        if status >= 500:
            span.set_status(trace.Status(trace.StatusCode.ERROR, err))
        inside = trace.set_span_in_context(span)
        for result in results:
            self._parts(result, inside, end)
        span.end(end)

    def _parts(self, result: Result, context: Any, end: int) -> None:
        """Loading and tokenizing from the begin on; waiting and computing up to the end."""
        times = result.times
        tokenizes = end - _ns(times.total_s - times.load_s)
        computes = end - _ns(times.compute_s)
        parts = {
            "load": (tokenizes - _ns(times.load_s), tokenizes),
            "tokenize": (tokenizes, tokenizes + _ns(times.tokenize_s)),
            "queue": (computes - _ns(times.queue_s), computes),
            "compute": (computes, end),
        }
        for name, (begin, until) in parts.items():
            self._tracer.start_span(name, context=context, start_time=begin).end(until)


def traces() -> Traces:
    """With a tracer where the SDK is installed and told where to send."""
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        return Traces()
    trace = _api("trace")
    if not isinstance(trace.get_tracer_provider(), _api("sdk.trace").TracerProvider):
        if not any(map(os.environ.get, _VARIABLES)):
            return Traces()
        trace.set_tracer_provider(_provider())
    return Traces(trace.get_tracer(_OURS, __version__))


def _provider() -> Any:
    """What sends spans to the address of the environment, in a thread of its own."""
    exporter = _api("exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
    name = os.environ.get("OTEL_SERVICE_NAME", _OURS)
    resource = _api("sdk.resources").Resource.create({"service.name": name})
    provider = _api("sdk.trace").TracerProvider(resource=resource)
    provider.add_span_processor(_api("sdk.trace.export").BatchSpanProcessor(exporter))
    return provider


def _api(module: str) -> Any:
    """It may not be installed, so no checker of types knows it."""
    return import_module(f"opentelemetry.{module}")


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
