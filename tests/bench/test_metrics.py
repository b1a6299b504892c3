"""Percentiles beside two other implementations, and what a summary says."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bench.metrics import INTERRUPTED, percentile, summarize
from services.bench.timing import Timing

FINITE = st.floats(0, 1e6, allow_subnormal=False)


@given(st.lists(FINITE, min_size=1), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


@given(st.lists(FINITE, min_size=2))
def test_percentile_is_that_of_statistics(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (50, 95, 99):
        assert percentile(values, percent) == pytest.approx(cuts[percent - 1], rel=1e-9, abs=1e-9)


def test_percentile_of_nothing_and_of_infinities() -> None:
    assert math.isnan(percentile([], 50))
    assert percentile([1.0, math.inf, math.inf], 95) == math.inf
    assert percentile([1.0] * 99 + [math.inf], 95) == 1.0


def answer(index: int, start: float, ttft: float, tpot: float, tokens: int = 11) -> Timing:
    latency = ttft + tpot * (tokens - 1)
    return Timing(index, start, 0.0, 200, ttft=ttft, latency=latency, chunks=tokens, input_tokens=5, output_tokens=tokens)


def test_the_four_metrics() -> None:
    timings = [answer(n, start=0.1 * n, ttft=0.5, tpot=0.04) for n in range(10)]
    summary = summarize(timings, 2.0, 0.05)
    assert summary.elapsed == pytest.approx(0.9 + 0.5 + 0.4)
    assert summary.throughput == pytest.approx(110 / 1.8)
    assert summary.prompt_throughput == pytest.approx(50 / 1.8)
    assert summary.qps == pytest.approx(10 / 1.8) == pytest.approx(summary.goodput)
    assert summary.ttft.p99 == pytest.approx(0.5)
    assert summary.tpot.p95 == pytest.approx(0.04)
    assert summary.slo_met


@pytest.mark.parametrize(
    ("ttft", "tpot", "met"), [(2.1, 0.01, (False, True)), (0.1, 0.06, (True, False)), (2.0, 0.05, (True, True))]
)
def test_the_limits_are_those_of_the_p95(ttft: float, tpot: float, met: tuple[bool, bool]) -> None:
    timings = [Timing(n, 0.0, ttft=ttft, latency=ttft + tpot, output_tokens=2) for n in range(20)]
    summary = summarize(timings, 2.0, 0.0500001)
    assert (summary.slo_ttft_met, summary.slo_tpot_met) == met


@pytest.mark.parametrize(("failed", "met"), [(4, True), (6, False)])
def test_a_failed_request_counts_as_late(failed: int, met: bool) -> None:
    good = [answer(n, 0.0, 0.1, 0.01) for n in range(100 - failed)]
    bad = [Timing(n, 0.0, status=503, failure="http 503", detail="full") for n in range(failed)]
    summary = summarize(good + bad, 2.0, 0.05)
    assert summary.slo_met is met
    assert summary.failures == {"http 503": failed}
    assert summary.examples == {"http 503": "full"}


def test_what_we_interrupted_is_no_failure_of_the_server() -> None:
    timings = [answer(0, 0.0, 0.1, 0.01), *[Timing(n, 0.0, failure=INTERRUPTED) for n in range(1, 9)]]
    summary = summarize(timings, 2.0, 0.05)
    assert (summary.succeeded, summary.interrupted, summary.failures) == (1, 8, {})
    assert summary.slo_met


def test_goodput_counts_whole_answers_in_time() -> None:
    timings = [answer(0, 0.0, 0.1, 0.01), answer(1, 0.0, 3.0, 0.01), answer(2, 0.0, 0.1, 0.09)]
    summary = summarize([*timings, Timing(3, 0.0, failure="timeout")], 2.0, 0.05)
    assert summary.goodput * summary.elapsed == pytest.approx(1)


def test_one_token_has_no_tpot() -> None:
    assert answer(0, 0.0, 0.1, 0.0, tokens=1).tpot is None
    assert summarize([answer(0, 0.0, 0.1, 0.0, tokens=1)], 2.0, 0.05).slo_met
    assert summarize([], 2.0, 0.05).throughput == 0
