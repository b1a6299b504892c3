"""Random schedules of the token log's protocol: python -m tests.protocol --schedules 50000

`--rule NAME` switches one rule off, `--rules` each of them in turn; a seed that failed is run again by `--seed N`.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.protocol.mutations import PAIRS, RULES, without
from tests.protocol.schedule import Outcome, run


@dataclass
class Tally:
    schedules: int = 0
    violations: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)  # a seed for each kind of violation
    lost: int = 0
    wasted: int = 0
    superseded: int = 0
    took_ms: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def take(self, seed: int, outcome: Outcome) -> None:
        self.schedules += 1
        kind = outcome.violation
        if kind:
            self.violations[kind] += 1
            self.first.setdefault(kind, seed)
        self.lost += outcome.lost
        self.wasted += outcome.wasted
        self.superseded += outcome.superseded
        self.took_ms += outcome.took_ms
        self.faults.update(outcome.faults)

    def row(self, name: str) -> str:
        wrong = ", ".join(f"{kind} {count} (seed {self.first[kind]})" for kind, count in self.violations.most_common(3))
        return (
            f"{name:22} {self.schedules:7} {sum(self.violations.values()):6} {self.lost:6} "
            f"{self.wasted / self.schedules:7.2f} {self.took_ms / self.schedules / 1000:7.1f}  {wrong}"
        )


HEAD = f"{'rule switched off':22} {'runs':>7} {'wrong':>6} {'lost':>6} {'wasted':>7} {'seconds':>7}"


def tally(seeds: range, rule: str = "") -> Tally:
    logging.getLogger("headrace").setLevel(logging.CRITICAL)
    total = Tally()
    with without(rule) if rule else contextlib.nullcontext():
        for seed in seeds:
            total.take(seed, run(seed))
    return total


def main() -> int:
    parser = argparse.ArgumentParser("tests.protocol", description=__doc__)
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--rule", choices=(*RULES, *PAIRS), default="")
    parser.add_argument("--rules", action="store_true", help="switch each rule off in turn")
    given = parser.parse_args()
    seeds, started = range(given.seed, given.seed + given.schedules), time.monotonic()
    sys.stdout.write(f"{HEAD}\n")
    for rule in ("", *RULES, *PAIRS) if given.rules else (given.rule,):
        total = tally(seeds, rule)
        sys.stdout.write(f"{total.row(rule or 'none')}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{sum(total.faults.values())} faults in the last row: {dict(total.faults)}; ")
    sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    return 1 if total.violations and not given.rules and not given.rule else 0


if __name__ == "__main__":
    sys.exit(main())
