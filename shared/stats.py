"""What a process counts about itself. A snapshot rides on every heartbeat, so any streamer can show the whole mesh."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable

from shared.messages import Histogram

LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Stats:
    def __init__(self) -> None:
        self.counters: dict[str, float] = defaultdict(float)
        self.gauges: dict[str, Callable[[], float]] = {}
        self._histograms: dict[str, list[int]] = {}
        self._totals: dict[str, float] = defaultdict(float)

    def observe(self, name: str, seconds: float) -> None:
        counts = self._histograms.setdefault(name, [0] * (len(LATENCY_BOUNDS) + 1))
        counts[bisect_left(LATENCY_BOUNDS, seconds)] += 1
        self._totals[name] += seconds

    def gauge_values(self) -> dict[str, float]:
        return {name: float(read()) for name, read in self.gauges.items()}

    def histograms(self) -> dict[str, Histogram]:
        return {
            name: Histogram(bounds=LATENCY_BOUNDS, counts=tuple(counts), total=self._totals[name])
            for name, counts in self._histograms.items()
        }
