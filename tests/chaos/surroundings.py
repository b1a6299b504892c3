"""Rows about what the mesh cannot choose: its broker, its network, its clients and what they send."""

import asyncio
import os
import resource
import shutil
import signal

import psutil

from tests.chain import BREAKS, KILLS, STARVES
from tests.chaos.field import Field
from tests.chaos.hostile import asked_again, churn, half_open, leave_in_every_phase, slow_reader, storm_of_resumes
from tests.chaos.matrix import row
from tests.chaos.oracles import TENANTS_ENV
from tests.chaos.proxy import Trouble
from tests.chaos.prying import pry
from tests.mesh.client import generate

KILL = signal.SIGKILL


# -- the broker --------------------------------------------------------------------------------------------------------


@row("R1", "kill -9 the broker; once more with the end of its file cut off", "P1, P5", seconds=6, loses=True)
async def broker_dies(field: Field) -> None:
    await asyncio.sleep(field.rng.uniform(0.1, 1.0))
    field.kill("broker", KILL)
    await asyncio.sleep(field.rng.uniform(1.5, 2.5))
    logs = sorted(field.mesh.broker.folder.glob("appendonlydir/*.incr.aof"))
    cut = field.rng.randrange(1, 2000)
    size = logs[-1].stat().st_size
    os.truncate(logs[-1], max(size - cut, 0))
    field.note(f"{cut} bytes off {size}")
    field.kill("broker", KILL)


@row("R2", "FLUSHALL under load; then the broker dies and comes back without its file", "P1, P5", loses=True)
async def flush(field: Field) -> None:
    await asyncio.sleep(field.rng.uniform(0.5, 1.5))
    await field.mesh.bus.run([("FLUSHALL",)])
    field.note("flushed")
    await asyncio.sleep(field.rng.uniform(0.5, 1.5))
    shutil.rmtree(field.mesh.broker.folder / "appendonlydir")
    field.kill("broker", KILL)


@row("R3", "the broker is full for two seconds", "P1-P3, P8")
async def full(field: Field) -> None:
    await asyncio.sleep(field.rng.uniform(0.1, 1.0))
    await field.mesh.bus.run([("CONFIG", "SET", "maxmemory", "1mb")])
    field.note("full")
    await asyncio.sleep(2)
    await field.mesh.bus.run([("CONFIG", "SET", "maxmemory", "512mb")])
    field.note("not full any more")


@row("R4", "the broker's disk is full for two seconds", "P1-P3", seconds=6)
async def disk_full(field: Field) -> None:
    process = field.mesh.children["broker"].process
    assert process is not None
    limit, none = psutil.Process(process.pid).rlimit, resource.RLIM_INFINITY
    await asyncio.sleep(field.rng.uniform(0.1, 1.0))
    size = max(path.stat().st_size for path in field.mesh.broker.folder.glob("appendonlydir/*"))
    limit(psutil.RLIMIT_FSIZE, (size + field.rng.randrange(5000), none))
    field.note("full")
    await asyncio.sleep(2.5)
    limit(psutil.RLIMIT_FSIZE, (none, none))
    field.note("not full any more")


@row("R5", "the broker answers nobody for 2 s, has no room for connections, and is slow", "P1-P3", proxied=True, seconds=6)
async def slow_broker(field: Field) -> None:
    await field.mesh.bus.run([("CLIENT", "PAUSE", 2000, "ALL")])
    await asyncio.sleep(2.5)
    await field.mesh.bus.run([("CONFIG", "SET", "maxclients", "20")])
    await asyncio.sleep(1)
    await field.mesh.bus.run([("CONFIG", "SET", "maxclients", "10000")])
    assert field.proxy is not None
    field.proxy.trouble = Trouble(delay_s=(0.1, 0.2))
    await asyncio.sleep(2)
    field.proxy.trouble = Trouble()


# -- the network -------------------------------------------------------------------------------------------------------


@row("N1", "connections to the broker are cut at any byte", "P1-P3", proxied=True)
async def cut(field: Field) -> None:
    await _troubled(field, Trouble(cut_after=field.rng.choice((500, 5_000, 50_000))), 3)


