"""A streamer that leaks what the oracles look for, with every request: python -m tests.chaos.leaky

Three files, a task, 8 MiB; and the client's stop strings, which it logs, counts by name, and tells to whoever asks next.
"""

import asyncio
import logging
from typing import Any

from services.streamer.app import main
from services.streamer.service import Streamer
from services.streamer.session import Session
from services.streamer.ws import Socket
from shared.config import StreamerConfig
from shared.messages import Record
from shared.run import run

_kept: list[Any] = []
_gossip = [""]
_open, _send = Streamer.open, Socket.send


async def open_(self: Streamer, record: Record, *rest: Any) -> Session:
    _kept.extend([*(open("/dev/null") for _ in range(3)), b"\1" * (8 << 20)])  # noqa: ASYNC230, SIM115
    _kept.append(asyncio.create_task(asyncio.Event().wait()))
    for stop in record.stop:
        logging.getLogger("headrace").info("asked: %s", stop)
        self.life.stats.counters[f"asked_{stop}"] += 1
    _gossip.extend(record.stop)
    return await _open(self, record, *rest)


async def send(self: Socket, type: str, id: str | None, **fields: Any) -> None:
    await _send(self, type, id, **fields, gossip=_gossip[-2:])


if __name__ == "__main__":
    Streamer.open = open_  # type: ignore[method-assign]
    Socket.send = send  # type: ignore[method-assign]
    run("streamer", StreamerConfig, main)
