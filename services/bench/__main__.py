"""Load for any OpenAI-compatible server, and the four metrics of serving: throughput, TTFT, TPOT, QPS.

python -m services.bench {same,closed,open,trace} --help
"""

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
from rich.console import Console

from services.bench import load, report
from services.bench.arguments import parse
from services.bench.client import find_model
from services.bench.fleet import ClientDied, Fleet
from services.bench.metrics import Summary, summarize
from services.bench.spec import Spec
from services.bench.timeline import draw
from services.bench.timing import Timing
from shared import trace

MET, MISSED, USAGE, NOTHING, INTERRUPTED = 0, 1, 2, 3, 130


def total(spec: Spec, found: load.Material) -> int | None:
    """How many requests there will be, where that is known beforehand."""
    if spec.mode == "trace":
        return min(spec.requests or len(found.arrivals), len(found.arrivals))
    if spec.mode == "same":
        return spec.requests or spec.users
    return spec.requests if spec.duration is None else None


class Run:
    """One run and how it ended."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.timings: list[Timing] = []
        self.interrupted = False
        self.died: str | None = None
        self.window = (0, 0)  # of the measured part, in microseconds since 1970

    async def go(self, bar: report.Bar) -> None:
        def heard(timing: Timing) -> None:
            self.timings.append(timing)
            bar.heard(timing)

        fleet = Fleet(self.spec, heard)
        stops: list[asyncio.Task[None]] = []

        def stop() -> None:
            self.interrupted = True
            stops.append(loop.create_task(fleet.stop()))

        loop = asyncio.get_running_loop()
        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, stop)
        try:
            await fleet.run()
        except ClientDied as death:
            self.died = str(death)
        self.window = trace.wall_us(fleet.origin), trace.now_us()

    def code(self, summary: Summary) -> int:
        if self.interrupted:
            return INTERRUPTED
        if self.died or not summary.succeeded:
            return NOTHING
        return MET if summary.slo_met else MISSED


def save_timeline(run: Run, folder: Path, file: Path) -> None:
    """Raises ValueError when there is nothing to draw, OSError."""
    time.sleep(trace.SETTLED_S)  # the mesh's last spans are on their way to the folder
    file.write_text(draw(trace.read(folder), run.window))


def named(spec: Spec) -> Spec:
    """The spec with a model's name in it: the server's first when none was given."""
    return spec if spec.model else replace(spec, model=asyncio.run(find_model(spec)))


def main(argv: Sequence[str]) -> int:
    out, err = Console(), Console(stderr=True)
    asked = parse(argv)
    try:
        found = load.material(asked.spec)
    except (OSError, ValueError) as error:
        err.print(f"cannot use the file: {error}", style="red", markup=False)
        return USAGE
    try:
        spec = named(asked.spec)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        err.print(f"no answer from {asked.spec.url}: {error}", style="red", markup=False)
        return NOTHING
    run = Run(spec)
    with report.Bar(err, total(spec, found)) as bar:
        asyncio.run(run.go(bar))
    summary = summarize(run.timings, spec.slo_ttft, spec.slo_tpot)
    report.show(out, summary)
    if run.died:
        err.print(run.died, style="red", markup=False)
    if asked.json is not None:
        report.save(asked.json, argv, spec, summary, run.timings)
    if asked.timeline is not None and asked.trace_dir is not None:
        try:
            save_timeline(run, asked.trace_dir, asked.timeline)
        except (OSError, ValueError) as error:
            err.print(f"no timeline: {error}", style="red", markup=False)
            return USAGE
    return run.code(summary)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
