"""Tokens a second from an engine that computes next to nothing to 64 clients: python -m tests.bench.bus_rate [--unchecked]

One engine, one streamer, one tokenizer, one broker; the clients are in this process and do not look at what they read. What is
measured is the scheduler, the token log, the bus, detokenizing and the door; each one's share is its CPU time. `--unchecked`
measures, in turn with that mesh, another one whose engine and streamer leave out the token log's checks.
"""

import argparse
import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack
from statistics import median
from typing import Any

import orjson
import psutil

from services.up.supervise import Child
from tests.mesh.harness import RunningMesh

STREAMS, TOKENS = 64, 1500
ENV = {"CHAIN_LAST_PAGE": "1", "HEADRACE_ENGINE_MAX_RUNNING": str(STREAMS), "HEADRACE_ENGINE_TOKEN_BUDGET": "2048"}
DONE = b'"type":"done"'
UPGRADE = (
    "GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class UncheckedMesh(RunningMesh):
    def _keep(self, child: Child) -> Child:
        if child.name.startswith(("engine", "streamer")):
            child.command[1:] = ["-m", "tests.bench.unchecked", child.command[-1]]
        return super()._keep(child)


def frame(message: dict[str, Any]) -> bytes:
    """A client's text frame, under a mask of zeros."""
    body = orjson.dumps(message)
    return b"\x81\xfe" + len(body).to_bytes(2, "big") + b"\0\0\0\0" + body


async def stream(port: int, number: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(UPGRADE.encode())
    await reader.readuntil(b"\r\n\r\n")
    padding = " " * 100  # a length of two bytes
    ask = {"type": "generate", "id": "a" + padding, "prompt": [1000 + number], "max_tokens": TOKENS, "ignore_eos": True}
    writer.write(frame(ask))
    tail = b""
    while DONE not in tail:
        piece = await reader.read(1 << 16)
        assert piece, "the socket was closed"
        tail = (tail + piece)[-1000 - len(piece) :]
    assert f'"completion_tokens":{TOKENS}'.encode() in tail
    writer.close()


def spent(mesh: RunningMesh) -> dict[str, float]:
    """CPU seconds by process."""
    found = {name: child.process.pid for name, child in mesh.children.items() if child.process} | {"clients": os.getpid()}
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in found.items()}


async def once(mesh: RunningMesh, streams: int = STREAMS) -> dict[str, float]:
    """Tokens a second, and microseconds of CPU a token by process."""
    before, began = spent(mesh), time.monotonic()
    await asyncio.gather(*(stream(mesh.ports[0], at) for at in range(streams)))
    took, tokens = time.monotonic() - began, streams * TOKENS
    used = {name: 1e6 * (now - before[name]) / tokens for name, now in spent(mesh).items()}
    return {"tokens/s": tokens / took, **used, "all": sum(used.values())}


def middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(each[name] for each in rounds) for name in rounds[0]}


def say(name: str, figures: dict[str, float]) -> None:
    rate, *used = (f"{name} {value:,.0f}" if name == "tokens/s" else f"{name} {value:.2f}" for name, value in figures.items())
    sys.stdout.write(f"{name}: {rate}; CPU us a token: {', '.join(used)}\n")
    sys.stdout.flush()


async def main(rounds: int, unchecked: bool) -> None:
    kinds = {"checked": RunningMesh, "unchecked": UncheckedMesh} if unchecked else {"checked": RunningMesh}
    async with AsyncExitStack() as stack:
        meshes = {name: await stack.enter_async_context(kind({}, chain=True, env=ENV)) for name, kind in kinds.items()}
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in meshes}
        for mesh in meshes.values():
            await once(mesh, 8)  # everything has been used once
        for at in range(rounds):
            for name in sorted(meshes, reverse=bool(at % 2)):
                seen[name].append(await once(meshes[name]))
                say(name, seen[name][-1])
    for name, figures in seen.items():
        say(f"{name}, middle of {rounds}", middle(figures))
    if unchecked:
        pairs = list(zip(seen["checked"], seen["unchecked"], strict=True))
        for what, shares in (
            ("tokens/s", sorted(1 - checked["tokens/s"] / free["tokens/s"] for checked, free in pairs)),
            ("the CPU time of a token", sorted(1 - free["all"] / checked["all"] for checked, free in pairs)),
        ):
            low, middling, high = (f"{shares[int(part * (rounds - 1))]:.1%}" for part in (0.25, 0.5, 0.75))
            sys.stdout.write(f"the checks take {middling} of {what} ({low} to {high} in half of {rounds} pairs)\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("tests.bench.bus_rate", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unchecked", action="store_true", help="also without the log's checks, in turn")
    given = parser.parse_args()
    asyncio.run(main(given.rounds, given.unchecked))
