"""The life of a service: configuration, signals, heartbeat, drain, exit code.

A service is an async function that is given its `Life`; it says when it is ready, and returns when `stopping` is set.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

import uvloop

from shared import trace
from shared.bus import Bus
from shared.config import ConfigError, MeshConfig, load, shown
from shared.connection import BusDown, Refused
from shared.host import resident_memory
from shared.messages import Beat
from shared.stats import Stats

BEAT_S = 1.0
SLOW_S, STUCK_S = 10.0, 60.0  # without progress in what must make progress: not ready; and not to be waited for any longer
ENDING_S = 2.0
EXIT_USAGE = 2  # a configuration that cannot work: restarting would not help
EXIT_FAILURE = 1

log = logging.getLogger("headrace")
_Config = TypeVar("_Config", bound=MeshConfig)
_T = TypeVar("_T")


class Life(Generic[_Config]):
    """What a service is given: its configuration, the bus, its counters, and the flag that ends it."""

    def __init__(self, stage: str, config: _Config, bus: Bus) -> None:
        self.stage, self.config, self.bus = stage, config, bus
        self.stats = Stats()
        self.stats.gauges |= {"tasks": lambda: len(asyncio.all_tasks()), "resident_bytes": resident_memory}
        self.stopping = asyncio.Event()
        self.detail = "starting"
        self.ready = False
        self.abandoned = False
        self.working_since = 0.0  # the loop's time at which something began that must end (a step); 0: nothing
        self.incarnation = ""
        self.on_new_broker: Callable[[], Awaitable[None]] | None = None
        self.on_beat: Callable[[], Awaitable[None]] | None = None

    def stop(self) -> None:
        """End: whoever is told to go does not wait long for a broker that may be gone already."""
        self.bus.patience.seconds = ENDING_S
        self.stopping.set()

    async def unless_stopped(self, loading: "asyncio.Future[_T]") -> _T | None:
        """What a thread loads. None when told to go meanwhile: nobody can end that thread, so the process does not wait."""
        end = asyncio.ensure_future(self.stopping.wait())
        either: list[asyncio.Future[Any]] = [loading, end]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        self.abandoned = not loading.done()
        return None if self.abandoned else loading.result()

    def mark_ready(self, detail: str) -> None:
        self.ready, self.detail = True, detail
        log.info("%s ready: %s", self.config.id, detail)

    def fail(self, why: str) -> None:
        """Give up being ready; the supervisor decides what follows."""
        self.ready, self.detail = False, why
        log.error("%s: %s", self.config.id, why)

    def working_s(self) -> float:
        return asyncio.get_running_loop().time() - self.working_since if self.working_since else 0.0

    def _check_progress(self) -> None:
        """A device that never answers holds a thread that nobody can end: the process goes, and is started again."""
        if self.working_s() > STUCK_S:
            log.error("%s: no progress for %.0f s", self.config.id, STUCK_S)
            os._exit(EXIT_FAILURE)

    def _beat(self) -> Beat:
        return Beat(
            stage=self.stage,
            id=self.config.id,
            pid=os.getpid(),
            host=socket.gethostname(),
            ready=self.ready and not self.stopping.is_set() and self.working_s() < SLOW_S,
            detail=self.detail,
            counters=dict(self.stats.counters),
            gauges=self.stats.gauge_values(),
            histograms=self.stats.histograms(),
        )

    async def _meet_broker(self) -> None:
        now = await self.bus.incarnation()
        if self.incarnation and now != self.incarnation and self.on_new_broker is not None:
            log.warning("%s: the broker restarted", self.config.id)
            await self.on_new_broker()
        self.incarnation = now

    async def heartbeat(self) -> None:
        """Show this process to the mesh each second, and notice when the broker is another than before."""
        while not self.stopping.is_set():
            self._check_progress()
            try:
                await self._meet_broker()
                await self.bus.beat(self._beat())
                trace.flush()
                if self.on_beat is not None:
                    await self.on_beat()
            except (BusDown, Refused) as error:
                log.warning("%s: no heartbeat: %s", self.config.id, error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), BEAT_S)
        with contextlib.suppress(BusDown, Refused):
            await self.bus.leave(self.stage, self.config.id)


async def _live(stage: str, config: _Config, main: Callable[[Life[_Config]], Coroutine[Any, Any, None]]) -> None:
    bus = Bus(config.redis_url, config.served_name, keep_s=config.keep_s)
    life = Life(stage, config, bus)
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, life.stop)
    try:
        life.incarnation = await bus.incarnation()
        async with asyncio.TaskGroup() as group:
            group.create_task(life.heartbeat())
            try:
                await main(life)
            finally:
                life.stop()
    finally:
        trace.flush()
        await bus.close()
    if life.abandoned:
        os._exit(0)


def run(stage: str, cls: type[_Config], main: Callable[[Life[_Config]], Coroutine[Any, Any, None]]) -> None:
    """Run a service until it is told to stop. Exits with 2 for a configuration that cannot work, 1 for a failure."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        config = load(cls, stage)
        log.setLevel(config.log.upper())
        log.info("%s config: %s", config.id, shown(config))
        _trace(stage, config)
        uvloop.run(_live(stage, config, main))
    except (ConfigError, BusDown, Refused, BaseExceptionGroup) as error:
        sys.exit(_say(stage, error))


def _trace(stage: str, config: MeshConfig) -> None:
    try:
        if config.trace:
            trace.open_in(config.trace, f"{stage}-{config.id}")
    except OSError as error:
        raise ConfigError(f"HEADRACE_TRACE={config.trace}: {error.strerror}") from error


def _say(stage: str, error: BaseException) -> int:
    """One clear line where a person can do something, a traceback where we must. Returns the exit code."""
    if (wrong := _first(error, ConfigError)) is not None:
        log.error("%s: %s", stage, wrong)
        return EXIT_USAGE
    if (gone := _first(error, BusDown)) is not None:
        log.error("%s: no broker at HEADRACE_REDIS_URL: %s", stage, gone)
        return EXIT_FAILURE
    if isinstance(error, Refused):
        log.error("%s: the broker at HEADRACE_REDIS_URL refuses: %s", stage, error)
        return EXIT_FAILURE
    log.error("%s failed", stage, exc_info=error)
    return EXIT_FAILURE


def _first(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first exception of a kind, however deep in task groups."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := _first(inner, kind)) is not None), None)
    return error if isinstance(error, kind) else None
