"""The life of a service, as a real process."""

import asyncio
import os
import signal
import sys

from services.up.broker import Broker
from shared.bus import Bus
from shared.config import MeshConfig

LOADS_FOR_LONG = """
import time
from functools import partial
from services.engine.start import main
from shared.config import EngineConfig
from shared.run import run

run("engine", EngineConfig, partial(main, build=lambda config: time.sleep(600)))
"""


async def _loading(bus: Bus) -> None:
    while True:
        beat = await bus.member("engine", "e")
        if beat is not None and beat.detail == "loading weights":
            return
        await asyncio.sleep(0.05)


async def test_an_engine_that_loads_its_model_hears_that_it_must_go() -> None:
    broker = Broker()
    store = await asyncio.create_subprocess_exec(*broker.command)
    bus = Bus(broker.url, MeshConfig(id="test").served_name)
    await bus.incarnation()
    env = os.environ | {"HEADRACE_REDIS_URL": broker.url, "HEADRACE_ID": "e", "HEADRACE_LOG": "warning"}
    engine = await asyncio.create_subprocess_exec(sys.executable, "-c", LOADS_FOR_LONG, env=env)
    try:
        async with asyncio.timeout(30):
            await _loading(bus)
            engine.send_signal(signal.SIGTERM)
            assert await engine.wait() == 0
        assert await bus.member("engine", "e") is None
    finally:
        await bus.close()
        store.kill()
        await store.wait()
        broker.remove()
