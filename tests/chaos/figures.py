"""What safety costs and what a fault costs: python -m tests.chaos.figures [stalls] [overload] [idle]

stalls: the longest wait that each of 16 streams saw when a process of each stage was killed with -9 under it.
overload: tokens/s at ten times the users that fill the mesh, as a share of the tokens/s with just those; time to a refusal.
idle: memory of a streamer per idle WebSocket.
"""

import asyncio
import contextlib
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

import psutil
from aiohttp import ClientSession, TCPConnector, WSMsgType

from tests.chaos.field import Field
from tests.chaos.matrix import TWO
from tests.chaos.results import high
from tests.chaos.user import Tally, User
from tests.mesh.harness import RunningMesh

ROUNDS, STREAMS, IDLE = 3, 16, 10_000


def say(name: str, **figures: Any) -> None:
    sys.stdout.write(f"{name}: {', '.join(f'{key} {value}' for key, value in figures.items())}\n")
    sys.stdout.flush()


async def stalls() -> None:
    async with RunningMesh(TWO, chain=True, env={"CHAIN_STEP_S": "0.004"}) as mesh:
        for victim in ("none", "tokenizer-0", "engine-0", "streamer-0", "broker"):
            tally = Tally()
            for at in range(ROUNDS):
                field = Field(mesh, random.Random(at), tally=tally)
                await field.crowd(lambda field, name=victim: _kill(field, name), 0.1, STREAMS)  # type: ignore[misc, arg-type]
                await mesh.until_ready()
            assert not tally.failures, tally.failures
            say(f"kill -9 {victim}", streams=len(tally.stalls), stall_p50_s=f"{median(tally.stalls):.2f}",
                stall_p99_s=f"{high(tally.stalls):.2f}", resume_p50_s=f"{median(tally.resume_s or [0.0]):.2f}",
                resume_p99_s=f"{high(tally.resume_s):.2f}")  # fmt: skip


async def _kill(field: Field, name: str) -> None:
    if name != "none":
        field.kill(name, signal.SIGKILL)


async def overload() -> None:
    env = {"CHAIN_STEP_S": "0.02", "HEADRACE_STREAMER_MAX_WAIT_S": "2", "HEADRACE_ENGINE_MAX_RUNNING": "16"}
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        async with RunningMesh({"engine": 1, "streamer": 1}, chain=True, env=env) as mesh:
            await _overload(mesh, other)


async def _overload(mesh: RunningMesh, other: ProcessPoolExecutor) -> None:
    rates = []
    for users in (16, 160):
        tally, started = Tally(), time.monotonic()
        crowd = [User(mesh, random.Random(at), tally, started + 15, (40, 60)) for at in range(users)]
        refusals = asyncio.get_running_loop().run_in_executor(other, refused, mesh.url, 14.0)
        await asyncio.gather(*(user.run() for user in crowd))
        rates.append(tally.tokens / (time.monotonic() - started))
        waits = await refusals
        assert not tally.failures, tally.failures[:3]
        say(f"{users} users", tokens_per_s=round(rates[-1]), refused=tally.refused, probes_refused=len(waits),
            refusal_p50_ms=f"{1000 * high(waits, 0.5):.0f}", refusal_p99_ms=f"{1000 * high(waits):.0f}")  # fmt: skip
    say("goodput at 10x", share=f"{rates[1] / rates[0]:.2f}")


def refused(url: str, seconds: float) -> list[float]:
    """In a process of its own, which does nothing else: how long it takes to be told no, by HTTP."""
    return asyncio.run(_refusals(url, seconds))


async def _refusals(url: str, seconds: float) -> list[float]:
    waits, until = [], time.monotonic() + seconds
    async with ClientSession() as http:
        while time.monotonic() < until:
            asked = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(1),
                    http.post(f"{url}/v1/completions", json={"prompt": [1], "max_tokens": 1}) as no,
                ):
                    if no.status == 429:
                        waits.append(time.monotonic() - asked)
            await asyncio.sleep(0.1)
    return waits


async def idle() -> None:
    async with RunningMesh({}, chain=True) as mesh, ClientSession(connector=TCPConnector(limit=0)) as http:
        child = mesh.children["streamer-0"].process
        assert child is not None
        streamer = psutil.Process(child.pid)
        before = streamer.memory_info().rss
        sockets = []
        for at in range(IDLE):
            sockets.append(await http.ws_connect(f"{mesh.url}/v1/ws"))
            if at % 500 == 499:
                await asyncio.sleep(0.1)
        grown = streamer.memory_info().rss - before
        streamer.cpu_percent()
        await asyncio.sleep(5)
        say(f"{IDLE} idle sockets", mib=round(grown / 2**20), kib_each=f"{grown / 1024 / IDLE:.1f}", cpu=streamer.cpu_percent())
        ws = sockets[-1]
        await ws.send_json({"type": "generate", "id": "a", "prompt": [1], "max_tokens": 5})
        started = time.monotonic()
        while (message := await ws.receive(timeout=20)).type is WSMsgType.TEXT and message.json()["type"] != "done":
            pass
        say("a request beside them", ms=f"{1000 * (time.monotonic() - started):.0f}")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["stalls", "overload", "idle"]
    for name in wanted:
        asyncio.run({"stalls": stalls, "overload": overload, "idle": idle}[name]())
