"""The campaign: every row of the matrix against real processes, token by token. python -m tests.chaos --rows all --seeds 3

A row and a seed that fail are run again by the command that the table names; what was done, and when, is in the history file.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from aiohttp import ClientError

from tests.chaos.field import Field, Leak, keys_without_expiry, unfinished
from tests.chaos.proxy import Proxy
from tests.chaos.rows import BROKEN, ELSEWHERE, ROWS, Row
from tests.chaos.user import Tally
from tests.mesh.harness import RunningMesh

HISTORY = Path("chaos-history.jsonl")
SHORT = ("K2", "K3", "S1", "R2")  # what CI runs


@dataclass
class Result:
    row: Row
    runs: int = 0
    tally: Tally = field(default_factory=Tally)
    wrong: list[tuple[int, str]] = field(default_factory=list)  # seed and what went wrong

    def take(self, seed: int, tally: Tally, wrong: list[str]) -> None:
        self.runs += 1
        mine = self.tally
        for name in ("requests", "tokens", "resumes", "refused", "lost"):
            setattr(mine, name, getattr(mine, name) + getattr(tally, name))
        mine.stalls += tally.stalls
        mine.resume_s += tally.resume_s
        self.wrong += [(seed, text) for text in (*tally.failures, *wrong)]

    def line(self) -> str:
        tally = self.tally
        return (
            f"| {self.row.id} | {self.row.what} | {self.row.promise} | {self.runs} | {tally.requests:,} | {tally.tokens:,} "
            f"| {len(self.wrong)} | {tally.lost} | {_high(tally.stalls):.2f} | {_high(tally.resume_s):.2f} |"
        )


HEAD = "| row | fault | promise | runs | requests | tokens | failures | lost | stall p99 s | resume p99 s |\n|" + "---|" * 10


def _high(values: Iterable[float], share: float = 0.99) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


@asynccontextmanager
async def standing(row: Row, rng: random.Random) -> AsyncIterator[tuple[RunningMesh, Proxy | None]]:
    """A mesh as the row wants it, behind a proxy if it wants one."""
    env = {"CHAIN_STEP_S": "0.004", "HEADRACE_LOG": "warning"} | dict(row.env)
    mesh = RunningMesh(row.counts, chain=True, env=env, through_proxy=row.proxied)
    if "prefix_cache" in row.counts:
        socket = f"{mesh.broker.folder}/prefix.sock"
        mesh.env |= {"HEADRACE_PREFIX_CACHE_SOCKET": socket, "HEADRACE_ENGINE_PREFIX_CACHES": socket}
    async with AsyncExitStack() as stack:
        proxy = None
        if row.proxied:
            behind = f"{mesh.broker.folder}/broker.sock"
            proxy = await stack.enter_async_context(Proxy(mesh.proxy_path, behind, rng))
        yield await stack.enter_async_context(mesh), proxy


async def once(row: Row, seed: int, mesh: RunningMesh, proxy: Proxy | None) -> tuple[Field, list[str]]:
    """One seed of one row on a mesh that stands. Returns what was done and seen, and what was wrong."""
    ground = Field(mesh, random.Random(f"{row.id}:{seed}"), proxy)
    leak, wrong = Leak.start(mesh), list[str]()
    try:
        await ground.crowd(row.fault, row.seconds, row.users)  # type: ignore[arg-type]
    except (AssertionError, TimeoutError, LookupError, ClientError, *BROKEN) as error:
        wrong.append(f"{type(error).__name__}: {error}")
    wrong += await unfinished(mesh)
    wrong += leak.found(mesh)
    wrong += [f"no expiry: {key}" for key in await keys_without_expiry(mesh)]
    if sum((died := ground.died()).values()) > row.fails:
        wrong.append(f"died by themselves: {died}")
    if ground.tally.lost and not row.loses:
        wrong.append(f"{ground.tally.lost} streams lost")
    return ground, wrong


async def campaign(rows: list[Row], seeds: list[int]) -> list[Result]:
    results = []
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        shapes.setdefault(repr((sorted(row.counts.items()), sorted(row.env.items()), row.proxied)), []).append(row)
    for alike in shapes.values():
        async with standing(alike[0], random.Random(str(seeds))) as (mesh, proxy):
            for row in alike:
                result = Result(row)
                for seed in seeds:
                    ground, wrong = await once(row, seed, mesh, proxy)
                    result.take(seed, ground.tally, wrong)
                    _keep(row, seed, ground, wrong)
                results.append(result)
                sys.stdout.write(f"{result.line()}\n")
                sys.stdout.flush()
    return results


def _keep(row: Row, seed: int, ground: Field, wrong: list[str]) -> None:
    said = {"row": row.id, "seed": seed, "wrong": wrong + ground.tally.failures, "history": ground.history}
    said |= {"requests": ground.tally.requests, "stall_p50": median(ground.tally.stalls or [0.0])}
    with HISTORY.open("a") as file:
        file.write(json.dumps(said) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser("tests.chaos", description=__doc__)
    parser.add_argument("--rows", default="all", help="all, short, or ids such as K2,S1")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    ids = {"all": tuple(ROWS), "short": SHORT}.get(given.rows) or tuple(given.rows.split(","))
    if unknown := [id for id in ids if id not in ROWS]:
        parser.error(", ".join(f"{id}: {ELSEWHERE.get(id, 'no such row')}" for id in unknown))
    started = time.monotonic()
    sys.stdout.write(f"{HEAD}\n")
    with contextlib.suppress(KeyboardInterrupt):
        results = asyncio.run(campaign([ROWS[id] for id in ids], list(range(given.seed, given.seed + given.seeds))))
    for result in results:
        for seed, text in result.wrong[:5]:
            sys.stdout.write(f"{result.row.id}: {text}\n  python -m tests.chaos --rows {result.row.id} --seed {seed}\n")
    if given.rows == "all":
        sys.stdout.write("".join(f"not here: {id}: {why}\n" for id, why in ELSEWHERE.items()))
    sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
