"""When a device ran its steps, by the wall clock, for the timeline: events around each step. Nothing unless traced."""

from collections import deque

import torch

from services.engine.plan import Plan
from shared import trace


class Stopwatch:
    """Called on the device's stream. A known moment of both clocks is the anchor; each step's end is the next one's."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: torch.cuda.Event | int = 0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, tuple[int, int]]] = deque()
        self._anchor: tuple[torch.cuda.Event, float] | None = None  # and its microseconds

    def begin(self) -> None:
        """Just before a step's first kernel is sent: while a device waits for the host to prepare one, it is idle."""
        if not trace.on():
            return
        if self._cuda:
            self._collect()
            if not self._under_way:
                self._set_anchor()
        self._begun = _event() if self._cuda else trace.now_us()

    def end(self, plan: Plan) -> None:
        if not trace.on():
            return
        if isinstance(self._begun, int):
            trace.note("device", "step", self._begun, trace.now_us(), work=plan.work)
        else:
            self._under_way.append((self._begun, _event(), plan.work))

    def drain(self) -> None:
        """Nothing follows for now: the newest step too is noted."""
        if self._under_way:
            self._under_way[-1][1].synchronize()
            self._collect()

    def _set_anchor(self) -> None:
        """The device has nothing to do: waiting for it costs microseconds, and ends any drift of its clock."""
        event = _event()
        event.synchronize()
        self._anchor = event, float(trace.now_us())

    def _collect(self) -> None:
        while self._anchor is not None and self._under_way and self._under_way[0][1].query():
            begun, ended, work = self._under_way.popleft()
            at, wall = self._anchor
            start, end = (wall + 1000 * at.elapsed_time(event) for event in (begun, ended))
            trace.note("device", "step", round(start), round(end), work=work)
            self._anchor = ended, end


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