@row("N2", "nothing passes to or from the broker, and nobody is told", "P1-P3", proxied=True, seconds=7)
async def black_hole(field: Field) -> None:
    await _troubled(field, Trouble(free=asyncio.Event()), field.rng.uniform(1, 6))


@row("N4", "50 to 200 ms of delay and 2% resets", "P1-P3", proxied=True, seconds=5)
async def far_away(field: Field) -> None:
    await _troubled(field, Trouble(delay_s=(0.05, 0.2), reset_share=0.02), 4)


async def _troubled(field: Field, trouble: Trouble, seconds: float) -> None:
    assert field.proxy is not None
    await asyncio.sleep(field.rng.uniform(0.1, 0.5))
    field.proxy.trouble = trouble
    field.note(str(trouble))
    await asyncio.sleep(seconds)
    trouble.free.set()
    field.proxy.trouble = Trouble()
    field.note(f"calm again after {field.proxy.cuts} cuts")


# -- clients -----------------------------------------------------------------------------------------------------------

row("N3", "clients stop reading and come back elsewhere, the old socket half-open", "P1")(half_open)
row("C1", "a client that reads nothing", "others go on; dropped; resumable", seconds=14)(slow_reader)
row("C2", "clients leave in every phase", "P6: pages back", seconds=3)(leave_in_every_phase)
row("C3", "a storm of resumes, with right, wrong and foreign cursors", "P1, P5", seconds=3)(storm_of_resumes)
row("C4", "asked again and again under one key, while a streamer and an engine die", "computed once; P1")(asked_again)
row("A4", "two tenants, one prying, while a streamer and an engine die", "P7: no secret shown", env=TENANTS_ENV)(pry)
row("C6", "connections that come, go, and say nothing", "flat")(churn)


# -- messages and requests that hurt -------------------------------------------------------------------------------------


@row("X1", "junk in every stream", "dead letters; others go on")
async def junk(field: Field) -> None:
    names = field.mesh.bus.names
    [keys] = await field.mesh.bus.run([("KEYS", names.tokens("*"))])
    streams = [names.submit, names.work, names.control, *(key.decode() for key in keys)]
    before = (await field.mesh.bus.depths([names.dead]))[0]
    pieces = [b"\xc1", b"", os.urandom(50), b"\x92\x01\xdf\xff\xff\xff\xff", b"\x92\x63\x80", b"\x92\x01\x81\xa4kind\xa4work"]
    for stream in streams:
        for piece in pieces:
            await field.mesh.bus.run([("XADD", stream, "*", "m", piece)])
    await asyncio.sleep(1.5)
    dead = (await field.mesh.bus.depths([names.dead]))[0] - before
    assert dead >= len(pieces) * 3, dead
    await field.mesh.bus.run([("DEL", names.dead)])


@row("X2", "a request that kills every engine that takes it, in a batch of others", "P3, P7", seconds=6, fails=4)
async def poison(field: Field) -> None:
    answer = await generate(field.mesh.url, prompt=[1, KILLS, 2], max_tokens=20)
    field.note(str(answer.done))
    assert answer.done["code"] == "engine_crash", answer.done


@row("G2", "an engine has no memory for a step", "P3, P7", seconds=6, fails=4)
async def out_of_memory(field: Field) -> None:
    answer = await generate(field.mesh.url, prompt=[1, STARVES, 2], max_tokens=20)
    assert answer.done["code"] == "engine_crash", answer.done


@row("G3", "the model gives no usable logits", "P7")
async def no_logits(field: Field) -> None:
    answer = await generate(field.mesh.url, prompt=[1, BREAKS, 2], max_tokens=20)
    assert answer.done["code"] == "engine_crash", answer.done


@row("G1", "more long requests than pages", "P3: preempted, not starved", env={"CHAIN_BLOCKS": "600"}, users=24)
async def few_pages(field: Field) -> None:
    await asyncio.sleep(3)
