"""What a process did and when, by the wall clock, for the timeline of `services.bench`. Off unless `open_in` is called.

Spans wait in a bounded ring and go, as JSON lines, to a file of the process's own at each heartbeat and at its end.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import orjson

RING = 65536  # spans between two heartbeats; the oldest make room, and the file says how many did
SETTLED_S = 2.5  # what ended so long ago is in its file: a heartbeat and some more


class Span(NamedTuple):
    """Times in microseconds since 1970. `first` and `second` count what the name says: decode rows and prefill tokens."""

    process: str
    lane: str
    name: str
    start: int
    end: int
    request: str = ""
    first: int = 0
    second: int = 0


class Recorder:
    """`note` may be called from any thread. `lost` counts spans that found the ring full."""

    def __init__(self, path: Path, process: str, ring: int = RING) -> None:
        self._path, self._process = path, process
        self._spans: deque[Span] = deque(maxlen=ring)
        self._lost = 0
        self._lock = threading.Lock()

    def note(self, lane: str, name: str, start: int, end: int, request: str = "", work: tuple[int, int] = (0, 0)) -> None:
        with self._lock:
            self._lost += len(self._spans) == self._spans.maxlen
            self._spans.append(Span(self._process, lane, name, start, end, request, *work))

    def flush(self) -> None:
        with self._lock:
            spans, lost = list(self._spans), self._lost
            self._spans.clear()
            self._lost = 0
        if lost:
            now = now_us()
            spans.append(Span(self._process, "lost", "lost", now, now, first=lost))
        if spans:
            with self._path.open("ab") as file:
                file.write(b"".join(orjson.dumps(tuple(span)) + b"\n" for span in spans))


_recorder: Recorder | None = None


def open_in(folder: str, process: str) -> None:
    """Trace this process from now on. Raises OSError when the folder cannot be had."""
    global _recorder
    Path(folder).mkdir(parents=True, exist_ok=True)
    _recorder = Recorder(Path(folder) / f"{process}-{os.getpid()}.jsonl", process)


def on() -> bool:
    return _recorder is not None


def now_us() -> int:
    return time.time_ns() // 1000


def wall_us(monotonic: float) -> int:
    """When a moment of the monotonic clock was."""
    return now_us() - round(1e6 * (time.monotonic() - monotonic))


def note(lane: str, name: str, start: int, end: int, request: str = "", work: tuple[int, int] = (0, 0)) -> None:
    if _recorder is not None:
        _recorder.note(lane, name, start, end, request, work)


def span(lane: str, name: str, request: str = "", work: tuple[int, int] = (0, 0)) -> AbstractContextManager[None]:
    """What happens inside."""
    return nullcontext() if _recorder is None else _timed(lane, name, request, work)


@contextmanager
def _timed(lane: str, name: str, request: str, work: tuple[int, int]) -> Iterator[None]:
    start = now_us()
    try:
        yield
    finally:
        note(lane, name, start, now_us(), request, work)


def client(request: str, opened: float, first: float) -> None:
    """A request that ends now, by the monotonic clock: it waited for its first token (0: none came), then was streamed."""
    if _recorder is None:
        return
    end = now_us()
    told = wall_us(first) if first else end
    note("client", "waiting", wall_us(opened), told, request)
    if first:
        note("client", "streaming", told, end, request)


def flush() -> None:
    if _recorder is not None:
        _recorder.flush()


def read(folder: Path) -> list[Span]:
    """All spans of all processes. A line that is still being written, or was when its process died, is none."""
    spans = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                spans.append(Span(*orjson.loads(line)))
            except orjson.JSONDecodeError:
                continue
    return spans
