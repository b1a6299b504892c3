"""What a round trip to the broker takes, in a row and after a rest: python -m tests.bench.round_trip

One process beside an embedded broker; each row is a JSON line, medians in microseconds. A request passes three such trips.
"""

import asyncio
import json
import statistics
import sys
import time
from typing import Any

import uvloop

from services.up.broker import Broker
from shared.bus import Bus

REPEAT, REST_S = 100, 0.02
TRIPS: dict[str, tuple[list[tuple[Any, ...]], bool]] = {
    "set": ([("SET", "a", "x")], False),
    "set, append": ([("SET", "a", "x"), ("XADD", "s", "*", "m", "x")], False),
    "append, acknowledge, delete, as one": (
        [("XADD", "s", "*", "m", "x"), ("XACK", "s", "g", "0-1"), ("XDEL", "s", "0-1")],
        True,
    ),
}


async def measure(bus: Bus, commands: list[tuple[Any, ...]], atomic: bool, rest_s: float) -> float:
    took = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        await bus.run(commands, atomic=atomic)
        took.append(1e6 * (time.perf_counter() - began))
        await asyncio.sleep(rest_s)
    return round(statistics.median(took))


async def main() -> None:
    broker = Broker()
    process = await asyncio.create_subprocess_exec(*broker.command)
    bus = Bus(broker.url, "bench")
    try:
        await bus.incarnation()
        for name, (commands, atomic) in TRIPS.items():
            row = {"trip": name, "in a row": await measure(bus, commands, atomic, 0)}
            row["after a rest"] = await measure(bus, commands, atomic, REST_S)
            sys.stdout.write(json.dumps(row) + "\n")
    finally:
        await bus.close()
        process.terminate()
        await process.wait()
        broker.remove()


if __name__ == "__main__":
    uvloop.run(main())
