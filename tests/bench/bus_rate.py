"""Tokens a second from an engine that computes next to nothing to 64 clients: python -m tests.bench.bus_rate

One engine, one streamer, one tokenizer, one broker; the clients are in this process and do not look at what they read. What is
measured is the scheduler, the token log, the bus, detokenizing and the door; each one's share is its CPU time.
"""

import argparse
import asyncio
import os
import sys
import time
from typing import Any

import orjson
import psutil

from shared.bus import Bus
from tests.mesh.harness import RunningMesh

STREAMS, TOKENS = 64, 1500
ENV = {"CHAIN_LAST_PAGE": "1", "HEADRACE_ENGINE_MAX_RUNNING": str(STREAMS), "HEADRACE_ENGINE_TOKEN_BUDGET": "2048"}
DONE = b'"type":"done"'
UPGRADE = (
    "GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


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


async def measure(env: dict[str, str]) -> None:
    async with RunningMesh({}, chain=True, env=ENV | env) as mesh:
        await asyncio.gather(*(stream(mesh.ports[0], at) for at in range(8)))  # everything has been used once
        for _ in range(3):
            before, began = spent(mesh), time.monotonic()
            steps = await counted(mesh.bus)
            await asyncio.gather(*(stream(mesh.ports[0], at) for at in range(STREAMS)))
            took, tokens = time.monotonic() - began, STREAMS * TOKENS
            each = ", ".join(f"{name} {1e6 * (now - before[name]) / tokens:.1f}" for name, now in spent(mesh).items())
            await asyncio.sleep(1.2)
            steps = await counted(mesh.bus) - steps
            sys.stdout.write(f"{tokens / took:,.0f} tokens/s; {steps:.0f} steps; CPU us a token: {each}\n")
            sys.stdout.flush()


async def counted(bus: Bus) -> float:
    return sum(beat.counters.get("steps", 0) for beat in await bus.members())


if __name__ == "__main__":
    argparse.ArgumentParser("tests.bench.bus_rate", description=__doc__).parse_args()
    asyncio.run(measure({}))
