"""The campaign: every row of the matrix against real processes, token by token. python -m tests.chaos --rows all --seeds 3

A row and a seed that fail are run again by the command that the table names; what was done, and when, is in the history file.
"""

import argparse
import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import ClientError

from shared.connection import BusDown, Refused
from tests.chaos import processes, surroundings
from tests.chaos.field import Field
from tests.chaos.matrix import ELSEWHERE, ROWS, Row
from tests.chaos.oracles import Leak, Whispers, keys_without_expiry, unfinished
from tests.chaos.proxy import Proxy
from tests.chaos.results import HEAD, Result, keep, kept
from tests.mesh.harness import RunningMesh

HOLD_ROWS = (processes, surroundings)  # importing them fills ROWS
BROKEN = (BusDown, Refused, OSError)
SHORT = ("K3", "R2", "X2")  # what CI runs beside tests/mesh/test_chain.py, which kills and stops the others


@asynccontextmanager
async def standing(row: Row, rng: random.Random) -> AsyncIterator[tuple[RunningMesh, Proxy | None]]:
    """A mesh as the row wants it, behind a proxy if it wants one."""
    env = {"CHAIN_STEP_S": "0.004", "HEADRACE_LOG": "info"} | dict(row.env)
    mesh = RunningMesh(row.counts, chain=True, env=env, through_proxy=row.proxied, log=True)
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
    leak, whispers, wrong = await Leak.start(mesh), Whispers(mesh.log), list[str]()
    try:
        await ground.crowd(row.fault, row.seconds, row.users)  # type: ignore[arg-type]
    except (AssertionError, TimeoutError, LookupError, ClientError, *BROKEN) as error:
        wrong.append(f"{type(error).__name__}: {error}")
    wrong += await unfinished(mesh)
    wrong += [*await leak.found(mesh), *await whispers.found(mesh)]
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
                    keep(row, seed, ground.tally, wrong, ground.history)
                results.append(result)
                sys.stdout.write(f"{result.line()}\n")
                sys.stdout.flush()
    return results


def main() -> int:
    parser = argparse.ArgumentParser("tests.chaos", description=__doc__)
    parser.add_argument("--rows", default="all", help="all, short, or ids such as K2,S1")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of everything in the history file")
    given = parser.parse_args()
    if given.table:
        sys.stdout.write("\n".join((HEAD, *(result.line() for result in kept()))) + "\n")
        return 0
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
