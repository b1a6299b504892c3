"""The timeline: its figure against one counted by hand, its picture, and one of a real mesh."""

import asyncio
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bench.timeline import MOST, draw, measure, shown, within
from shared import trace
from shared.trace import Span
from tests.mesh.harness import RunningMesh

WINDOW = (0, 40)
INTERVALS = st.lists(st.tuples(st.integers(-10, 50), st.integers(1, 20)), min_size=1, max_size=8)


def spans(lane: str, intervals: list[tuple[int, int]], process: str = "engine-0") -> list[Span]:
    return [Span(process, lane, "x", start, start + size, str(n)) for n, (start, size) in enumerate(intervals)]


@given(INTERVALS, INTERVALS)
def test_idle_is_what_counting_every_microsecond_gives(waits: list[tuple[int, int]], steps: list[tuple[int, int]]) -> None:
    def covered(intervals: list[tuple[int, int]]) -> set[int]:
        return {at for start, size in intervals for at in range(start, start + size)} & set(range(*WINDOW))

    figures = measure([*spans("client", waits), *spans("device", steps)], WINDOW)
    if not covered(steps):
        assert figures.devices == 0
    else:
        assert figures.idle == pytest.approx(len(covered(waits) - covered(steps)) / 40)


def test_each_device_counts_and_lost_spans_are_told() -> None:
    found = [*spans("client", [(0, 40)]), *spans("device", [(0, 40)], "a"), *spans("device", [(0, 20)], "b")]
    assert measure(found, WINDOW).idle == pytest.approx(0.25)
    assert "not to be trusted" in draw([*found, Span("a", "lost", "lost", 1, 1, first=3)], WINDOW)


def test_a_long_run_is_shown_in_part_and_measured_whole() -> None:
    many = [*spans("client", [(0, 400_000)]), *spans("device", [(10 * n, 10) for n in range(40_000)])]
    part = shown(many, (0, 400_000))
    assert 0 < len(within(many, part)) <= MOST
    assert "0.40 s measured, 0.10 s shown" in draw(many, (0, 400_000))


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    page = draw(
        [*spans("client", [(0, 40)]), Span("e", "device", "step", 0, 9, "", 1, 1), Span("e", "host", "<b>", 1, 2)], WINDOW
    )
    assert "<b>" not in page.split("<svg")[1]
    assert "http" not in page


def test_a_mesh_that_was_not_traced() -> None:
    with pytest.raises(ValueError, match="--trace"):
        draw([], WINDOW)


async def test_a_real_mesh_draws_every_lane(tmp_path: Path) -> None:
    folder, file = tmp_path / "trace", tmp_path / "out.html"
    env = {"HEADRACE_TRACE": str(folder), "CHAIN_STEP_S": "0.004"}
    async with RunningMesh({"engine": 2}, chain=True, env=env) as mesh:
        words = ["closed", "--url", f"{mesh.url}/v1", "--users", "4", "--requests", "12", "--output-tokens", "16"]
        bench = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.bench", *words, "--trace-dir", str(folder), "--timeline", str(file)
        )
        assert await asyncio.wait_for(bench.wait(), 60) == 0
    found, page = trace.read(folder), file.read_text()
    assert {span.lane for span in found} == {"client", "tokenizer", "host", "publish", "device", "streamer"}
    assert all(span.start <= span.end for span in found)
    assert len({span.request for span in found if span.lane == "client"}) == 12
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", page, re.S)[0])  # type: ignore[index]
    drawn = {rect.get("class") for rect in svg.iter("rect")}
    assert drawn == {"waiting", "streaming", "encode", "plan", "commit", "publish", "prefill", "decode", "detokenize", "write"}
    assert "12 requests, 2 devices" in page
