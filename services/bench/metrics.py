"""From timings to figures: percentiles, the four metrics, goodput, and whether the SLO was met. Pure."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.bench.timing import Timing

INTERRUPTED = "interrupted"  # by us: neither a success nor a failure of the server
SLO_PERCENTILE = 95.0


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear between the two nearest ranks (numpy's default). NaN when there is nothing; infinities are allowed."""
    ranked = sorted(values)
    if not ranked:
        return math.nan
    place = (len(ranked) - 1) * percent / 100
    low, high = ranked[math.floor(place)], ranked[math.ceil(place)]
    return low if low == high else low + (high - low) * (place - math.floor(place))


@dataclass(frozen=True, slots=True)
class Spread:
    mean: float
    p50: float
    p95: float
    p99: float
    most: float


def spread_of(values: Sequence[float]) -> Spread:
    if not values:
        return Spread(*[math.nan] * 5)
    p50, p95, p99 = (percentile(values, percent) for percent in (50, 95, 99))
    return Spread(math.fsum(values) / len(values), p50, p95, p99, max(values))


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates are per second of `elapsed`: from the first request sent to the last token received."""

    elapsed: float
    sent: int
    succeeded: int
    interrupted: int
    failures: dict[str, int]
    examples: dict[str, str]  # what one failure of each kind said
    input_tokens: int
    output_tokens: int
    throughput: float  # output tokens/s
    prompt_throughput: float  # prompt tokens/s, as the server counts them
    qps: float
    goodput: float  # requests/s that met both limits
    ttft: Spread
    tpot: Spread
    latency: Spread
    stall: Spread
    late: Spread  # the client's own lateness: when it is large, the client was the bottleneck
    slo_ttft: float
    slo_tpot: float
    slo_ttft_met: bool
    slo_tpot_met: bool

    @property
    def slo_met(self) -> bool:
        return self.slo_ttft_met and self.slo_tpot_met


def within(timing: Timing, slo_ttft: float, slo_tpot: float) -> bool:
    """A whole answer, its first token in time and the others fast enough (an answer of one token has no others)."""
    if timing.failure is not None or timing.ttft is None:
        return False
    return timing.ttft <= slo_ttft and (timing.tpot or 0.0) <= slo_tpot


def _judged(values: Sequence[float], failed: int, limit: float) -> bool:
    """The p95 over all requests, where a failed one took for ever: more than 5 % of failures miss any SLO."""
    if not values and not failed:
        return True
    return percentile([*values, *[math.inf] * failed], SLO_PERCENTILE) <= limit


def summarize(timings: Sequence[Timing], slo_ttft: float, slo_tpot: float) -> Summary:
    good = [timing for timing in timings if timing.failure is None]
    bad = [timing for timing in timings if timing.failure not in (None, INTERRUPTED)]
    begin = min((timing.start for timing in timings), default=0.0)
    elapsed = max((timing.end for timing in good), default=begin) - begin
    per_second = 1 / elapsed if elapsed > 0 else 0.0
    ttfts = [timing.ttft for timing in good if timing.ttft is not None]
    tpots = [timing.tpot for timing in good if timing.tpot is not None]
    inputs, outputs = sum(t.input_tokens for t in good), sum(t.output_tokens for t in good)
    return Summary(
        elapsed=elapsed,
        sent=len(timings),
        succeeded=len(good),
        interrupted=len(timings) - len(good) - len(bad),
        failures=dict(Counter(str(timing.failure) for timing in bad).most_common()),
        examples={str(timing.failure): timing.detail for timing in reversed(bad) if timing.detail},
        input_tokens=inputs,
        output_tokens=outputs,
        throughput=outputs * per_second,
        prompt_throughput=inputs * per_second,
        qps=len(good) * per_second,
        goodput=sum(within(timing, slo_ttft, slo_tpot) for timing in good) * per_second,
        ttft=spread_of(ttfts),
        tpot=spread_of(tpots),
        latency=spread_of([timing.latency for timing in good if timing.latency is not None]),
        stall=spread_of([timing.stall for timing in good if timing.chunks > 1]),
        late=spread_of([timing.late for timing in timings]),
        slo_ttft=slo_ttft,
        slo_tpot=slo_tpot,
        slo_ttft_met=_judged(ttfts, len(bad), slo_ttft),
        slo_tpot_met=_judged(tpots, len(bad), slo_tpot),
    )
