"""The timeline of a run as one HTML file: who did what when, from the spans that the mesh's processes wrote. Pure.

The figures are of the whole window. The picture shows all of it, or as much around its middle as a browser draws well.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain

from services.bench.timeline_page import page
from shared.trace import Span

MOST = 12_000  # spans in a picture
LANES = {
    "tokenizer": "tokenizer",
    "host": "engine host",
    "publish": "engine publish",
    "device": "device",
    "streamer": "streamer",
}
HEIGHTS = {"client": 8, "device": 46}
HEIGHT, GAP = 16, 6
TICKS = 8

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the window: seconds, and the share of it in which a device did nothing while somebody waited (mean of devices)."""

    seconds: float
    requests: int
    devices: int
    idle: float
    lost: int  # spans that found a ring full; the figures are then not to be trusted


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    kind: str
    spans: list[Span]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint and in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in union(intervals))


def within(spans: Iterable[Span], window: Interval) -> list[Span]:
    """The spans that the window touches, cut to it."""
    low, high = window
    return [
        span._replace(start=max(span.start, low), end=min(span.end, high))
        for span in spans
        if span.start < high and span.end > low
    ]


def measure(spans: Sequence[Span], window: Interval) -> Figures:
    inside = within(spans, window)
    waits = [(span.start, span.end) for span in inside if span.lane == "client"]
    busy: dict[str, list[Interval]] = defaultdict(list)
    for span in inside:
        if span.lane == "device":
            busy[span.process].append((span.start, span.end))
    # |waits but not busy| = |waits or busy| - |busy|
    idle = sum(length([*waits, *steps]) - length(steps) for steps in busy.values())
    total = window[1] - window[0]
    return Figures(
        seconds=total / 1e6,
        requests=len({span.request for span in inside if span.lane == "client"}),
        devices=len(busy),
        idle=idle / (len(busy) * total) if busy else float("nan"),
        lost=sum(span.first for span in spans if span.lane == "lost"),
    )


def shown(spans: Sequence[Span], window: Interval) -> Interval:
    """Halved around its middle until few enough spans are in it."""
    while len(within(spans, window)) > MOST and window[1] - window[0] > 1000:
        quarter = (window[1] - window[0]) // 4
        window = window[0] + quarter, window[1] - quarter
    return window


def rows(spans: Sequence[Span]) -> list[Row]:
    found = _clients([span for span in spans if span.lane == "client"])
    for lane, label in LANES.items():
        processes: dict[str, list[Span]] = defaultdict(list)
        for span in spans:
            if span.lane == lane:
                processes[span.process].append(span)
        for number, (_, own) in enumerate(sorted(processes.items())):
            found.append(Row(f"{label} {number}" if len(processes) > 1 else label, lane, own))
    return found


def _clients(spans: list[Span]) -> list[Row]:
    """Each request on the first line that is free when it comes."""
    requests: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        requests[span.request].append(span)
    lines: list[list[Span]] = []
    for parts in sorted(requests.values(), key=lambda parts: min(part.start for part in parts)):
        begin = min(part.start for part in parts)
        free = next((line for line in lines if max(part.end for part in line) <= begin), None)
        if free is None:
            lines.append(list(parts))
        else:
            free += parts
    return [Row("" if number else "requests", "client", line) for number, line in enumerate(lines)]


def draw(spans: Sequence[Span], window: Interval) -> str:
    """The file. Raises ValueError when no device did anything in the window: then this mesh was not traced."""
    figures = measure(spans, window)
    if not figures.devices or not figures.requests:
        raise ValueError("no request and no step of a device in the time of the run; was this mesh started with --trace?")
    part = shown(spans, window)
    labels: list[str] = []
    boxes: list[str] = []
    top = GAP
    for row in rows(within(spans, part)):
        height = HEIGHTS.get(row.kind, HEIGHT)
        labels.append(f'<b style="top:{top}px;line-height:{height}px">{escape(row.label)}</b>')
        boxes += chain.from_iterable(_boxes(span, part[0], top, height) for span in row.spans)
        top += height + (2 if row.kind == "client" else GAP)
    return page(_headline(figures), _subtitle(figures, part), labels, boxes, _ticks(part), (part[1] - part[0], top))


def _headline(figures: Figures) -> str:
    return f"{100 * figures.idle:.1f}% of the time, a device was idle while work was outstanding"


def _subtitle(figures: Figures, part: Interval) -> str:
    seconds, devices = (part[1] - part[0]) / 1e6, "device" if figures.devices == 1 else "devices"
    told = f"{figures.requests} requests, {figures.devices} {devices}, {figures.seconds:.2f} s measured, {seconds:.2f} s shown"
    return told + (f"; {figures.lost} spans were lost: the figure is not to be trusted" if figures.lost else "")


def _boxes(span: Span, origin: int, top: int, height: int) -> list[str]:
    """A step of a device is two boxes, one above the other: its decode rows' and its prefill tokens' shares."""
    took = f"{(span.end - span.start) / 1000:.2f} ms"
    if span.lane != "device":
        return [_box(span, origin, top, height, span.name, f"{span.name} {span.request[:8]} {took}")]
    title = f"{span.first} decode rows, {span.second} prefill tokens, {took}"
    split = round(height * span.second / max(span.first + span.second, 1))
    parts = [("prefill", top, split), ("decode", top + split, height - split)]
    return [_box(span, origin, at, high, name, title) for name, at, high in parts if high]


def _box(span: Span, origin: int, top: int, height: int, name: str, title: str) -> str:
    place = f'x="{span.start - origin}" y="{top}" width="{span.end - span.start}" height="{height}"'
    return f'<rect class="{escape(name)}" {place}><title>{escape(title)}</title></rect>'


def _ticks(part: Interval) -> list[str]:
    """At round times: steps of 1, 2 or 5 of a power of ten."""
    total = part[1] - part[0]
    step = next(size * 10**power for power in range(12) for size in (1, 2, 5) if size * 10**power * TICKS >= total)
    return [f'<i style="left:{100 * at / total:.3f}%">{at / 1000:g} ms</i>' for at in range(0, total, step)]
