"""What the whole mesh looks like from here: processes, queues, and Prometheus metrics of every stage."""

import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from services.streamer.admission import Pace
from shared.bus import Bus
from shared.config import STAGES
from shared.messages import Beat

LABELS = ("stage", "id")


class Mesh(Collector):
    """A picture of the mesh, renewed each second by the heartbeat."""

    def __init__(self, bus: Bus, model: str) -> None:
        self._bus, self._model = bus, model
        self.beats: list[Beat] = []
        self.queues: dict[str, int] = {"submit": 0, "work": 0}
        self.dead = 0
        self.admitted = 0  # by this streamer since the last look
        self._pace = Pace()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    async def look(self) -> None:
        self.beats = await self._bus.members()
        names = self._bus.names
        submit, work, self.dead = await self._bus.depths([names.submit, names.work, names.dead])
        self.queues = {"submit": submit, "work": work}
        self.admitted = 0
        self._pace.look(time.monotonic(), self._finished(), self.waiting)

    def _finished(self) -> float:
        ends = ("finished", "failed", "cancelled")
        return sum(beat.counters.get(end, 0.0) for beat in self.beats if beat.stage == "engine" for end in ends)

    @property
    def waiting(self) -> int:
        """Requests that no engine runs yet, with those that came in here since the last look."""
        running = sum(beat.gauges.get("running", 0.0) for beat in self.beats)
        return max(sum(self.queues.values()) + self.admitted - int(running), 0)

    def wait_s(self) -> float:
        return self._pace.wait_s(self.waiting)

    @property
    def missing(self) -> str:
        """The first stage that has no ready process; empty when all have one."""
        ready = {beat.stage for beat in self.beats if beat.ready}
        return next((stage for stage in STAGES if stage not in ready), "")

    def as_json(self) -> dict[str, Any]:
        fields = ("stage", "id", "pid", "host", "ready", "detail", "gauges")
        return {
            "model": self._model,
            "ready": not self.missing,
            "processes": [{field: getattr(beat, field) for field in fields} for beat in self.beats],
            "queues": self.queues,
            "counters": {
                "requests": self._sum("tokenizer", "requests"),
                "output_tokens": self._sum("engine", "output_tokens"),
                "cached_tokens": self._sum("engine", "cached_tokens"),
                "prefix_fetched_tokens": self._sum("engine", "prefix_fetched_tokens"),
            },
        }

    def _sum(self, stage: str, counter: str) -> int:
        return int(sum(beat.counters.get(counter, 0.0) for beat in self.beats if beat.stage == stage))

    # -- Prometheus ------------------------------------------------------------------------------------------------

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("headrace_ready", "1 when the process is ready", labels=LABELS)
        for beat in self.beats:
            up.add_metric((beat.stage, beat.id), float(beat.ready))
        depth = GaugeMetricFamily("headrace_queue_depth", "Entries outstanding in a stream", labels=("stream",))
        for stream, entries in self.queues.items():
            depth.add_metric((stream,), entries)
        dead = GaugeMetricFamily("headrace_dead_letters", "Messages that could not be read, kept for people")
        dead.add_metric((), self.dead)
        yield dead
        yield up
        yield depth
        yield from self._plain(CounterMetricFamily, lambda beat: beat.counters, "since start")
        yield from self._plain(GaugeMetricFamily, lambda beat: beat.gauges, "now")
        yield from self._histograms()

    def _plain(
        self, family: type[CounterMetricFamily] | type[GaugeMetricFamily], values: Callable[[Beat], dict[str, float]], when: str
    ) -> Iterator[Metric]:
        for name in sorted({name for beat in self.beats for name in values(beat)}):
            metric = family(f"headrace_{name}", f"{name.replace('_', ' ')} {when}", labels=LABELS)
            for beat in self.beats:
                if name in values(beat):
                    metric.add_metric((beat.stage, beat.id), values(beat)[name])
            yield metric

    def _histograms(self) -> Iterator[Metric]:
        for name in sorted({name for beat in self.beats for name in beat.histograms}):
            family = HistogramMetricFamily(f"headrace_{name}_seconds", f"{name} in seconds", labels=LABELS)
            for beat in self.beats:
                if name in beat.histograms:
                    histogram = beat.histograms[name]
                    bounds = [*map(str, histogram.bounds), "+Inf"]
                    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
                    family.add_metric((beat.stage, beat.id), buckets, sum_value=histogram.total)
            yield family
