"""What Prometheus reads at /metrics: the engine's counters as they are, and the server's own.

Base units, `sparqle_` before every name, no label per connection: the number of series is fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from sparqle_stream import messages
from sparqle_stream.metrics import BUCKET_EDGES_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from sparqle_stream.engine import Engine
    from sparqle_stream.messages import Event

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
# Engine counters: field of EngineMetrics -> what it counts.
COUNTERS = {
    "streams_opened": "streams that got a slot",
    "streams_failed": "streams that an error ended",
    "backlogs": "streams that sent faster than they could be captioned",
    "steps": "batched steps of the model",
    "steps_failed": "steps that failed and ended all of their streams",
    "chunks": "chunks of streams in those steps",
    "seams": "long utterances that were cut without a pause",
    "loops_stopped": "utterances that were ended because they repeated themselves",
    "speech_without_text": "times that speech gave no words for 3 s",
    "audio_seconds": "audio received",
}


class ServerMetrics:
    """One per server, with a registry of its own: several servers may live in one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCollector(engine))
        self.connections = Counter(
            "sparqle_connections", "connections accepted", ["dialect"], registry=registry
        )
        self.open = Gauge(
            "sparqle_connections_open", "connections open now", ["dialect"], registry=registry
        )
        self.refusals = Counter(
            "sparqle_refusals", "requests refused before they began", ["reason"], registry=registry
        )
        self.closes = Counter(
            "sparqle_closes", "connections ended, by close code", ["code"], registry=registry
        )
        self.backlog = Gauge(
            "sparqle_backlog_seconds", "audio of all streams that waits", registry=registry
        )
        self._lag = Histogram(
            "sparqle_lag_seconds",
            "audio received and not captioned, at every event",
            buckets=SECONDS,
            registry=registry,
        )
        self._word_delay = Histogram(
            "sparqle_word_delay_seconds",
            "stream time from the end of a word to its caption",
            buckets=SECONDS,
            registry=registry,
        )

    def observe(self, event: Event) -> None:
        """One event of the engine."""
        self._lag.observe(event.lag)
        if isinstance(event, messages.Final):
            for word in event.words:
                self._word_delay.observe(max(0.0, word.emitted - word.end))

    def text(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """A snapshot of `Engine.metrics()` at every reading."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._engine.metrics()
        yield GaugeMetricFamily("sparqle_slots", "streams that fit at a time", now.n_slots)
        yield GaugeMetricFamily("sparqle_streams_open", "slots in use", now.n_streams)
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"sparqle_{name}", what, getattr(now, name))
        stages = CounterMetricFamily(
            "sparqle_stage_seconds", "wall clock spent in a stage", labels=["stage"]
        )
        for stage, seconds in now.stage_seconds.items():
            stages.add_metric([stage], seconds)
        yield stages
        steps = HistogramMetricFamily("sparqle_step_seconds", "wall clock of one batched step")
        buckets, n = [], 0
        for edge, count in zip(BUCKET_EDGES_S, now.step_seconds.counts, strict=False):
            n += count
            buckets.append((f"{edge:.6g}", float(n)))
        buckets.append(("+Inf", float(now.step_seconds.n)))
        steps.add_metric([], buckets, sum_value=now.step_seconds.total_s)
        yield steps
