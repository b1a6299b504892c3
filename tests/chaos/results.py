"""What the campaign found: one line of history per row and seed, and the table that is made of them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.matrix import ROWS, Row
from tests.chaos.user import Tally

HISTORY = Path("chaos-history.jsonl")
HEAD = (
    "| row | fault | promise | seeds | requests | tokens | failures | lost | stall p50, p99 s | resume p99 s |\n|" + "---|" * 10
)


@dataclass
class Result:
    row: Row
    runs: int = 0
    tally: Tally = field(default_factory=Tally)
    wrong: list[tuple[int, str]] = field(default_factory=list)  # seed and what went wrong

    def take(self, seed: int, tally: Tally, wrong: Iterable[str]) -> None:
        self.runs += 1
        for name, seen in asdict(tally).items():
            setattr(self.tally, name, getattr(self.tally, name) + seen)
        self.wrong += [(seed, text) for text in (*tally.failures, *wrong)]

    def line(self) -> str:
        tally = self.tally
        return (
            f"| {self.row.id} | {self.row.what} | {self.row.promise} | {self.runs} | {tally.requests:,} | {tally.tokens:,} "
            f"| {len(self.wrong)} | {tally.lost} | {high(tally.stalls, 0.5):.2f}, {high(tally.stalls):.2f} "
            f"| {high(tally.resume_s):.2f} |"
        )


def high(values: Iterable[float], share: float = 0.99) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def keep(row: Row, seed: int, tally: Tally, wrong: list[str], history: list[Any]) -> None:
    with HISTORY.open("a") as file:
        file.write(json.dumps({"row": row.id, "seed": seed, "wrong": wrong, "tally": asdict(tally), "history": history}) + "\n")


def kept() -> list[Result]:
    """Everything in the history file, by row."""
    results = {id: Result(row) for id, row in sorted(ROWS.items())}
    for line in HISTORY.read_text().splitlines():
        said = json.loads(line)
        results[said["row"]].take(said["seed"], Tally(**said["tally"]), said["wrong"])
    return [result for result in results.values() if result.runs]
