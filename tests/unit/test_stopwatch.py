"""A device's own times on the wall clock, with a device clock that is not ours and starts elsewhere."""

from pathlib import Path

import pytest
import torch

from services.engine.gpu import stopwatch
from services.engine.gpu.stopwatch import Stopwatch
from services.engine.plan import Plan, Row
from shared import trace


class Event:
    """Of a device whose clock reads `now` milliseconds."""

    now = 5000.0

    def __init__(self) -> None:
        self.at = Event.now
        self.happened = True

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return other.at - self.at


def test_steps_lie_where_the_device_ran_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_recorder", None)
    monkeypatch.setattr(stopwatch, "_event", Event)
    trace.open_in(str(tmp_path), "engine")
    watch, plan = Stopwatch(torch.device("cuda")), Plan((Row((1,), 7, (1,)), Row((1, 2, 3), 0, (2,))), (), ())
    before = trace.now_us()
    for _ in range(3):
        watch.begin()
        Event.now += 20
        watch.end(plan)
        Event.now += 5
    watch.drain()
    trace.flush()
    found = trace.read(tmp_path)
    assert [span.end - span.start for span in found] == [20_000] * 3
    assert before <= found[0].start <= trace.now_us()
    assert {(span.first, span.second) for span in found} == {(1, 3)}
