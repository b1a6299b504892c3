"""Rows about the mesh's own processes: they die, stand still, come and go."""

import asyncio
import signal
import time

from tests.chaos.field import Field
from tests.chaos.matrix import TWO, row

KILL, TERM, STOP, CONT = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT
CACHED = {"HEADRACE_PREFIX_CACHE_SIZE_MB": "16"}


# -- processes that die ------------------------------------------------------------------------------------------------


@row("K1", "kill -9 a tokenizer, and again once it is back", "P1-P4")
async def kill_tokenizers(field: Field) -> None:
    await _one_by_one(field, "tokenizer")


@row("K2", "kill -9 an engine, and again once it is back", "P1-P4")
async def kill_engines(field: Field) -> None:
    await _one_by_one(field, "engine")


@row("K3", "kill -9 a streamer, and again: clients come back with their cursor", "P1, P2, P4")
async def kill_streamers(field: Field) -> None:
    await _one_by_one(field, "streamer")


@row("K4", "kill -9 the prefix cache, drain an engine that stores there, kill it again", "P1-P3",
     counts={**TWO, "prefix_cache": 1}, env=CACHED, seconds=6)  # fmt: skip
async def kill_cache(field: Field) -> None:
    for name, how in (("prefix_cache-0", KILL), (field.any("engine"), TERM), ("prefix_cache-0", KILL)):
        await asyncio.sleep(field.rng.uniform(0.5, 1.5))
        field.kill(name, how)
        await field.mesh.until_ready()


@row("K5", "kill -9 everything at once", "P1, P5", loses=True)
async def kill_everything(field: Field) -> None:
    await asyncio.sleep(field.rng.uniform(0.1, 1.5))
    for name in list(field.mesh.children):
        field.kill(name, KILL)


@row("K6", "a storm of kills in all stages", "P1-P3", seconds=12)
async def storm(field: Field) -> None:
    for _ in range(8):
        await asyncio.sleep(field.rng.uniform(0.3, 2.0))
        await _kill(field, field.rng.choice(("tokenizer", "engine", "streamer")))


async def _one_by_one(field: Field, stage: str) -> None:
    for _ in range(2):
        await asyncio.sleep(field.rng.uniform(0.1, 1.5))
        await _kill(field, stage)
        await field.mesh.until_ready()  # a replica is there at every moment


async def _kill(field: Field, stage: str) -> None:
    field.kill(field.any(stage), KILL)


# -- processes that stand still ----------------------------------------------------------------------------------------


async def _stand_still(field: Field, name: str, seconds: float) -> None:
    field.kill(name, STOP)
    await asyncio.sleep(seconds)
    field.kill(name, CONT)


@row("S1", "an engine stands still beyond its lease, and wakes", "P1-P3, fenced", seconds=6)
async def zombie(field: Field) -> None:
    await _stand_still(field, field.any("engine"), field.rng.uniform(3.5, 5.5))


@row("S2", "a tokenizer, a streamer and the broker stand still", "P1-P3", seconds=6)
async def stand_still(field: Field) -> None:
    for name in (field.any("tokenizer"), field.any("streamer"), "broker"):
        await _stand_still(field, name, field.rng.uniform(0.5, 2.5))


# -- operations --------------------------------------------------------------------------------------------------------


@row("D1", "a rolling restart of every stage", "P1-P3", seconds=12)
async def roll(field: Field) -> None:
    for stage in ("tokenizer", "engine", "streamer"):
        for number in range(field.mesh.counts[stage]):
            field.kill(f"{stage}-{number}", TERM)
            await asyncio.sleep(0.5)
            await field.mesh.until_ready()


@row("D2", "a stage grows and shrinks", "P1-P3", seconds=8)
async def scale(field: Field) -> None:
    for stage in ("tokenizer", "engine"):
        child = field.mesh.start(stage, 7)
        await asyncio.sleep(2)
        await child.end()
        del field.mesh.children[child.name]


@row("L1", "a minute of deaths, drains and standstills of any process", "P1-P3, flat", seconds=60)
async def soak(field: Field) -> None:
    until = time.monotonic() + 55
    while time.monotonic() < until:
        name, how = field.any(field.rng.choice(("tokenizer", "engine", "streamer"))), field.rng.choice((KILL, TERM, STOP))
        victim = field.rng.choice((name, name, name, "broker"))
        if how == STOP or victim == "broker":
            await _stand_still(field, victim, field.rng.uniform(0.5, 4.5))
        else:
            field.kill(victim, how)
        await asyncio.sleep(field.rng.uniform(0.2, 1))
        await field.mesh.until_ready()


BUSY = {"CHAIN_STEP_S": "0.02", "HEADRACE_STREAMER_MAX_WAIT_S": "2"}


@row("O1", "ten times the load that it can take", "P8", seconds=6, env=BUSY, users=160)
async def overload(field: Field) -> None:
    await asyncio.sleep(4)
