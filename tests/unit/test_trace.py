"""Spans: kept in order, bounded, honest about what was lost, and nothing at all when nobody asked."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import trace
from shared.trace import Recorder, Span, read


@given(st.lists(st.integers(0, 12), max_size=6))
def test_what_is_not_written_is_counted(tmp_path_factory: pytest.TempPathFactory, bursts: list[int]) -> None:
    folder, ring, noted = tmp_path_factory.mktemp("trace"), 5, 0
    recorder = Recorder(folder / "engine.jsonl", "engine", ring)
    for burst in bursts:
        for _ in range(burst):
            recorder.note("host", "plan", noted, noted + 1)
            noted += 1
        recorder.flush()
    spans = read(folder)
    kept = [span.start for span in spans if span.lane == "host"]
    assert kept == sorted(kept)
    assert len(kept) == sum(min(burst, ring) for burst in bursts)
    assert len(kept) + sum(span.first for span in spans if span.lane == "lost") == noted


def test_off_records_nothing_and_on_writes_real_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_recorder", None)
    with trace.span("host", "before"):
        pass
    trace.flush()
    assert read(tmp_path) == []
    trace.open_in(str(tmp_path / "new"), "engine-0")
    before = trace.now_us()
    with trace.span("host", "plan", "r", (3, 4)):
        pass
    trace.flush()
    [span] = read(tmp_path / "new")
    assert span == Span("engine-0", "host", "plan", span.start, span.end, "r", 3, 4)
    assert before <= span.start <= span.end <= trace.now_us()


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.jsonl", "a")
    recorder.note("host", "plan", 1, 2)
    recorder.flush()
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'["a","host"')
    assert read(tmp_path) == [Span("a", "host", "plan", 1, 2)]
