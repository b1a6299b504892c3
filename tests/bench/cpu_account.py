"""Who has the cores while streams decode on a CPU: python -m tests.bench.cpu_account [--users 32] [--seconds 5]

A whole mesh and a client, as in cpu_figures. Each row is a JSON line: a thread's milliseconds on a core for each step of the
engine, those it stood in line for one, and how often it slept or lost its core. The last row is the step itself.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import psutil

from shared import trace
from tests.bench.mesh_scale import bench, say
from tests.mesh.harness import RunningMesh

SETTLE_S = 2.0  # all prompts are computed by then
LEAST_MS = 0.05  # threads that work less in a step are told together
Counts = tuple[int, int, int, int]
Snapshot = dict[tuple[str, int, str], Counts]  # by process, its id, and thread


def read(pid: int, thread: str) -> Counts:
    """Nanoseconds on a core and in line for one; how often it gave its core up, and how often it lost it."""
    folder = Path(f"/proc/{pid}/task/{thread}")
    worked, waited, _ = map(int, (folder / "schedstat").read_text().split())
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return worked, waited, int(status["voluntary_ctxt_switches"]), int(status["nonvoluntary_ctxt_switches"])


def processes(mesh: RunningMesh) -> dict[int, str]:
    found = {child.process.pid: name for name, child in mesh.children.items() if child.process}
    return {child.pid: found.get(child.pid, "client") for child in psutil.Process().children(recursive=True)} | {
        os.getpid(): "client"
    }


def snapshot(names: dict[int, str]) -> Snapshot:
    seen: Snapshot = {}
    for pid, name in names.items():
        for thread in os.listdir(f"/proc/{pid}/task"):
            seen[name, pid, thread] = read(pid, thread)
    return seen


def steps_between(folder: Path, rows: int, began: int, ended: int) -> list[trace.Span]:
    spans = [span for span in trace.read(folder) if (span.lane, span.name) == ("device", "step")]
    return [span for span in spans if began <= span.start and span.end <= ended and span.first == rows]


async def main(users: int, seconds: float, output: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with RunningMesh(env={"HEADRACE_TRACE": folder}) as mesh:
            length = ["--input-tokens", "64", "--output-tokens", str(output), "--requests", str(users)]
            load = asyncio.create_task(bench(mesh.url, "--users", str(users), *length))
            await asyncio.sleep(SETTLE_S)
            names = processes(mesh)
            before, began = snapshot(names), trace.now_us()
            await asyncio.sleep(seconds)
            after, ended = snapshot(names), trace.now_us()
            await load
        steps = steps_between(Path(folder), users, began, ended)
    tell(before, after, len(steps))
    took, apart = [span.end - span.start for span in steps], [after.start - before.start for before, after in pairwise(steps)]
    figures = {
        "wall_ms": (ended - began) / len(steps),
        "device_ms": statistics.median(took),
        "apart_ms": statistics.median(apart),
    }
    say({"steps": len(steps), **{name: round(us / 1000, 2) for name, us in figures.items()}})


def tell(before: Snapshot, after: Snapshot, steps: int) -> None:
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
    for key, now in after.items():
        used = [(late - early) / steps for early, late in zip(before.get(key, (0, 0, 0, 0)), now, strict=True)]
        name = (key[0], key[2] if used[0] > 1e6 * LEAST_MS else "others")
        rows[name] = [sum(pair) for pair in zip(rows[name], used, strict=True)]
    for (name, thread), (worked, waited, gave, lost) in sorted(rows.items()):
        times = {"on_core_ms": round(worked / 1e6, 2), "in_line_ms": round(waited / 1e6, 2)}
        say({"process": name, "thread": thread, **times, "slept": round(gave, 1), "lost": round(lost, 1)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser("tests.bench.cpu_account", description=__doc__)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--output-tokens", type=int, default=512, help="enough for all to be decoding all the while")
    given = parser.parse_args()
    asyncio.run(main(given.users, given.seconds, given.output_tokens))
