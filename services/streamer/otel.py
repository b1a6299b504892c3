"""Each request as an OpenTelemetry trace: `headrace[otel]`, on where OTEL_EXPORTER_OTLP_ENDPOINT is set. Never a prompt.

The streamer knows of every stage what its timeline says, so that no other stage needs to know of traces.
"""

import time
from collections.abc import Callable

from services.streamer.session import Session
from services.streamer.timeline import told
from shared.config import ConfigError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
STAGES = ("tokenize", "queue", "prefill", "decode")


def exporter() -> Callable[[Session], None]:
    """What sends a request's trace at its end, in a thread that drops traces rather than wait. Raises ConfigError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import set_span_in_context
    except ImportError as error:
        raise ConfigError(f"{ENDPOINT} is set: install headrace[otel], or unset it ({error})") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "headrace"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("headrace")

    def export(session: Session) -> None:
        start = time.time_ns() - _ns(time.monotonic() - session.clock.opened)
        fields = {name: value if isinstance(value, str | int | float) else str(value) for name, value in told(session).items()}
        root = tracer.start_span("request", start_time=start, attributes=fields)
        at, inside = start, set_span_in_context(root)
        for stage in STAGES:  # one after the other, as a request walks; what is between them is the bus's
            took = _ns(session.timings()[f"{stage}_ms"] / 1000)
            tracer.start_span(stage, inside, start_time=at).end(at + took)
            at += took
        root.end(max(at, start + _ns(session.timings()["total_ms"] / 1000)))

    return export


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
