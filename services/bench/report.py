"""What a person and a script get to see: the progress bar, the table, the JSON file."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.bench.metrics import INTERRUPTED, SLO_PERCENTILE, Spread, Summary
from services.bench.spec import Spec
from services.bench.timing import Timing

HIDDEN = "***"


class Bar:
    """Answers as they come in: on a terminal a bar, elsewhere nothing."""

    def __init__(self, console: Console, total: int | None) -> None:
        self._failed = self._tokens = 0
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("warming up", total=total)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def heard(self, timing: Timing) -> None:
        self._failed += timing.failure not in (None, INTERRUPTED)
        self._tokens += timing.output_tokens
        failed = f", [red]{self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, description=f"{self._tokens:,} tokens{failed}")


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    if math.isnan(seconds):
        return "-"
    if abs(seconds) >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{seconds * 1000:.{1 if abs(seconds) >= 0.1 else 2}f} ms"


def _times(summary: Summary) -> Table:
    table = Table("", "mean", "p50", "p95", "p99", "max", "SLO (p95)", title="latency")
    rows: list[tuple[str, Spread, str]] = [
        ("TTFT", summary.ttft, _verdict(summary.slo_ttft, summary.slo_ttft_met)),
        ("TPOT", summary.tpot, _verdict(summary.slo_tpot, summary.slo_tpot_met)),
        ("longest gap", summary.stall, ""),
        ("whole answer", summary.latency, ""),
        ("client late by", summary.late, ""),
    ]
    for name, spread, verdict in rows:
        values = (spread.mean, spread.p50, spread.p95, spread.p99, spread.most)
        table.add_row(name, *[duration(value) for value in values], verdict)
    return table


def _verdict(limit: float, met: bool) -> str:
    return f"[green]≤ {duration(limit)}: met" if met else f"[red]≤ {duration(limit)}: missed"


def _rates(summary: Summary) -> Table:
    table = Table("", "", title="rates", show_header=False)
    table.add_row("throughput", f"{summary.throughput:,.1f} output tokens/s")
    if summary.input_tokens:  # only the server knows them
        table.add_row("prompts", f"{summary.prompt_throughput:,.1f} prompt tokens/s")
    table.add_row("QPS", f"{summary.qps:,.3f} answers/s")
    table.add_row("goodput", f"{summary.goodput:,.3f} answers/s within the SLO")
    table.add_row("answers", f"{summary.succeeded:,} of {summary.sent:,} in {duration(summary.elapsed)}")
    if summary.interrupted:
        table.add_row("interrupted", f"{summary.interrupted:,}")
    for kind, number in summary.failures.items():
        table.add_row(f"[red]{kind}", f"{number:,}  {summary.examples.get(kind, '')}")
    return table


def show(console: Console, summary: Summary) -> None:
    console.print(_rates(summary), _times(summary))
    if any(summary.failures.values()) and not summary.slo_met:
        console.print(f"(a failed request counts as late: over {100 - SLO_PERCENTILE:.0f} % of them miss any SLO)")


def host() -> dict[str, object]:
    """What the client ran on. A figure without its machine and its load says little."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def command(argv: Sequence[str], secret: str | None) -> str:
    words = [word.replace(secret, HIDDEN) if secret else word for word in argv]
    return " ".join(["python -m services.bench", *words])


def save(path: str, argv: Sequence[str], spec: Spec, summary: Summary, timings: Sequence[Timing]) -> None:
    """All figures, and every request with its own. Not a number is null."""
    document = {
        "command": command(argv, spec.api_key),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host(),
        "spec": asdict(replace(spec, api_key=HIDDEN if spec.api_key else None)),
        "summary": asdict(summary),
        "requests": [{**asdict(timing), "tpot": timing.tpot} for timing in sorted(timings, key=lambda t: t.index)],
    }
    Path(path).write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
